"""Features of random crops to train a linear classifier on: new crops in every epoch, or a few that are stored.

Image i belongs to rank i mod world size, so features never move between ranks.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import crop_batches, epoch_order
from dino_ssl.evals.base import EvalContext

Extract = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] -> features [B, D] float32 on the device."""
IN_MEMORY = 2 * 2**30  # bytes of stored features per rank; a larger store is a file


class FeatureBatch(NamedTuple):
    """This rank's readable images of one training step."""

    epoch: int
    indices: Tensor  # [b] int64
    features: Tensor  # [b, D] on the CPU or the device


class CropPlan(NamedTuple):
    """Order and batches of the crops that a classifier is trained on."""

    dataset: ImageDataset
    size: int
    """Side of a crop in pixels."""
    batch_size: int
    """Images per training step, over all ranks."""
    epochs: int
    seed: int
    context: EvalContext

    def steps(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (epoch, this rank's indices) of every step; the last step of an epoch may be smaller."""
        for epoch in range(self.epochs):
            order = epoch_order(self.seed, epoch, len(self.dataset))
            for step in _chunks(order, self.batch_size):
                yield epoch, step[step % distributed.world_size() == distributed.rank()]

    def shard(self) -> np.ndarray:
        """Return the indices of this rank's images."""
        return np.arange(distributed.rank(), len(self.dataset), distributed.world_size())

    def crops(self, jobs: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (readable indices, uint8 crops) for every (epoch, indices)."""
        return crop_batches(self.dataset, self.size, jobs, seed=self.seed, workers=self.context.workers)


def fresh_crops(plan: CropPlan, extract: Extract, width: int) -> Iterator[FeatureBatch]:
    """Yield features of new crops in every epoch, as in the paper: one forward pass per image and epoch."""
    batch_size = plan.context.batch_size
    crops = plan.crops((epoch, part) for epoch, indices in plan.steps() for part in _chunks(indices, batch_size))
    for epoch, indices in plan.steps():
        rows, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, width, device=plan.context.device)]
        for _ in _chunks(indices, batch_size):
            readable, images = next(crops)
            if len(readable):
                rows.append(readable)
                features.append(extract(images))
        yield FeatureBatch(epoch, torch.cat(rows), torch.cat(features))


def stored_crops(plan: CropPlan, extract: Extract, width: int, crops: int) -> Iterator[FeatureBatch]:
    """Extract the features of `crops` random crops per image, then yield one set of them per epoch, in turn."""
    shard, world_size = plan.shard(), distributed.world_size()
    store = _allocate((crops, len(shard), width), plan.context.cache)  # row i // world_size belongs to image i
    is_readable = torch.zeros(crops, len(shard), dtype=torch.bool)
    for crop in range(crops):
        with plan.context.progress(f"features of random crops, {crop + 1} of {crops}") as progress:
            done = 0
            for indices, images in plan.crops((crop, part) for part in _chunks(shard, plan.context.batch_size)):
                if len(indices):
                    store[crop, indices // world_size] = extract(images).cpu()
                is_readable[crop, indices // world_size] = True
                done += len(indices)
                progress(done, len(shard))

    def replay() -> Iterator[FeatureBatch]:
        for epoch, indices in plan.steps():
            crop, rows = epoch % crops, torch.from_numpy(indices // world_size)
            readable = is_readable[crop, rows]
            yield FeatureBatch(epoch, torch.from_numpy(indices)[readable], store[crop, rows[readable]])

    return replay()


def _allocate(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    """Return an empty float32 tensor in memory or in an unnamed file, which is deleted with the tensor."""
    if 4 * math.prod(shape) <= IN_MEMORY:
        return torch.empty(shape)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
