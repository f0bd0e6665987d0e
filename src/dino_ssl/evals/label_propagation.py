"""Labels handed on from frame to frame (Jabri et al., 2020; Table 5): each place of a frame takes those of the places
that look most like it, among those near it in the frames before.

Shapes: h x w places of a network's last map, D wide; M frames before, C classes, the ground first.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.masks import VOID
from dino_ssl.evals.base import full_precision

TILE = 12
"""Places on a side of what is compared at once. Measured at 60 x 104 places, 384 wide, 7 + 1 frames, radius 12: 0.9 s
on a core; 1.2 s at 4 x 8 (copies) and at 20 x 26 (products that the window then throws away)."""


def label_propagation(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    radius: int = 12,
    top_k: int = 5,
    temperature: float = 0.1,
    tile: int = TILE,
) -> Tensor:
    """Soft labels of a frame [h, w, C] from those of the frames before: query [h, w, D], keys [M, h, w, D], labels
    [M, h, w, C].

    Every place averages the labels of its `top_k` nearest by cosine, weighted by exp(cosine / temperature), among all
    places of all M frames that lie in the square window of `radius` around it (0: anywhere). Places that are
    exactly as near as the last of them are taken too.

    Features must be of unit length. A tile of places is compared with the windows of its places only: at radius 12
    and 60 x 104 places that is a fifth of all pairs, and memory for one tile's at a time.
    """
    h, w, _ = query.shape
    out = labels.new_empty(h, w, labels.shape[-1])
    with full_precision(query.device):  # bfloat16's error in a cosine would move a weight by 4 %
        for top in range(0, h, tile):
            for left in range(0, w, tile):
                rows, columns = slice(top, min(h, top + tile)), slice(left, min(w, left + tile))
                around = _reach(rows, h, radius), _reach(columns, w, radius)
                similarity = _similarities(query, keys, (rows, columns), around, radius)
                near = labels[:, around[0], around[1]].flatten(0, 2)
                mean = _weighted_mean(similarity, near, top_k, temperature)
                out[rows, columns] = mean.unflatten(0, (rows.stop - rows.start, -1))
    return out


def _reach(part: slice, end: int, radius: int) -> slice:
    return slice(max(0, part.start - radius), min(end, part.stop + radius)) if radius else slice(0, end)


def _similarities(
    query: Tensor, keys: Tensor, tile: tuple[slice, slice], around: tuple[slice, slice], radius: int
) -> Tensor:
    """Cosines of a tile's places with those around it in every frame: [places, M * places around], -inf outside of
    each place's own window."""
    similarity = query[tile].flatten(0, 1) @ keys[:, around[0], around[1]].flatten(0, 2).T
    if radius:
        off = [
            (_places(mine, query.device)[:, None] - _places(other, query.device)).abs() > radius
            for mine, other in zip(tile, around, strict=True)
        ]
        outside = (off[0][:, None, :, None] | off[1][None, :, None, :]).flatten(2).flatten(0, 1)
        similarity.unflatten(1, (len(keys), -1)).masked_fill_(outside[:, None], -torch.inf)
    return similarity


def _places(part: slice, device: torch.device) -> Tensor:
    return torch.arange(part.start, part.stop, device=device)


def _weighted_mean(similarity: Tensor, labels: Tensor, top_k: int, temperature: float) -> Tensor:
    """[Q, K], [K, C] -> [Q, C]: the labels of the `top_k` most similar, by softmax(similarity / temperature)."""
    best, index = similarity.topk(min(top_k + 1, similarity.shape[1]), dim=1)
    if best.shape[1] <= top_k:
        return torch.einsum("qk,qkc->qc", (best / temperature).softmax(1), labels[index])
    last = best[:, top_k - 1]
    mean = torch.einsum("qk,qkc->qc", (best[:, :top_k] / temperature).softmax(1), labels[index[:, :top_k]])
    tied = (best[:, top_k] == last) & last.isfinite()  # frames that a video repeats
    if tied.any():
        kept = similarity[tied].where(similarity[tied] >= last[tied, None], -torch.inf)
        mean[tied] = (kept / temperature).softmax(1) @ labels
    return mean


def propagate(
    features: Iterable[Tensor],
    first: Tensor,
    *,
    context: int = 7,
    radius: int = 12,
    top_k: int = 5,
    temperature: float = 0.1,
) -> Iterator[Tensor]:
    """Soft labels [h, w, C] of the second frame, the third, ...: from features [h, w, D] of all frames, the first one's
    labels [h, w, C], and of each later one the first frame and the last `context` before it."""
    frames = (F.normalize(frame.float(), dim=-1) for frame in features)
    begin = next(frames, None)
    if begin is None:
        return
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
    for frame in frames:
        known = [(begin, first), *before]
        keys, labels = (torch.stack(each) for each in zip(*known, strict=True))
        soft = label_propagation(frame, keys, labels, radius=radius, top_k=top_k, temperature=temperature)
        before.append((frame, soft))
        yield soft


def label_map(soft: Tensor, height: int, width: int) -> np.ndarray:
    """Soft labels [h, w, C] -> the class of each of height x width pixels, uint8: bilinear, every class stretched to 0
    .. 1 over the frame, then the largest."""
    grown = F.interpolate(soft.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    low, high = grown.amin((1, 2), keepdim=True), grown.amax((1, 2), keepdim=True)
    low = low.where(high > low, 0)  # a class that is everywhere, or nowhere, stays as it is
    return ((grown - low) / (high - low).clamp_min(1e-12)).argmax(0).to(torch.uint8).cpu().numpy()


def nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A label map at another size: each pixel takes the one that its center falls on."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip((height, width), mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def input_size(height: int, width: int, *, size: int, patch: int, multiple: int = 64) -> tuple[int, int]:
    """(height, width) that the network sees: the short side about `size`, a multiple of the patch; the long side in
    proportion, rounded down to a multiple of `multiple` where that holds whole patches, else of the patch."""
    unit = multiple if multiple % patch == 0 else patch
    short = max(patch, size // patch * patch)
    long = max(unit, int(size * max(height, width) / min(height, width)) // unit * unit)
    return (short, long) if height <= width else (long, short)


def one_hot(mask: np.ndarray, h: int, w: int) -> tuple[np.ndarray, Tensor]:
    """The numbers that a mask [H, W] holds, the ground's 0 first; and its labels on the grid, [h, w, C]: those under
    the places' centers."""
    mask = np.where(mask == VOID, 0, mask)
    numbers = np.union1d([0], mask).astype(np.uint8)
    classes = np.searchsorted(numbers, nearest(mask, h, w))
    return numbers, F.one_hot(torch.from_numpy(classes), len(numbers)).float()
