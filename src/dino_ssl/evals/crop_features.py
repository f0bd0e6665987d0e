"""Features of random crops to train a linear classifier on: new crops in every epoch, or a few that are stored.

Image i belongs to rank i mod world size, so features never move between ranks.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
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
    """Order, batches and features of the crops that a classifier is trained on."""

    dataset: ImageDataset
    size: int  # side of a crop in pixels
    batch_size: int  # images per training step, over all ranks
    epochs: int
    seed: int
    extract: Extract
    width: int  # D
    context: EvalContext

    def shard(self) -> np.ndarray:
        """Return the indices of this rank's images."""
        return np.arange(distributed.rank(), len(self.dataset), distributed.world_size())

    def fresh_crops(self) -> Iterator[FeatureBatch]:
        """Yield features of new crops in every epoch, as in the paper: one forward pass per image and epoch."""
        jobs = ((epoch, part) for epoch, indices in self._steps() for part in self._batches(indices))
        crops = self._crops(jobs)
        for epoch, indices in self._steps():
            rows = [torch.empty(0, dtype=torch.int64)]
            features = [torch.empty(0, self.width, device=self.context.device)]
            for readable, images in islice(crops, len(self._batches(indices))):
                if len(readable):
                    rows.append(readable)
                    features.append(self.extract(images))
            yield FeatureBatch(epoch, torch.cat(rows), torch.cat(features))

    def stored_crops(self, crops: int) -> Iterator[FeatureBatch]:
        """Extract the features of `crops` random crops per image; return an iterator over one set of them per epoch."""
        shard, world_size = self.shard(), distributed.world_size()
        store = _allocate((crops, len(shard), self.width), self.context.cache)
        is_readable = torch.zeros(crops, len(shard), dtype=torch.bool)  # row i // world_size belongs to image i
        for crop in range(crops):
            with self.context.progress(f"features of random crops, {crop + 1} of {crops}") as progress:
                done = 0
                for indices, images in self._crops((crop, part) for part in self._batches(shard)):
                    if len(indices):
                        store[crop, indices // world_size] = self.extract(images).cpu()
                    is_readable[crop, indices // world_size] = True
                    done += len(indices)
                    progress(done, len(shard))

        def replay() -> Iterator[FeatureBatch]:
            for epoch, indices in self._steps():
                crop, rows = epoch % crops, torch.from_numpy(indices // world_size)
                readable = is_readable[crop, rows]
                yield FeatureBatch(epoch, torch.from_numpy(indices)[readable], store[crop, rows[readable]])

        return replay()

    def _steps(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (epoch, this rank's indices) of every step; the last step of an epoch may be smaller."""
        for epoch in range(self.epochs):
            order = epoch_order(self.seed, epoch, len(self.dataset))
            for start in range(0, len(order), self.batch_size):
                step = order[start : start + self.batch_size]
                yield epoch, step[step % distributed.world_size() == distributed.rank()]

    def _batches(self, indices: np.ndarray) -> list[np.ndarray]:
        size = self.context.batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _crops(self, jobs: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (readable indices, uint8 crops) for every (epoch, indices)."""
        return crop_batches(self.dataset, self.size, jobs, seed=self.seed, workers=self.context.workers)


def _allocate(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    """Return an empty float32 tensor in memory or in an unnamed file, which is deleted with the tensor."""
    if 4 * math.prod(shape) <= IN_MEMORY:
        return torch.empty(shape)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
