"""Attention maps of the [CLS] token or of chosen points, head by head (Fig. 1, 3, 8, 10).

Images are uint8 [H, W, 3] RGB; maps are float32 on the grid of patches. `rendering` draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import cv2
import numpy as np
import torch
from PIL import Image

from dino_ssl.errors import UserError
from dino_ssl.evals.attention_maps import patch_attention, require_attention, resize_to_patches, top_mass_mask
from dino_ssl.evals.base import evaluating
from dino_ssl.formatting import plural
from dino_ssl.models.backbone import Attentive, Backbone, Features

Point = tuple[float, float]
"""(x, y) in pixels from the upper left corner."""
Query = Literal["cls"] | Point
"""The [CLS] token, or a point of the original image."""

MIN_DISPLAY_SIDE = 384
"""Minimum short side in pixels of the images that maps are drawn on."""


@dataclass(frozen=True, repr=False)
class AttentionMaps:
    """Attention of one query. Every map and mask covers the whole image."""

    image: np.ndarray  # [h patch, w patch, 3] uint8: the network's input
    display: np.ndarray  # the original image at an integer multiple of that size: maps are drawn on it
    heads: np.ndarray  # [heads, h, w] float32: softmax attention to the patches
    masks: np.ndarray  # [heads, h, w] bool: the fewest patches that hold `mass` of each head's attention
    mean: np.ndarray  # [h, w] float32: mean over heads
    mask: np.ndarray  # [h, w] bool: mask of the mean
    head_ids: list[int]
    layer: int  # counted from 0
    point: Point | None  # the query in pixels of `display`; None for [CLS]
    mass: float
    kind: Literal["attention", "similarity"]

    def __repr__(self) -> str:
        (count, rows, columns), query = self.heads.shape, "[CLS]" if self.point is None else "a point"
        described = f"attention of {query}, layer {self.layer}, {plural(count, 'head')}"
        if self.kind == "similarity":
            described = "similarity to the pooled feature"
        return f"AttentionMaps({described}, {columns} x {rows} patches)"

    def _repr_jpeg_(self) -> bytes:
        """Return the panels as a JPEG, which a notebook shows."""
        from dino_ssl.viz.rendering import panels, sheet  # imports this module

        Image.fromarray(sheet([panels(self)])).save(file := BytesIO(), "JPEG", quality=85)
        return file.getvalue()


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
    registers. A network without attention has one "head": the cosine similarity of each patch to the pooled feature,
    clipped at 0; `queries`, `layer` and `heads` need attention. Raises UserError if a point, head or layer does not
    exist.
    """
    resized = resize_to_patches(image, size, backbone.patch)
    grid = resized.shape[0] // backbone.patch, resized.shape[1] // backbone.patch
    positions = [None if query == "cls" else _position(query, image) for query in queries]
    if not isinstance(backbone, Attentive) and positions == [None] and layer == -1 and heads is None:
        features = last_features(backbone, resized)
        similarity = torch.cosine_similarity(features.patches.float(), features.cls.float()[:, None, None], dim=-1)
        maps, kind = similarity.clamp(min=0).cpu().numpy()[None], "similarity"
    else:
        patches = [p and int(p[1] * grid[0]) * grid[1] + int(p[0] * grid[1]) for p in positions]
        maps = patch_attention(backbone, resized, patches, layer=layer)  # [queries, heads, h, w]
        kind, layer = "attention", layer % require_attention(backbone).num_blocks
    num_heads = maps.shape[1]
    head_ids = list(dict.fromkeys(range(num_heads) if heads is None else heads))
    if not head_ids or not set(head_ids) <= set(range(num_heads)):
        raise UserError(f"`heads` must be in 0 .. {num_heads - 1} for a network of {num_heads} heads; got {head_ids}.")
    display = display_image(image, resized)
    results = []
    for position, chosen in zip(positions, maps[:, head_ids], strict=True):
        with_mean = np.concatenate([chosen, chosen.mean(axis=0, keepdims=True)])
        masks = top_mass_mask(with_mean.reshape(len(with_mean), -1), mass).reshape(with_mean.shape)
        point = position and (position[0] * display.shape[1], position[1] * display.shape[0])
        results.append(
            AttentionMaps(
                resized, display, chosen, masks[:-1], with_mean[-1], masks[-1], head_ids, layer, point, mass, kind
            )
        )
    return results


def raw_arrays(maps: Sequence[AttentionMaps], height: int, width: int) -> dict[str, np.ndarray]:
    """Return the attention of every head, float32: `patches` [heads, h, w] and `pixels` [heads, height, width].

    Pixels are interpolated bilinearly between the centers of the patches. Several queries are a first dimension.
    """
    patches = np.stack([query.heads for query in maps]).astype(np.float32)
    flat = patches.reshape(-1, *patches.shape[2:])
    large = np.stack([cv2.resize(each, (width, height), interpolation=cv2.INTER_LINEAR) for each in flat])
    pixels = large.reshape(*patches.shape[:2], height, width)
    return {"patches": patches, "pixels": pixels} if len(maps) > 1 else {"patches": patches[0], "pixels": pixels[0]}


def last_features(backbone: Backbone, image: np.ndarray) -> Features:
    """Return the features of one resized image, batch size 1, on the backbone's device."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
    with evaluating(backbone):
        images = torch.from_numpy(planes).to(next(backbone.parameters()).device)
        return backbone.features(backbone.transform.normalize(images))[0]


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


def _position(point: Point, image: np.ndarray) -> Point:
    """Return the position of a pixel as fractions of the width and the height."""
    (x, y), (height, width) = point, image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"The point ({x:g}, {y:g}) is outside of the image, which is {width} x {height} pixels.")
    return min((x + 0.5) / width, 1 - 1e-6), min((y + 0.5) / height, 1 - 1e-6)
