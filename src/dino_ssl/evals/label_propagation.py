"""Label propagation through a video (Jabri et al., 2020; Table 5).

Each position of a frame averages the labels of the most similar nearby positions in the preceding frames. Shapes: h x w
positions of the network's last feature map, D dimensions, M preceding frames, C classes, the background first.
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
"""Side of the tile that is compared at once. Measured at 60 x 104 positions, 384 dimensions, 7 + 1 frames, radius 12:
0.9 s on one core; 1.2 s at 4 x 8 (copies) and at 20 x 26 (products outside of the window)."""


def label_propagation(
    query: Tensor,  # [h, w, D]
    keys: Tensor,  # [M, h, w, D]
    labels: Tensor,  # [M, h, w, C]
    *,
    radius: int = 12,
    top_k: int = 5,
    temperature: float = 0.1,
    tile: int = TILE,
) -> Tensor:
    """Return the soft labels [h, w, C] of a frame from those of the preceding frames.

    Each position averages the labels of its `top_k` nearest positions by cosine, weighted by exp(cosine / temperature),
    within the square window of `radius` around it in all M frames (0: no window). Ties with the last one are included.
    Features must have unit length. A tile of positions is compared only with the windows of its positions: at radius
    12 and 60 x 104 positions, a fifth of all pairs.
    """
    h, w, _ = query.shape
    out = labels.new_empty(h, w, labels.shape[-1])
    with full_precision(query.device):  # a bfloat16 error in a cosine changes a weight by 4 %
        for top in range(0, h, tile):
            for left in range(0, w, tile):
                rows, columns = slice(top, min(h, top + tile)), slice(left, min(w, left + tile))
                window = _expand(rows, h, radius), _expand(columns, w, radius)
                similarity = _similarities(query, keys, (rows, columns), window, radius)
                nearby = labels[:, window[0], window[1]].flatten(0, 2)
                mean = _weighted_mean(similarity, nearby, top_k, temperature)
                out[rows, columns] = mean.unflatten(0, (rows.stop - rows.start, -1))
    return out


def _expand(part: slice, end: int, radius: int) -> slice:
    return slice(max(0, part.start - radius), min(end, part.stop + radius)) if radius else slice(0, end)


def _similarities(
    query: Tensor, keys: Tensor, tile: tuple[slice, slice], window: tuple[slice, slice], radius: int
) -> Tensor:
    """Return cosines [tile positions, M * window positions]; -inf outside of each position's own window."""
    similarity = query[tile].flatten(0, 1) @ keys[:, window[0], window[1]].flatten(0, 2).T
    if radius:
        positions = torch.arange(max(query.shape[:2]), device=query.device)
        rows, columns = (
            (positions[part, None] - positions[around]).abs() > radius
            for part, around in zip(tile, window, strict=True)
        )
        outside = (rows[:, None, :, None] | columns[None, :, None, :]).flatten(2).flatten(0, 1)
        similarity.unflatten(1, (len(keys), -1)).masked_fill_(outside[:, None], -torch.inf)
    return similarity


def _weighted_mean(similarity: Tensor, labels: Tensor, top_k: int, temperature: float) -> Tensor:
    """Average the labels of the `top_k` most similar by softmax(similarity / temperature): [Q, K], [K, C] -> [Q, C]."""
    best, index = similarity.topk(min(top_k + 1, similarity.shape[1]), dim=1)
    if best.shape[1] <= top_k:
        return torch.einsum("qk,qkc->qc", (best / temperature).softmax(1), labels[index])
    last = best[:, top_k - 1]
    mean = torch.einsum("qk,qkc->qc", (best[:, :top_k] / temperature).softmax(1), labels[index[:, :top_k]])
    tied = (best[:, top_k] == last) & last.isfinite()  # repeated frames of a video
    if tied.any():
        kept = similarity[tied].where(similarity[tied] >= last[tied, None], -torch.inf)
        mean[tied] = (kept / temperature).softmax(1) @ labels
    return mean


def propagate(
    features: Iterable[Tensor],
    first_labels: Tensor,
    *,
    context: int = 7,
    radius: int = 12,
    top_k: int = 5,
    temperature: float = 0.1,
) -> Iterator[Tensor]:
    """Yield the soft labels [h, w, C] of every frame after the first, from the features [h, w, D] of all frames.

    The keys of each frame are the first frame and the `context` frames before it. Features are read lazily.
    """
    frames = (F.normalize(frame.float(), dim=-1) for frame in features)
    first = next(frames, None)
    if first is None:
        return
    preceding: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
    for frame in frames:
        keys, labels = (torch.stack(each) for each in zip((first, first_labels), *preceding, strict=True))
        soft = label_propagation(frame, keys, labels, radius=radius, top_k=top_k, temperature=temperature)
        preceding.append((frame, soft))
        yield soft


def label_map(soft: Tensor, height: int, width: int) -> np.ndarray:
    """Return the class of each pixel, uint8 [height, width], from soft labels [h, w, C].

    Soft labels are upsampled bilinearly and each class is scaled to 0 .. 1 over the frame before the argmax.
    """
    large = F.interpolate(soft.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    low = low.where(high > low, 0)  # a constant class is not scaled
    return ((large - low) / (high - low).clamp_min(1e-12)).argmax(0).to(torch.uint8).cpu().numpy()


def resize_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a label map: each pixel takes the label under its center."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip((height, width), mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def input_size(height: int, width: int, *, size: int, patch: int, multiple: int = 64) -> tuple[int, int]:
    """Return (height, width) of the network's input.

    The short side is about `size`, a multiple of the patch. The long side keeps the aspect ratio, rounded down to a
    multiple of `multiple` if that is a multiple of the patch, otherwise of the patch.
    """
    unit = multiple if multiple % patch == 0 else patch
    short = max(patch, size // patch * patch)
    long = max(unit, int(size * max(height, width) / min(height, width)) // unit * unit)
    return (short, long) if height <= width else (long, short)


def one_hot(mask: np.ndarray, h: int, w: int) -> tuple[np.ndarray, Tensor]:
    """Return the labels of a mask [H, W], 0 first, and their one-hot map [h, w, C]; void counts as background."""
    mask = np.where(mask == VOID, 0, mask)
    numbers = np.union1d([0], mask).astype(np.uint8)
    classes = np.searchsorted(numbers, resize_nearest(mask, h, w))
    return numbers, F.one_hot(torch.from_numpy(classes), len(numbers)).float()
