"""The feature vector of a query: an image, a region of it, an image of the index, a vector, or the mean of several."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    is_row = isinstance(query, int | np.integer) and not isinstance(query, bool)
    if is_row and not -len(index) <= query < len(index):
        raise UserError(f"There is no row {query}: the index has {len(index)} images.")
    if is_row and region is None:
        return torch.from_numpy(index.features[int(query)].astype(np.float32))
    if isinstance(query, np.ndarray | Tensor) and query.ndim == 1:
        vector = torch.as_tensor(query).float()
        if len(vector) != index.features.shape[1]:
            raise UserError(f"Expected a vector of {index.features.shape[1]} dimensions, got {len(vector)}.")
        return vector
    image = index.read(int(query)) if is_row else read_image(query) if isinstance(query, str | Path) else to_rgb(query)
    if region is not None:
        image = crop(image, region)
    return image_vector(index, image)


def crop(image: np.ndarray, region: Sequence[int]) -> np.ndarray:
    """Return the region (x, y, width, height) of an image [H, W, 3], cut at its edges."""
    x, y, width, height = region
    part = image[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
    if not part.size:
        raise UserError(
            f"`region` {x} {y} {width} {height} is outside of the image of {image.shape[1]} x {image.shape[0]}."
        )
    return part


def image_vector(index: "Index", image: np.ndarray) -> Tensor:
    """Return the feature [D] of an image, uint8 RGB [H, W, 3], computed as those of the index."""
    backbone, transform = index.backbone, index.store.info.preprocessing
    pixels = torch.from_numpy(np.ascontiguousarray(transform.center_crop(image))).movedim(-1, 0)[None]
    context = EvalContext(device=next(backbone.parameters()).device)
    with evaluating(backbone):
        return forward(backbone, pixels, context)[0]
