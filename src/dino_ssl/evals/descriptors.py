"""Descriptors of pictures that keep their shape: once, over all ranks, and kept on disk where there is a cache."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import shaped_batches
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.evals.base import EvalContext, Extracted, evaluating, gathered, rank_shard
from dino_ssl.evals.cache import cached, key_of, weights_hash
from dino_ssl.models.backbone import Backbone

Describe = Callable[[Tensor], Tensor]
"""Normalised pictures [B, 3, H, W] on the device -> descriptors [B, W]."""


def describe(
    backbone: Backbone,
    dataset: ImageDataset,
    shapes: np.ndarray,
    of: Describe,
    *,
    width: int,
    what: str,
    context: EvalContext,
) -> Extracted:
    """of(picture i resized to shapes[i] = (h, w)) for every picture, in the data set's order, on every rank.

    width: of a descriptor. what: names the descriptor with its settings, for the cache: another one, another name.
    """

    def compute() -> dict[str, Tensor]:
        with context.progress(f"descriptors of {len(dataset)} pictures") as done:
            return _compute(backbone, dataset, shapes, of, width, context, done).tensors()

    if context.cache is None or (content := distributed.run_on_rank0(lambda: dataset.content_key)) is None:
        return Extracted.of(compute(), dataset)
    shown = hashlib.sha256(np.ascontiguousarray(shapes, dtype="<i8").tobytes()).hexdigest()
    file = context.cache / f"{key_of(weights_hash(backbone), content, what, shown)}.safetensors"
    return Extracted.of(cached(file, compute), dataset)


def _compute(
    backbone: Backbone,
    dataset: ImageDataset,
    shapes: np.ndarray,
    of: Describe,
    width: int,
    context: EvalContext,
    progress,
) -> Extracted:
    mine, rows, features = rank_shard(dataset, width)
    pixels, done = context.batch_size * context.size**2, 0  # as much memory as a batch of the usual size takes
    with evaluating(backbone), torch.random.fork_rng(devices=[]):  # loaders draw a seed: give it back
        for indices, images in shaped_batches(dataset, shapes, pixels=pixels, indices=mine, workers=context.workers):
            with context.autocast():
                out = of(normalize(images.to(context.device, non_blocking=True)))
            rows[done : done + len(indices)] = indices
            features[done : done + len(indices)] = out.float().cpu()
            done += len(indices)
            progress(done, len(mine))
    return gathered(rows, features, dataset, context.device)


def every_row(extracted: Extracted, count: int) -> Tensor:
    """[count, W]: row i is picture i's; zeros where it could not be read."""
    rows = extracted.features.new_zeros(count, extracted.features.shape[1])
    rows[extracted.indices] = extracted.features
    return rows


def skipped_of(*extracted: Extracted) -> list[dict[str, str]]:
    """What a result's JSON says of the pictures that could not be read."""
    return [skip._asdict() for one in extracted for skip in one.skipped]
