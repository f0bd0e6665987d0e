"""What a backbone looks at (Fig. 1, 3, 8, 10): attention of the [CLS] token, or of chosen points, head by
head.

Arrays in, arrays out: pictures are uint8 [H, W, 3] RGB, maps are float32 on the grid of patches. `render`
draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import cv2
import numpy as np
import torch

from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_masks import patch_attention, resize_to_patches, top_mass_mask
from dino_ssl.evals.base import evaluating
from dino_ssl.models.backbone import Attentive, Backbone

Point = tuple[float, float]
"""A place (x, y) of the picture as it was given, in pixels from its upper left corner."""
Query = Literal["cls"] | Point
"""The [CLS] token, or a point."""

SHOWN = 384
"""Short side in pixels, at least, of what is drawn on: a small network's maps are enlarged to be read."""


@dataclass(frozen=True)
class Attention:
    """Maps of one picture. h, w: the grid of patches; every map and mask lies exactly over `picture`."""

    picture: np.ndarray  # [h patch, w patch, 3] uint8: what the network saw
    shown: np.ndarray  # the same part as it was given, at least SHOWN on its short side: what maps are drawn over
    heads: np.ndarray  # [heads, h, w] float32: the softmax attention to the patches, as it came
    masks: np.ndarray  # [heads, h, w] bool: the fewest patches that hold `mass` of each head's attention
    mean: np.ndarray  # [h, w]: over heads
    mask: np.ndarray  # [h, w] bool: of the mean
    numbers: tuple[int, ...]  # which heads of the network these are
    layer: int  # counted from 0
    query: Query
    point: Point | None  # the query's place in `picture`, where it is a point
    mass: float
    kind: str = "attention"  # "similarity" where the network has no attention: see `saliency`


@overload
def attend(
    backbone: Backbone,
    image: np.ndarray,
    *,
    query: Query = "cls",
    layer: int = ...,
    heads: Sequence[int] | None = ...,
    mass: float = ...,
    size: int = ...,
) -> Attention: ...
@overload
def attend(
    backbone: Backbone, image: np.ndarray, *, query: list[Point], layer: int = ..., heads: Sequence[int] | None = ...,
    mass: float = ..., size: int = ...,
) -> list[Attention]: ...  # fmt: skip


def attend(
    backbone: Backbone,
    image: np.ndarray,
    *,
    query: Query | list[Point] = "cls",
    layer: int = -1,
    heads: Sequence[int] | None = None,
    mass: float = 0.6,
    size: int = 480,
) -> Attention | list[Attention]:
    """Attention of one picture [H, W, 3] uint8, any shape: the heads, their mean, and the masks of `mass`.

    query: [CLS], a point, or a list of points, which gives a list of as many (one pass of the network). layer: 0
    is the first block, -1 the last (the paper's figures). heads: which ones, counted from 0; None is all. size:
    of the short side; 480 in the paper, for a network trained on small pictures take what it was trained on.
    Class token and registers are left out of the maps.
    """
    if not isinstance(backbone, Attentive):
        raise UserError(
            f"Attention maps were asked of {type(backbone).__name__}, which has no attention to read: "
            "expected a Vision Transformer.\nFor any network, dino_ssl.viz.attention.saliency shows how "
            "alike each place is to the pooled feature."
        )
    picture = resize_to_patches(image, size, backbone.patch)
    queries: list[Query] = list(query) if isinstance(query, list) else [query]
    places = [None if one == "cls" else _locate(one, image, picture) for one in queries]
    columns = picture.shape[1] // backbone.patch
    tokens = [place and int(place[1]) // backbone.patch * columns + int(place[0]) // backbone.patch for place in places]
    maps = patch_attention(backbone, picture, tokens, layer=layer)  # [queries, heads, h, w]
    numbers = _chosen(heads, maps.shape[1])
    shown, layer = enlarged(image, picture), layer % backbone.num_blocks
    found = [
        _attention(picture, shown, each[list(numbers)], numbers, layer, one, place, mass, "attention")
        for each, one, place in zip(maps, queries, places, strict=True)
    ]
    return found if isinstance(query, list) else found[0]


def saliency(backbone: Backbone, image: np.ndarray, *, mass: float = 0.6, size: int = 480) -> Attention:
    """For any network: how alike each place of the last map is to the pooled feature, by cosine; one "head"
    [1, h, w].

    What is below no similarity counts as zero. A stand-in where there is no attention, and not the same
    thing.
    """
    picture = resize_to_patches(image, size, backbone.patch)
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1))[None]
    with evaluating(backbone):
        device = next(backbone.parameters()).device
        out = backbone.features(normalize(torch.from_numpy(planes).to(device)))[0]
        alike = torch.cosine_similarity(out.patches.float(), out.cls.float()[:, None, None], dim=-1)  # [1, h, w]
    heads = alike.clamp(min=0).cpu().numpy()
    return _attention(picture, enlarged(image, picture), heads, (0,), -1, "cls", None, mass, "similarity")


def look(backbone: Backbone, image: np.ndarray, *, mass: float = 0.6, size: int = 480) -> Attention:
    """The last block's [CLS] attention where there is attention, else `saliency`: what the report shows."""
    if isinstance(backbone, Attentive):
        return attend(backbone, image, mass=mass, size=size)
    return saliency(backbone, image, mass=mass, size=size)


def enlarged(image: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The image at a whole multiple of what the network saw: the first whose short side is SHOWN or more.

    Patches stay whole squares of pixels, and a photo that has more to show than the network saw shows it.
    """
    times = -(-SHOWN // min(picture.shape[:2]))
    height, width = times * picture.shape[0], times * picture.shape[1]
    if times == 1:
        return picture
    shrinks = height < image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _attention(
    picture: np.ndarray,
    shown: np.ndarray,
    heads: np.ndarray,
    numbers: tuple[int, ...],
    layer: int,
    query: Query,
    point: Point | None,
    mass: float,
    kind: str,
) -> Attention:
    mean = heads.mean(axis=0)
    flat = np.concatenate([heads, mean[None]]).reshape(len(heads) + 1, -1)
    masks = top_mass_mask(flat, mass).reshape(-1, *mean.shape)
    return Attention(picture, shown, heads, masks[:-1], mean, masks[-1], numbers, layer, query, point, mass, kind)


def _chosen(heads: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The numbers of the heads to show, counted from 0, each once; raises UserError for one that is not there."""
    chosen = tuple(dict.fromkeys(range(count) if heads is None else heads))
    wrong = [head for head in chosen if not 0 <= head < count]
    if wrong or not chosen:
        came = f"not {', '.join(map(str, wrong))}" if wrong else "and at least one is needed"
        raise UserError(f"heads must lie in 0 .. {count - 1} for a network of {count} heads, {came}.")
    return chosen


def _locate(point: Point, image: np.ndarray, picture: np.ndarray) -> Point:
    """A point of the original, in the resized picture, and always inside of it."""
    x, y = point
    height, width = image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"The point ({x:g}, {y:g}) lies outside of the picture, {width} wide and {height} high.\n"
            f"x must lie in 0 .. {width - 1} from the left, y in 0 .. {height - 1} from the top."
        )
    x, y = (x + 0.5) * picture.shape[1] / width, (y + 0.5) * picture.shape[0] / height
    return min(x, picture.shape[1] - 1e-3), min(y, picture.shape[0] - 1e-3)
