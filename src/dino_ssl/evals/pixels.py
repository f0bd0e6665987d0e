"""Raw pixels as features: the reference that learned features must exceed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.evals.base import EvalContext, PreparedEval, Scores
from dino_ssl.evals.features import ImageFeatures, extract, gather_shards, rank_shard

WIDTH = 16 * 16 * 3


def pixel_feature(image: np.ndarray) -> np.ndarray:
    """Return [768] float32: the uint8 image [H, W, 3] at 16 x 16 pixels, minus its mean, of unit length."""
    small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))  # antialiased
    small = small.astype(np.float32).ravel()
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-12)


def raw_pixels(dataset: ImageDataset, context: EvalContext) -> ImageFeatures:
    """Return the `pixel_feature` of every readable image, computed over all ranks."""
    shard, indices, features = rank_shard(len(dataset), WIDTH)
    with context.progress("raw pixels") as progress:
        for row, index in enumerate(shard.tolist()):
            try:
                features[row] = torch.from_numpy(pixel_feature(dataset.read(index)))
                indices[row] = index
            except BadImage:
                pass  # the row keeps index -1 and is dropped
            progress(row + 1, len(shard))
    return ImageFeatures.of(gather_shards(indices, features, context.device), dataset)


def prepare_on_features(
    name: str,
    data: Mapping[str, Mapping[str, Any]],
    datasets: Sequence[ImageDataset],
    score: Callable[..., Scores],
    context: EvalContext,
    size: int | None,
) -> PreparedEval:
    """Prepare an evaluation by `score(*features of each dataset)`, with raw pixels as a reference."""
    return PreparedEval(
        name=name,
        data=data,
        score=lambda backbone: score(*(extract(backbone, dataset, context, size=size) for dataset in datasets)),
        pixel_reference=lambda: score(*(raw_pixels(dataset, context) for dataset in datasets)),
    )
