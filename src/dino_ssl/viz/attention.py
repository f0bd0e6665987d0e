"""Attention maps of the [CLS] token or of chosen points, head by head (Fig. 1, 3, 8, 10).

Images are uint8 [H, W, 3] RGB; maps are float32 on the grid of patches. `rendering` draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import torch

from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_maps import patch_attention, require_attention, resize_to_patches, top_mass_mask
from dino_ssl.evals.base import evaluating
from dino_ssl.models.backbone import Attentive, Backbone, Features

Point = tuple[float, float]
"""(x, y) in pixels from the upper left corner."""
Query = Literal["cls"] | Point
"""The [CLS] token, or a point of the original image."""

MIN_DISPLAY_SIDE = 384
"""Minimum short side in pixels of the images that maps are drawn on."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one query. Every map and mask covers the whole image."""

    image: np.ndarray  # [h patch, w patch, 3] uint8: the network's input
    display: np.ndarray  # the original image at an integer multiple of that size: maps are drawn on it
    heads: np.ndarray  # [heads, h, w] float32: softmax attention to the patches
    masks: np.ndarray  # [heads, h, w] bool: the fewest patches that hold `mass` of each head's attention
    mean: np.ndarray  # [h, w] float32: mean over heads
    mask: np.ndarray  # [h, w] bool: mask of the mean
    head_ids: tuple[int, ...]
    layer: int  # counted from 0
    query: Query
    point: Point | None  # the query in pixels of `image`; None for [CLS]
    mass: float
    kind: Literal["attention", "similarity"] = "attention"  # see `similarity_map`

    @property
    def marker(self) -> Point | None:
        """The query point in pixels of `display`; None for [CLS]."""
        scale = self.display.shape[0] / self.image.shape[0]
        return None if self.point is None else (self.point[0] * scale, self.point[1] * scale)


def attention_maps(
    backbone: Backbone,
    image: np.ndarray,
    queries: Sequence[Query] = ("cls",),
    *,
    layer: int = -1,
    heads: Sequence[int] | None = None,
    mass: float = 0.6,
    size: int = 480,
) -> list[AttentionMaps]:
    """Return the attention of each query in an image [H, W, 3] uint8 of any shape, in one forward pass.

    queries: "cls", or points of the image. layer: 0 is the first block, -1 the last (the paper's figures). heads: those
    to return and to average, counted from 0; None: all. mass: share of the attention that masks hold, in (0, 1]. size:
    short side of the network input in pixels; 480 in the paper. Maps cover the patches only, without class token and
    registers. Raises UserError if the backbone has no attention, or a point, head or layer does not exist.
    """
    backbone = require_attention(backbone)
    resized = resize_to_patches(image, size, backbone.patch)
    points = [None if query == "cls" else _to_resized(query, image, resized) for query in queries]
    columns = resized.shape[1] // backbone.patch
    tokens = [p and int(p[1]) // backbone.patch * columns + int(p[0]) // backbone.patch for p in points]
    maps = patch_attention(backbone, resized, tokens, layer=layer)  # [queries, heads, h, w]
    head_ids = _check_heads(heads, maps.shape[1])
    display, layer = display_image(image, resized), layer % backbone.num_blocks
    return [
        AttentionMaps(
            image=resized, display=display, **_with_masks(all_heads[list(head_ids)], mass), head_ids=head_ids,
            layer=layer, query=query, point=point, mass=mass,
        )
        for all_heads, query, point in zip(maps, queries, points, strict=True)
    ]  # fmt: skip


def similarity_map(backbone: Backbone, image: np.ndarray, *, mass: float = 0.6, size: int = 480) -> AttentionMaps:
    """Return the cosine similarity of each patch to the pooled feature, as one "head" [1, h, w].

    Works for every network, and replaces attention maps where there is no attention. Negative values count as 0.
    """
    resized = resize_to_patches(image, size, backbone.patch)
    features = last_features(backbone, resized)
    similarity = torch.cosine_similarity(features.patches.float(), features.cls.float()[:, None, None], dim=-1)
    heads = similarity.clamp(min=0).cpu().numpy()
    return AttentionMaps(
        image=resized, display=display_image(image, resized), **_with_masks(heads, mass),
        head_ids=(0,), layer=-1, query="cls", point=None, mass=mass, kind="similarity",
    )  # fmt: skip


def cls_attention_or_similarity(
    backbone: Backbone, image: np.ndarray, *, mass: float = 0.6, size: int = 480
) -> AttentionMaps:
    """Return the last block's [CLS] attention, or `similarity_map` for a network without attention."""
    if isinstance(backbone, Attentive):
        return attention_maps(backbone, image, mass=mass, size=size)[0]
    return similarity_map(backbone, image, mass=mass, size=size)


def last_features(backbone: Backbone, image: np.ndarray) -> Features:
    """Return the features of one resized image, batch size 1, on the backbone's device."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
    with evaluating(backbone):
        device = next(backbone.parameters()).device
        return backbone.features(normalize(torch.from_numpy(planes).to(device)))[0]


def display_image(image: np.ndarray, resized: np.ndarray) -> np.ndarray:
    """Return the image at the smallest multiple of the network input whose short side is MIN_DISPLAY_SIDE.

    With an integer multiple, patches stay squares of whole pixels. Details that the network input lacks are kept.
    """
    scale = -(-MIN_DISPLAY_SIDE // min(resized.shape[:2]))
    if scale == 1:
        return resized
    height, width = scale * resized.shape[0], scale * resized.shape[1]
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=interpolation)


def _with_masks(heads: np.ndarray, mass: float) -> dict[str, Any]:
    maps = np.concatenate([heads, heads.mean(axis=0, keepdims=True)])
    masks = top_mass_mask(maps.reshape(len(maps), -1), mass).reshape(maps.shape)
    return {"heads": heads, "masks": masks[:-1], "mean": maps[-1], "mask": masks[-1]}


def _check_heads(heads: Sequence[int] | None, num_heads: int) -> tuple[int, ...]:
    chosen = tuple(dict.fromkeys(range(num_heads) if heads is None else heads))
    if not chosen or not all(0 <= head < num_heads for head in chosen):
        got = ", ".join(map(str, chosen)) or "an empty list"
        raise UserError(f"`heads` must be in 0 .. {num_heads - 1} for a network of {num_heads} heads; got {got}.")
    return chosen


def _to_resized(point: Point, image: np.ndarray, resized: np.ndarray) -> Point:
    (x, y), (height, width) = point, image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"The point ({x:g}, {y:g}) is outside of the image, which is {width} x {height} pixels: expected x in "
            f"0 .. {width - 1} from the left and y in 0 .. {height - 1} from the top."
        )
    x, y = (x + 0.5) * resized.shape[1] / width, (y + 0.5) * resized.shape[0] / height
    return min(x, resized.shape[1] - 1e-3), min(y, resized.shape[0] - 1e-3)
