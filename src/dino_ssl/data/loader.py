"""Batches as a function of (seed, epoch, position): any number of workers or ranks, and any resume, gives
the same.

The order of an epoch depends on (seed, epoch) alone, and every random draw of a picture's views on (seed,
epoch, picture) alone. A worker makes a whole batch at a time, so that batches come in order and nothing is
copied twice.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import BadImage, ImageDataset, Reduction, Skipped
from dino_ssl.data.transforms.base import Views
from dino_ssl.data.transforms.eval import eval_transform
from dino_ssl.errors import UserError

ORDER, SAMPLE, MIX = 0, 1, 2  # what a random stream is for: the streams of different purposes never meet


class Step(NamedTuple):
    """One training step's pictures on this rank."""

    epoch: int
    step: int
    """Within the epoch."""
    batch: Batch
    skipped: list[Skipped]
    """Pictures of this batch that could not be read; they are left out of it, never replaced by a blank."""


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """[n] int64: the order in which epoch `epoch` sees the n pictures."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(ORDER, epoch))).permutation(n)


def sample_rng(seed: int, epoch: int, index: int, copy: int = 0) -> np.random.Generator:
    """The source of every random draw for picture `index` in epoch `epoch`; `copy` counts its repetitions."""
    key = (SAMPLE, epoch, index, copy) if copy else (SAMPLE, epoch, index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def mix_rng(seed: int, step: int) -> np.random.Generator:
    """The source of what all pictures of a step share, on every rank (mixup, CutMix)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(MIX, step)))


def steps_per_epoch(n: int, batch_size: int, world: int = 1) -> int:
    """Whole batches in n pictures; raises UserError where there is none, or where a batch cannot be dealt
    out."""
    if batch_size < 1 or batch_size % world:
        raise UserError(
            f"batch size {batch_size} on {world} processes: expected a multiple of {world}, so that each "
            f"gets the same number of pictures. Try --optim.batch-size {max(1, batch_size // world) * world}."
        )
    if batch_size > n:
        raise UserError(
            f"batch size {batch_size} with {n} pictures: expected at most as many as there are pictures. "
            f"Set the batch size (--optim.batch-size) to {max(1, n // world) * world} or less, or give more pictures."
        )
    return n // batch_size


def train_batches(
    dataset: ImageDataset,
    views: Views,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    clock_start: tuple[int, int] = (0, 0),
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[Step]:
    """The steps from clock_start = (epoch, step in it) to the end of epoch epochs - 1, on this rank.

    batch_size counts all ranks; rank r makes positions r, r + world, ... of each batch. The pictures that
    fill no whole batch at an epoch's end are left out; another epoch's order leaves out others. Where the views
    repeat, each picture of the order comes so many times in a row, and an epoch is as long as without.
    """
    course = EpochPlan(len(dataset), views.repeats, batch_size, seed, epochs, clock_start, rank, world)
    yield from make_loader(_Train(dataset, views, seed), course.jobs(), workers, prefetch, pin_memory)


def eval_batches(
    dataset: ImageDataset,
    size: int,
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | np.ndarray | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices [b] int64, uint8 [b, 3, size, size]) over `indices`, all by default, in order.

    Unreadable pictures are left out, of the indices too. The bytes are channels last: a ResNet-50 is 1.4 times as fast
    so on two AVX2 cores, and a ViT as fast as on the other order.
    """
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    jobs = (chosen[at : at + batch_size] for at in range(0, len(chosen), batch_size))
    yield from make_loader(_Eval(dataset, size), jobs, workers, 2, pin_memory)


class BatchSpec(NamedTuple):
    """What a worker makes a batch of."""

    epoch: int
    step: int
    indices: np.ndarray
    """[b] pictures, in order."""
    copies: np.ndarray
    """[b] which repetition of the picture each is; 0 where none repeats."""


class EpochPlan(NamedTuple):
    """Which pictures this rank makes its batches of: the arguments of `train_batches` that decide it."""

    dataset: int
    repeats: int
    batch_size: int
    seed: int
    epochs: int
    clock_start: tuple[int, int] = (0, 0)
    rank: int = 0
    world: int = 1

    def jobs(self) -> Iterator[BatchSpec]:
        """One a step."""
        steps, (start, first) = steps_per_epoch(self.dataset, self.batch_size, self.world), self.clock_start
        for epoch in range(start, self.epochs):
            order = epoch_order(self.seed, epoch, self.dataset)
            for step in range(first, steps):
                positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rank :: self.world]
                yield BatchSpec(epoch, step, order[positions // self.repeats], positions % self.repeats)
            first = 0


def nothing_left(job: BatchSpec, skipped: list[Skipped]) -> UserError:
    """None of a batch's pictures can be read."""
    shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    count = len(job.indices)
    return UserError(
        f"none of the {count} pictures of epoch {job.epoch}, step {job.step} can be read any more ({shown}): "
        "expected the pictures that were there at the start. Is the disk still there?"
    )


class _Train:
    """Job -> Step."""

    def __init__(self, dataset: ImageDataset, views: Views, seed: int) -> None:
        self.dataset, self.views, self.seed = dataset, views, seed

    def __call__(self, job: BatchSpec) -> Step:
        count, shapes = len(job.indices), self.views.view_shapes
        stacks = [np.empty((n, count, side, side, 3), np.uint8) for n, side in shapes]
        starts = np.cumsum([0, *(n for n, _ in shapes)]).tolist()
        used: list[int] = []
        skipped: list[Skipped] = []
        self.dataset.prefetch(job.indices)
        for index, copy in zip(job.indices.tolist(), job.copies.tolist(), strict=True):
            width, height = self.dataset.sizes[index].tolist()
            image = read_or_none(self.dataset, index, skipped, self.views.decode_scale(height, width))
            if image is None:
                continue
            crops = self.views(image, sample_rng(self.seed, job.epoch, index, copy))
            for stack, (start, end) in zip(stacks, pairwise(starts), strict=True):
                for view, place in zip(crops[start:end], stack[:, len(used)], strict=True):
                    place[...] = view
            used.append(index)
        if not used:
            raise nothing_left(job, skipped)
        labels = None if self.dataset.labels is None else torch.from_numpy(self.dataset.labels[used])
        views = (torch.from_numpy(stack[:, : len(used)]).movedim(-1, -3) for stack in stacks)
        batch = Batch(tuple(views), labels)
        return Step(job.epoch, job.step, batch, skipped)


class _Eval:
    """indices -> (indices that could be read, pictures)."""

    def __init__(self, dataset: ImageDataset, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __call__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        stack = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        used: list[int] = []
        self.dataset.prefetch(indices)
        for index in indices.tolist():
            image = read_or_none(self.dataset, index, [])
            if image is not None:
                stack[len(used)] = eval_transform(image, self.size)
                used.append(index)
        return torch.tensor(used, dtype=torch.int64), torch.from_numpy(stack[: len(used)]).movedim(-1, 1)


def read_or_none(dataset: ImageDataset, index: int, skipped: list[Skipped], times: Reduction = 1) -> np.ndarray | None:
    try:
        return dataset.read_downscaled(index, times)
    except BadImage as bad:
        skipped.append(Skipped(dataset.names[index], bad.reason))
        return None


class _Jobs(Dataset):
    """DataLoader's view of it: a "sample" is a whole batch, its "index" the job that describes it."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, job: Any) -> Any:
        try:
            return self.make(job)
        except UserError as error:  # DataLoader would wrap it in a worker's traceback
            return error


def make_loader(make: Callable, jobs: Iterable, workers: int, prefetch: int, pin_memory: bool) -> Iterator[Any]:
    """make(job) for every job in order, by this process or by workers ahead of it."""
    with warnings.catch_warnings():
        # More workers than cores may be right where disks are slow; forking beside threads is safe here,
        # since a worker uses one thread and none of its parent's locks.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        results = iter(
            DataLoader(
                _Jobs(make),
                sampler=SamplerIterator(jobs),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                worker_init_fn=_start_worker,
                collate_fn=identity,
                pin_memory=pin_memory,
            )
        )
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except ConnectionError as error:  # it died while it was sending
                raise UserError(_DEAD) from error
            except RuntimeError as error:
                if "DataLoader worker" in str(error):
                    raise UserError(_DEAD) from error
                raise
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        stop = getattr(results, "_shutdown_workers", None)
        if stop is not None:  # now, rather than when the garbage is collected
            stop()


_DEAD = (
    "a data worker process died, most often because memory ran out (in a container: because the "
    "shared memory /dev/shm is too small). Resume with fewer workers, a smaller batch, or more "
    "shared memory (docker run --shm-size=8g)"
)


class SamplerIterator:
    """The jobs, as a sampler: iterated once, lazily, of no known length."""

    def __init__(self, jobs: Iterable) -> None:
        self.jobs = jobs

    def __iter__(self) -> Iterator[Any]:
        return iter(self.jobs)


def identity(result: Any) -> Any:
    return result


def _start_worker(_: int) -> None:
    """Ctrl-C and SIGTERM are the main process's to answer: it saves first, and still needs its workers for
    that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(*_: object) -> None:
    signal.alarm(20) if hasattr(signal, "alarm") else os._exit(0)  # SIGALRM ends the process
