"""Pictures that stay on the device as bytes, and training batches whose views are made there, many at once.

The workers decode and crop nothing: they send what chance decides, 64 bytes a view, and the device does the rest by the
operations of `fast.views`. Order, draws, ranks and unreadable pictures are those of `data.loader.train_batches`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino.data.loader import Course, Job, Step, nothing_left, sample_rng, serve
from dino.data.pictures import BadImage, Pictures, Skipped
from dino.data.views import Batch, MultiCrop
from dino.errors import UserError
from dino.fast.sending import send
from dino.fast.views import multi_crop, to_row

FILL = 256  # pictures that are decoded between two copies to the device
AT_ONCE = 2**24  # numbers of pictures and views that are made at once; some ten times as many are on the way


class Held(NamedTuple):
    """A set of pictures on a device."""

    pixels: Tensor
    """uint8 [N, 3, H, W], H and W the largest of all: a smaller picture lies in the upper left corner."""
    pictures: Pictures
    bad: dict[int, str]
    """Pictures that could not be read, and why."""


def held_bytes(pictures: Pictures) -> int:
    """What `hold` takes of the device's memory."""
    return 3 * len(pictures) * int(pictures.sizes.max(axis=0, initial=0).prod())


def hold(pictures: Pictures, device: torch.device, room: int, threads: int = 2) -> Held:
    """Reads every picture once and keeps it on the device. Raises UserError where they take more than `room` bytes."""
    if (needed := held_bytes(pictures)) > room:
        width, height = pictures.sizes.max(axis=0)
        raise UserError(
            f"cache device: {len(pictures)} pictures in frames of {width} x {height}, the largest sides of all, take "
            f"{needed / 2**30:.3g} GiB; expected at most {room / 2**30:.3g} GiB on {device}. Train with --cache memory "
            "or --cache no, or give smaller pictures."
        )
    width, height = pictures.sizes.max(axis=0).tolist()
    pixels = torch.zeros(len(pictures), 3, height, width, dtype=torch.uint8, device=device)
    bad: dict[int, str] = {}
    with ThreadPoolExecutor(threads) as pool:  # decoding releases the interpreter's lock
        for first in range(0, len(pictures), FILL):
            part = np.zeros((min(FILL, len(pictures) - first), 3, height, width), np.uint8)
            reasons = pool.map(lambda at: _fill(part[at], pictures, first + at), range(len(part)))  # noqa: B023
            bad |= {first + at: reason for at, reason in enumerate(reasons) if reason is not None}
            pixels[first : first + len(part)] = torch.from_numpy(part)
    return Held(pixels, pictures, bad)


def _fill(frame: np.ndarray, pictures: Pictures, index: int) -> str | None:
    """Puts a picture into its frame [3, H, W]; the reason where that cannot be."""
    try:
        picture = pictures.read(index)
    except BadImage as bad:
        return bad.reason
    height, width = picture.shape[:2]
    if (width, height) != tuple(pictures.sizes[index]):
        return f"is {width} x {height} now, was {pictures.sizes[index]}"
    frame[:, :height, :width] = picture.transpose(2, 0, 1)
    return None


def train_batches(
    held: Held,
    views: MultiCrop,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    clock_start: tuple[int, int] = (0, 0),
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    prefetch: int = 2,
) -> Iterator[Step]:
    """The steps of `data.loader.train_batches`, their batches on the device."""
    pictures = held.pictures
    course = Course(len(pictures), views.repeats, batch_size, seed, epochs, clock_start, rank, world)
    names = {index: pictures.names[index] for index in held.bad}
    make = Draws(pictures.sizes, held.bad, names, views, seed)
    for drawn in serve(make, course.jobs(), workers, prefetch, False):
        labels = None if pictures.labels is None else torch.from_numpy(pictures.labels[drawn.used.numpy()])
        batch = Batch(make_views(held.pixels, drawn.used, drawn.draws, views), labels)
        yield Step(drawn.epoch, drawn.step, batch, drawn.skipped)


class _Drawn(NamedTuple):
    """What a worker sends."""

    epoch: int
    step: int
    used: Tensor
    """[b] pictures."""
    draws: Tensor
    """[n, b, WIDTH], of all views."""
    skipped: list[Skipped]


class Draws:
    """Job -> _Drawn: a worker's part."""

    def __init__(
        self, sizes: np.ndarray, bad: dict[int, str], names: dict[int, str], views: MultiCrop, seed: int
    ) -> None:
        self.sizes, self.bad, self.names, self.views, self.seed = sizes, bad, names, views, seed

    def __call__(self, job: Job) -> _Drawn:
        rows: list[list[tuple[float, ...]]] = []
        asked = list(zip(job.indices.tolist(), job.copies.tolist(), strict=True))
        used = [(index, copy) for index, copy in asked if index not in self.bad]
        skipped = [Skipped(self.names[index], self.bad[index]) for index, _ in asked if index in self.bad]
        if not used:
            raise nothing_left(job, skipped)
        for index, copy in used:
            width, height = self.sizes[index].tolist()
            draws = self.views.draw(height, width, sample_rng(self.seed, job.epoch, index, copy))
            rows.append([to_row(draw) for draw in draws])
        pictures = torch.tensor([index for index, _ in used])
        return _Drawn(job.epoch, job.step, pictures, torch.tensor(rows).transpose(0, 1), skipped)


def make_views(pixels: Tensor, used: Tensor, draws: Tensor, views: MultiCrop) -> tuple[Tensor, ...]:
    """The stacks of a batch; some pictures at a time, since what is made on the way is many times a picture."""
    stacks = views.stacks
    there = send(used, pixels.device)
    parts = []
    most = max(1, AT_ONCE // (pixels[0].numel() + sum(3 * n * side**2 for n, side in stacks)))
    for some, own in zip(there.split(most), draws.split(most, dim=1), strict=True):
        images = pixels[some]
        split = own.split([n for n, _ in stacks])
        threshold = views.solarize_threshold
        parts.append([multi_crop(images, d, side, threshold) for d, (_, side) in zip(split, stacks, strict=True)])
    return tuple(torch.cat(stack, 1) for stack in zip(*parts, strict=True))
