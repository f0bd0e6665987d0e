"""What a backbone looks at (Fig. 1, 3, 8, 10): attention of the [CLS] token, or of a chosen point, head by
head.

Arrays in, arrays out: pictures are uint8 [H, W, 3] RGB, maps are float32 on the grid of patches. `render`
draws them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from dino.data.views import normalize
from dino.errors import UserError
from dino.models.backbone import Attentive, Backbone

Query = Literal["cls"] | tuple[float, float]
"""The [CLS] token, or a point (x, y) of the picture as it was given, in pixels from its upper left corner."""

MAX_PATCHES = 10_000
"""Attention between all pairs of so many patches takes 2.4 GB at six heads."""


@dataclass(frozen=True)
class Attention:
    """Maps of one picture. h, w: the grid of patches; every map and mask lies exactly over `picture`."""

    picture: np.ndarray  # [h patch, w patch, 3] uint8: what the network saw
    heads: np.ndarray  # [heads, h, w] float32: the softmax attention to the patches, as it came
    masks: np.ndarray  # [heads, h, w] bool: the fewest patches that hold `mass` of each head's attention
    mean: np.ndarray  # [h, w]: over heads
    mask: np.ndarray  # [h, w] bool: of the mean
    layer: int  # counted from 0
    query: Query
    point: tuple[float, float] | None  # the query's place in `picture`, where it is a point
    mass: float
    kind: str = "attention"  # "similarity" where the network has no attention: see `saliency`


def mass_mask(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """Which of N patches hold `mass` of the attention (Fig. 4). [..., N] -> bool [..., N]

    Patches are taken from the most to the least attended, and those go that together weigh 1 - mass or less.
    So at least `mass` is kept, and always one patch. Between equal patches the later ones are kept first.
    """
    if not 0 < mass <= 1:
        raise UserError(f"the mass to keep must lie above 0 and not above 1, e.g. 0.6; received {mass}.")
    order = np.argsort(attention, axis=-1, kind="stable")
    ascending = np.take_along_axis(attention, order, axis=-1)
    total = ascending.sum(axis=-1, keepdims=True)
    share = ascending / np.where(total > 0, total, 1)
    kept = np.cumsum(share, axis=-1) > 1 - mass
    kept[..., -1] = True  # rounding must not empty a mask
    mask = np.empty_like(kept)
    np.put_along_axis(mask, order, kept, axis=-1)
    return mask


def fit(image: np.ndarray, size: int, patch: int) -> np.ndarray:
    """The whole picture with its short side about `size`, and both sides multiples of `patch`.

    The authors crop the rest that is no whole patch; here each side is scaled to the nearest multiple, so
    that the maps cover all of the picture.
    """
    height, width = image.shape[:2]
    scale = size / min(height, width)
    rows, columns = (max(1, round(side * scale / patch)) for side in (height, width))
    if rows * columns > MAX_PATCHES:
        raise UserError(
            f"A {width} x {height} picture at short side {size} is {columns} x {rows} patches of {patch}, "
            f"and at most {MAX_PATCHES} can be shown.\nTake a smaller size, or crop the picture."
        )
    shrinks = rows * patch < height
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (columns * patch, rows * patch), interpolation=interpolation)


def attend(
    backbone: Backbone,
    image: np.ndarray,
    *,
    layer: int = -1,
    query: Query = "cls",
    mass: float = 0.6,
    size: int = 480,
) -> Attention:
    """Attention of one picture [H, W, 3] uint8, any shape: every head, their mean, and the masks of `mass`.

    layer: 0 is the first block, -1 the last (the paper's figures). size: of the short side; 480 in the paper,
    for a network trained on small pictures take what it was trained on. Class token and registers are left
    out of the maps.
    """
    if not isinstance(backbone, Attentive):
        raise UserError(
            f"Attention maps were asked of {type(backbone).__name__}, which has no attention to read: "
            "expected a Vision Transformer.\nFor any network, dino.analysis.attention.saliency shows how "
            "alike each place is to the pooled feature."
        )
    blocks = backbone.num_blocks
    if not -blocks <= layer < blocks:
        raise UserError(f"layer must lie in {-blocks} .. {blocks - 1} for a network of {blocks} blocks, not {layer}.")
    picture = fit(image, size, backbone.patch)
    rows, columns = picture.shape[0] // backbone.patch, picture.shape[1] // backbone.patch
    extra = 1 + backbone.registers
    token, point = 0, None
    if query != "cls":
        row, column, point = _locate(query, image, picture, backbone.patch)
        token = extra + row * columns + column
    with _still(backbone) as device:
        weights = backbone.attention(_batch(picture, device), layer)[0, :, token, extra:]  # [heads, h w]
    heads = weights.float().cpu().numpy().reshape(-1, rows, columns)
    return _attention(picture, heads, layer % blocks, query, point, mass, "attention")


def saliency(backbone: Backbone, image: np.ndarray, *, mass: float = 0.6, size: int = 480) -> Attention:
    """For any network: how alike each place of the last map is to the pooled feature, by cosine; one "head"
    [1, h, w].

    What is below no similarity counts as zero. A stand-in where there is no attention, and not the same
    thing.
    """
    picture = fit(image, size, backbone.patch)
    with _still(backbone) as device:
        out = backbone.features(_batch(picture, device))[0]
        alike = torch.cosine_similarity(out.patches.float(), out.cls.float()[:, None, None], dim=-1)  # [1, h, w]
    heads = alike.clamp(min=0).cpu().numpy()
    return _attention(picture, heads, -1, "cls", None, mass, "similarity")


def look(backbone: Backbone, image: np.ndarray, *, mass: float = 0.6, size: int = 480) -> Attention:
    """The last block's [CLS] attention where there is attention, else `saliency`: what the report shows."""
    if isinstance(backbone, Attentive):
        return attend(backbone, image, mass=mass, size=size)
    return saliency(backbone, image, mass=mass, size=size)


def _attention(
    picture: np.ndarray,
    heads: np.ndarray,
    layer: int,
    query: Query,
    point: tuple[float, float] | None,
    mass: float,
    kind: str,
) -> Attention:
    mean = heads.mean(axis=0)
    flat = np.concatenate([heads, mean[None]]).reshape(len(heads) + 1, -1)
    masks = mass_mask(flat, mass).reshape(-1, *mean.shape)
    return Attention(picture, heads, masks[:-1], mean, masks[-1], layer, query, point, mass, kind)


def _locate(
    query: tuple[float, float], image: np.ndarray, picture: np.ndarray, patch: int
) -> tuple[int, int, tuple[float, float]]:
    """Row and column of the patch under a point of the original, and the point in the resized picture."""
    x, y = query
    height, width = image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"The point ({x:g}, {y:g}) lies outside of the picture, {width} wide and {height} high.\n"
            f"x must lie in 0 .. {width - 1} from the left, y in 0 .. {height - 1} from the top."
        )
    x, y = (x + 0.5) * picture.shape[1] / width, (y + 0.5) * picture.shape[0] / height
    row, column = (
        min(int(y) // patch, picture.shape[0] // patch - 1),
        min(int(x) // patch, picture.shape[1] // patch - 1),
    )
    return row, column, (x, y)


def _batch(picture: np.ndarray, device: torch.device) -> Tensor:
    """A uint8 picture as the normalised batch [1, 3, H, W] that a backbone takes, on its device."""
    return normalize(torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None].to(device))


@contextmanager
def _still(backbone: Backbone) -> Iterator[torch.device]:
    """Eval mode without gradients, each part's mode restored; gives the device of the weights."""
    modes = {part: part.training for part in backbone.modules()}
    backbone.eval()
    try:
        with torch.inference_mode():
            yield next(backbone.parameters()).device
    finally:
        for part, mode in modes.items():
            part.training = mode
