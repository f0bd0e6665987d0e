"""Features of random crops for a classifier to train on: fresh ones in every epoch, or a few, made once and stored.

Picture i is always rank i % world's: features never cross between ranks.
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
"""uint8 [B, 3, H, W] -> [B, D] float32 on the device."""
IN_MEMORY = 2 * 2**30  # bytes of stored features on a rank; what is more lies in a file


class Step(NamedTuple):
    """What one rank sees of one step: a training batch less what is other ranks' and what cannot be read."""

    epoch: int
    indices: Tensor  # [b] int64: pictures
    features: Tensor  # [b, D] on the CPU or the device


class Course(NamedTuple):
    """What a classifier's training sees, and in which order."""

    dataset: ImageDataset
    size: int
    """Side of the crops in pixels."""
    batch: int
    """Pictures in a step, over all ranks."""
    epochs: int
    seed: int
    context: EvalContext

    def steps(self) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, this rank's pictures) for every step; an epoch's last step takes what is left."""
        for epoch in range(self.epochs):
            order = epoch_order(self.seed, epoch, len(self.dataset))
            for step in _pieces(order, self.batch):
                yield epoch, step[step % distributed.world_size() == distributed.rank()]

    def mine(self) -> np.ndarray:
        return np.arange(distributed.rank(), len(self.dataset), distributed.world_size())


def fresh_crops(course: Course, extract: Extract, width: int) -> Iterator[Step]:
    """A new crop of every picture in every epoch, as in the paper: a forward pass per picture and epoch."""
    jobs = ((epoch, part) for epoch, indices in course.steps() for part in _pieces(indices, course.context.batch_size))
    made = crop_batches(course.dataset, course.size, jobs, seed=course.seed, workers=course.context.workers)
    for epoch, indices in course.steps():
        rows, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, width, device=course.context.device)]
        for _ in _pieces(indices, course.context.batch_size):
            read, images = next(made)
            if len(read):
                rows.append(read)
                features.append(extract(images))
        yield Step(epoch, torch.cat(rows), torch.cat(features))


def stored_crops(course: Course, extract: Extract, width: int, crops: int) -> Iterator[Step]:
    """`crops` random crops of every picture, whose features are made now and then seen in turn, a set per epoch."""
    store = _empty((crops, len(course.mine()), width), course.context.cache)  # row i // world is picture i's
    readable = torch.zeros(crops, len(course.mine()), dtype=torch.bool)
    for which in range(crops):
        jobs = ((which, part) for part in _pieces(course.mine(), course.context.batch_size))
        with course.context.progress(f"features of random crops, {which + 1} of {crops}") as progress:
            done = 0
            for indices, images in crop_batches(
                course.dataset, course.size, jobs, seed=course.seed, workers=course.context.workers
            ):
                if len(indices):
                    store[which, indices // distributed.world_size()] = extract(images).cpu()
                readable[which, indices // distributed.world_size()] = True
                done += len(indices)
                progress(done, len(course.mine()))

    def replay() -> Iterator[Step]:
        for epoch, indices in course.steps():
            which, rows = epoch % crops, torch.from_numpy(indices // distributed.world_size())
            read = readable[which, rows]
            yield Step(epoch, torch.from_numpy(indices)[read], store[which, rows[read]])

    return replay()


def _empty(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    """Memory, or a file without a name, which goes when nobody looks at it any more."""
    if 4 * math.prod(shape) <= IN_MEMORY:
        return torch.empty(shape)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def _pieces(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[at : at + size] for at in range(0, len(indices), size)]
