"""Features of a dataset: extracted once, over all ranks, and cached on disk; raw pixels as the reference.

Rank r extracts images r, r + world size, ...; every rank ends with all rows.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino_ssl import distributed
from dino_ssl.data.dataset import BadImage, ImageDataset, Skipped
from dino_ssl.data.loader import eval_batches, shaped_batches
from dino_ssl.data.sources import described
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, PreparedEval, Scores, check_finite, evaluating
from dino_ssl.files import atomic_write
from dino_ssl.models.backbone import Backbone
from dino_ssl.terminal import logger

Batches = Callable[[np.ndarray], Iterator[tuple[Tensor, Tensor]]]
"""Indices of images -> batches of (indices [b], their uint8 images [b, 3, h, w] or features [b, D])."""

METADATA = {"format_version": "1"}
"""Metadata of a file of cached features; part of its key, so that files of another version are not used."""
GATHER_ROWS = 16384  # rows per collective: 50 MB at 768 dimensions


class ImageFeatures(NamedTuple):
    """Features of the readable images of a dataset, in the dataset's order, equal on every rank."""

    features: Tensor  # [N, D] float32 on the CPU, not normalized
    labels: Tensor  # [N] int64, -1 for an image without a label
    indices: Tensor  # [N] int64: index of each row's image in the dataset
    skipped: list[Skipped]  # images that could not be read

    @staticmethod
    def of(tensors: Mapping[str, Tensor], dataset: ImageDataset) -> "ImageFeatures":
        """Add labels and skipped images to the tensors `features` and `indices`."""
        indices = tensors["indices"]
        labels = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
        missing = np.setdiff1d(np.arange(len(dataset)), indices.numpy()).tolist()
        known = torch.from_numpy(labels[indices.numpy()])
        return ImageFeatures(tensors["features"], known, indices, [unreadable(dataset, i) for i in missing])

    def every_row(self, count: int) -> Tensor:
        """Return [count, D]: row i belongs to image i of the dataset, zeros if it could not be read."""
        rows = self.features.new_zeros(count, self.features.shape[1])
        rows[self.indices] = self.features
        return rows


def extract(
    backbone: Backbone, dataset: ImageDataset, context: EvalContext, *, size: int | None = None
) -> ImageFeatures:
    """Return the [CLS] (or pooled) feature of the center crop of every image; `size` defaults to the context's."""
    transform = replace(backbone.transform, size=size or context.size)
    pin_memory = context.device.type == "cuda"
    batches = partial(eval_batches, dataset, transform, context.batch_size, context.workers, pin_memory=pin_memory)
    return _extract(backbone, dataset, batches, backbone, backbone.embed_dim, (f"cls, {transform}",), context)


def extract_resized(
    backbone: Backbone,
    dataset: ImageDataset,
    shapes: np.ndarray,
    describe: Callable[[Tensor], Tensor],
    *,
    width: int,
    key: str,
    context: EvalContext,
) -> ImageFeatures:
    """Return the descriptor of every image, resized to its own (height, width) in `shapes` [N, 2].

    `describe` computes descriptors [B, width] with the backbone; `key` names them and their settings in the cache.
    """
    dataset = dataset.with_bit_depth(backbone.transform.bit_depth)
    pixels = context.batch_size * context.size**2  # memory of a batch at the usual size

    def batches(shard: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        return shaped_batches(dataset, shapes, pixels=pixels, indices=shard, workers=context.workers)

    digest = hashlib.sha256(np.ascontiguousarray(shapes, dtype="<i8").tobytes()).hexdigest()
    return _extract(backbone, dataset, batches, describe, width, (key, f"{backbone.transform}", digest), context)


def forward(
    backbone: Backbone, images: Tensor, context: EvalContext, describe: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the features of uint8 images [B, 3, H, W], or what `describe` computes: float32 [B, D] on the CPU."""
    with context.autocast():
        out = (describe or backbone)(backbone.transform.normalize(images.to(context.device, non_blocking=True)))
    return out.float().cpu()


def _extract(
    backbone: Backbone,
    dataset: ImageDataset,
    batches: Batches,
    describe: Callable[[Tensor], Tensor],
    width: int,
    key: tuple[str, ...],
    context: EvalContext,
) -> ImageFeatures:
    def features(shard: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for indices, images in batches(shard):
            yield indices, forward(backbone, images, context, describe)

    def compute() -> dict[str, Tensor]:
        with evaluating(backbone), torch.random.fork_rng(devices=[]):  # data loaders draw a seed
            return _collect(features, len(dataset), width, f"features of {len(dataset)} images", context)

    if context.cache is None or (content := distributed.run_on_rank0(lambda: dataset.content_key)) is None:
        return ImageFeatures.of(compute(), dataset)
    digest = hashlib.sha256(
        "\0".join((METADATA["format_version"], weights_hash(backbone), content, precision_of(context), *key)).encode()
    ).hexdigest()
    return ImageFeatures.of(_cached(context.cache / f"{digest[:24]}.safetensors", compute), dataset)


def _collect(features: Batches, count: int, width: int, label: str, context: EvalContext) -> dict[str, Tensor]:
    """Return `features` [N, width] and `indices` [N] of all ranks, from this rank's (indices [b], features [b, width]).

    Every rank gathers equally many rows, as collectives require; those of index -1 are empty and dropped. Raises
    UserError, on every rank, for a value that is not finite.
    """
    world_size, done = distributed.world_size(), 0
    shard = np.arange(distributed.rank(), count, world_size)
    indices = torch.full((-(-count // world_size),), -1, dtype=torch.int64)
    rows = torch.zeros(len(indices), width)
    with context.progress(label) as progress:
        for batch, values in features(shard):
            part = slice(done, done + len(batch))
            indices[part], rows[part] = batch, values
            done += len(batch)
            progress(done, len(shard))
    indices, rows = (gather_rows(tensor, context.device, GATHER_ROWS) for tensor in (indices, rows))
    order = indices.argsort(stable=True)
    order = order[indices[order] >= 0]
    check_finite("Features", rows)
    return {"features": rows[order], "indices": indices[order]}


def precision_of(context: EvalContext) -> str:
    """Return the data type of matrix products in the context's forward passes: float32, bfloat16, float16."""
    device = context.device.type
    with context.autocast():
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return str(dtype).removeprefix("torch.")


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


# -- raw pixels --------------------------------------------------------------------------------------------


def pixel_feature(image: np.ndarray) -> np.ndarray:
    """Return [768] float32: the uint8 image [H, W, 3] at 16 x 16 pixels, minus its mean, of unit length."""
    small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))  # antialiased
    small = small.astype(np.float32).ravel()
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-12)


def raw_pixels(dataset: ImageDataset, context: EvalContext) -> ImageFeatures:
    """Return the `pixel_feature` of every readable image, the reference that learned features must exceed."""

    def features(shard: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for index in shard.tolist():
            with suppress(BadImage):
                yield torch.tensor([index]), torch.from_numpy(pixel_feature(dataset.read(index)))[None]

    return ImageFeatures.of(_collect(features, len(dataset), 16 * 16 * 3, "raw pixels", context), dataset)


def prepare_on_features(
    name: str,
    datasets: Mapping[str, ImageDataset],
    score: Callable[..., Scores],
    context: EvalContext,
    size: int | None = None,
) -> PreparedEval:
    """Prepare an evaluation by `score(*features of each dataset)`, with raw pixels as a reference."""
    return PreparedEval(
        name=name,
        data={name: described(dataset) for name, dataset in datasets.items()},
        score=lambda backbone: score(*(extract(backbone, each, context, size=size) for each in datasets.values())),
        references={"raw_pixels": lambda: score(*(raw_pixels(each, context) for each in datasets.values()))},
    )


# -- cache -------------------------------------------------------------------------------------------------


def weights_hash(network: nn.Module) -> str:
    """Return 16 hex digits of the SHA-256 of the weights; the same on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _cached(file: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors in `file`, or call `compute` on all ranks and save its result there.

    A damaged file is computed again. A file that cannot be written (full disk, read-only folder) is a warning.
    """

    def read() -> dict[str, Tensor] | None:
        with suppress(OSError, ValueError, safetensors.SafetensorError):
            return load_file(file)

    if (stored := distributed.run_on_rank0(read)) is not None:
        return stored
    tensors = compute()
    if distributed.is_rank0():
        try:
            atomic_write(file, lambda temporary: save_file(tensors, temporary, metadata=METADATA))
        except UserError as error:
            logger.warning("Features are not cached: %s", error)
    return tensors
