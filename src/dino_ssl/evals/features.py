"""Features of a dataset: extracted once, over all ranks, and cached on disk.

Rank r extracts images r, r + world size, ...; every rank ends with all rows.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import BadImage, ImageDataset, Skipped
from dino_ssl.data.loader import eval_batches, shaped_batches
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.cache import cache_key, cached, weights_hash
from dino_ssl.models.backbone import Backbone

Describe = Callable[[Tensor], Tensor]
"""Normalized images [B, 3, H, W] on the device -> descriptors [B, D]."""
Batches = Callable[[np.ndarray], Iterator[tuple[Tensor, Tensor]]]
"""Indices of images -> batches of (indices [b], uint8 images [b, 3, h, w])."""

GATHER_ROWS = 16384  # rows per collective: 50 MB at 768 dimensions


class ImageFeatures(NamedTuple):
    """Features of the readable images of a dataset, in the dataset's order, equal on every rank."""

    features: Tensor  # [N, D] float32 on the CPU, not normalized
    labels: Tensor | None  # [N] int64, -1 for an image without a label; None for a dataset without labels
    indices: Tensor  # [N] int64: index of each row's image in the dataset
    skipped: list[Skipped]  # images that could not be read

    @staticmethod
    def of(tensors: Mapping[str, Tensor], dataset: ImageDataset) -> "ImageFeatures":
        """Add labels and skipped images to the tensors `features` and `indices`."""
        indices = tensors["indices"]
        labels = None
        if dataset.labels is not None:
            labels = torch.as_tensor(np.asarray(dataset.labels), dtype=torch.int64)[indices]
        missing = np.setdiff1d(np.arange(len(dataset)), indices.numpy()).tolist()
        return ImageFeatures(tensors["features"], labels, indices, [unreadable(dataset, i) for i in missing])

    def every_row(self, count: int) -> Tensor:
        """Return [count, D]: row i belongs to image i of the dataset, zeros if it could not be read."""
        rows = self.features.new_zeros(count, self.features.shape[1])
        rows[self.indices] = self.features
        return rows


def extract(
    backbone: Backbone,
    dataset: ImageDataset,
    context: EvalContext,
    *,
    size: int | None = None,
) -> ImageFeatures:
    """Return the [CLS] (or pooled) feature of the center crop of every image; `size` defaults to the context's."""
    size = size or context.size

    def batches(shard: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        pin_memory = context.device.type == "cuda"
        return eval_batches(dataset, size, context.batch_size, context.workers, shard, pin_memory=pin_memory)

    return _extract(backbone, dataset, batches, backbone, backbone.embed_dim, (f"cls at {size}",), context)


def extract_resized(
    backbone: Backbone,
    dataset: ImageDataset,
    shapes: np.ndarray,
    describe: Describe,
    *,
    width: int,
    key: str,
    context: EvalContext,
) -> ImageFeatures:
    """Return the descriptor of every image, resized to its own (height, width) in `shapes` [N, 2].

    `describe` computes descriptors [B, width] with the backbone; `key` names them and their settings in the cache.
    """
    pixels = context.batch_size * context.size**2  # memory of a batch at the usual size

    def batches(shard: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        return shaped_batches(dataset, shapes, pixels=pixels, indices=shard, workers=context.workers)

    digest = hashlib.sha256(np.ascontiguousarray(shapes, dtype="<i8").tobytes()).hexdigest()
    return _extract(backbone, dataset, batches, describe, width, (key, digest), context)


def _extract(
    backbone: Backbone,
    dataset: ImageDataset,
    batches: Batches,
    describe: Describe,
    width: int,
    key: tuple[str, ...],
    context: EvalContext,
) -> ImageFeatures:
    def compute() -> dict[str, Tensor]:
        shard, rows, features = rank_shard(len(dataset), width)
        done = 0
        with (
            evaluating(backbone),
            torch.random.fork_rng(devices=[]),  # data loaders draw a seed
            context.progress(f"features of {len(dataset)} images") as progress,
        ):
            for indices, images in batches(shard):
                with context.autocast():
                    out = describe(normalize(images.to(context.device, non_blocking=True)))
                part = slice(done, done + len(indices))
                rows[part], features[part] = torch.as_tensor(indices, dtype=torch.int64), out.float().cpu()
                done += len(indices)
                progress(done, len(shard))
        return gather_shards(rows, features, context.device)

    if context.cache is None or (content := distributed.run_on_rank0(lambda: dataset.content_key)) is None:
        return ImageFeatures.of(compute(), dataset)
    file = context.cache / f"{cache_key(weights_hash(backbone), content, *key)}.safetensors"
    return ImageFeatures.of(cached(file, compute), dataset)


def rank_shard(count: int, width: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return this rank's indices among `count`, and empty rows for them: indices [n] of -1, features [n, width].

    n is the same on every rank, so that all ranks gather equal shapes.
    """
    n = -(-count // distributed.world_size())
    shard = np.arange(distributed.rank(), count, distributed.world_size())
    return shard, torch.full((n,), -1, dtype=torch.int64), torch.zeros(n, width)


def gather_shards(indices: Tensor, features: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Gather the rows of all ranks and sort them by index; rows of index -1 are empty and dropped."""
    indices, features = (gather_rows(rows, device, GATHER_ROWS) for rows in (indices, features))
    order = indices.argsort(stable=True)
    order = order[indices[order] >= 0]
    return {"features": features[order], "indices": indices[order]}


def gather_rows(rows: Tensor, device: torch.device, chunk: int | None = None) -> Tensor:
    """Concatenate the rows of all ranks on the CPU; the collective runs on `device`, as its backend requires.

    chunk: rows per collective, if all ranks hold equally many rows. The rows then come chunk by chunk.
    """
    if distributed.world_size() == 1:
        return rows
    pieces = rows.split(chunk) if chunk else [rows]
    return torch.cat([distributed.all_gather(piece.to(device)).cpu() for piece in pieces])


def unreadable(dataset: ImageDataset, index: int, read: Callable[[int], object] | None = None) -> Skipped:
    """Return name and reason of an image that could not be read, by reading it again: batches carry no reasons."""
    try:
        (read or dataset.read)(index)
    except BadImage as error:
        return Skipped(dataset.names[index], error.reason)
    return Skipped(dataset.names[index], "could not be read during the evaluation")


def skipped_details(*features: ImageFeatures) -> list[dict[str, str]]:
    """Return the skipped images as JSON data."""
    return [skip._asdict() for each in features for skip in each.skipped]
