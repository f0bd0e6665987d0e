"""The feature vector of a query: an image, a region of it, an image of the index, a vector, or the mean of several."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.features import forward
from dino_ssl.loading import read_image
from dino_ssl.preprocessing import to_rgb

if TYPE_CHECKING:
    from dino_ssl.search.index import Index

Query = str | Path | int | Image.Image | np.ndarray | Tensor
"""See `Index.search`."""


def query_vector(index: "Index", query: Query | Sequence[Query], region: Sequence[int] | None = None) -> Tensor:
    """Return the unit vector [D] of a query; of several: the mean of their unit vectors."""
    queries: Any = query if isinstance(query, list | tuple) else [query]
    if not queries:
        raise UserError("The query is empty; expected at least one image.")
    vectors = torch.stack([F.normalize(_vector(index, each, region), dim=0) for each in queries])
    return F.normalize(vectors.mean(0), dim=0)


def _vector(index: "Index", query: Any, region: Sequence[int] | None) -> Tensor:
    if isinstance(query, np.ndarray | Tensor) and query.ndim == 1:
        vector = torch.as_tensor(query).float()
        if len(vector) != index.features.shape[1]:
            raise UserError(f"Expected a vector of {index.features.shape[1]} dimensions, got {len(vector)}.")
        return vector
    row = row_of(index, query)
    if row is not None and region is None:
        return torch.from_numpy(index.features[row].astype(np.float32))
    image = query_image(index, query)
    return image_vector(index, image if region is None else crop(image, region))


def row_of(index: "Index", query: Any) -> int | None:
    """Return the row of a query that is an image of the index; None for an image file or pixels."""
    if isinstance(query, str) and not Path(query).exists():
        return index.items.row_of(query)
    if isinstance(query, int | np.integer):
        if not -len(index) <= query < len(index):
            raise UserError(f"There is no row {query}: the index has {len(index):,} images.")
        return int(query) % len(index)
    return None


def query_image(index: "Index", query: Any) -> np.ndarray:
    """Return the image of a query, uint8 RGB [H, W, 3]. Raises UserError if there is none."""
    if (row := row_of(index, query)) is not None:
        return index.read(row)
    if isinstance(query, str | Path) and not Path(query).exists():
        raise UserError(f"There is no file {query}, and no image of this name in the index.")
    if isinstance(query, str | Path):
        return read_image(query, index.store.info.preprocessing.bit_depth)
    return to_rgb(query)


def crop(image: np.ndarray, region: Sequence[int]) -> np.ndarray:
    """Return the region (x, y, width, height) of an image [H, W, 3], cut at its edges."""
    if len(region) != 4:
        raise UserError(f"`region` expects x, y, width and height in pixels; got {len(region)} numbers.")
    x, y, width, height = region
    part = image[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
    if not part.size:
        raise UserError(
            f"`region` {x} {y} {width} {height} is outside of the image of {image.shape[1]} x {image.shape[0]}."
        )
    return part


def within(image: np.ndarray, side: int) -> np.ndarray:
    """Return an image [H, W, 3], downscaled if its longer side has more pixels than this."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def thumbnail(image: np.ndarray, side: int = 128, quality: int = 85) -> bytes:
    """Return an image, uint8 RGB [H, W, 3], as JPEG of at most side x side pixels."""
    Image.fromarray(within(image, side)).save(file := io.BytesIO(), "JPEG", quality=quality)
    return file.getvalue()


def image_vector(index: "Index", image: np.ndarray) -> Tensor:
    """Return the feature [D] of an image, uint8 RGB [H, W, 3], computed as those of the index."""
    backbone, transform = index.backbone, index.store.info.preprocessing
    pixels = torch.from_numpy(np.ascontiguousarray(transform.center_crop(image))).movedim(-1, 0)[None]
    context = EvalContext(device=next(backbone.parameters()).device)
    with evaluating(backbone):
        return forward(backbone, pixels, context)[0]
