"""What lies in a folder, written down: each picture file's name, length and time, sorted, in files on the disk.

Memory does not grow with the number of pictures: names are sorted in runs of a million that lie on the disk, then
merged. Two listings are equal exactly where nothing was added, taken away or changed.
"""

import heapq
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dino_ssl.data.dataset import Skipped
from dino_ssl.data.folder import walk
from dino_ssl.progress import Progress

NAMES, STAMPS = "source.names", "source.stamps"
"""Paths below the folder, each ended by a zero byte; [N, 2] int64, the length and the time of the last change."""
RUN = 1_000_000
"""Names that are sorted in memory at a time."""
CHUNK = 4096
GONE = (-1, -1)
"""The stamp of what is listed but cannot be looked at, such as a link that leads nowhere."""


class Listed(NamedTuple):
    """One file: its path below the folder, and what it was when it was listed."""

    name: bytes
    stamp: tuple[int, int]
    """(length, nanoseconds of the last change)."""


class Listing:
    """The listing in a folder of files; iterating reads them, in order."""

    def __init__(self, folder: Path) -> None:
        self.names, self.stamps = folder / NAMES, folder / STAMPS

    def __len__(self) -> int:
        return self.stamps.stat().st_size // 16

    def __iter__(self) -> Iterator[Listed]:
        with self.names.open("rb") as names, self.stamps.open("rb") as stamps:
            each = _split(names)
            while raw := stamps.read(16 * CHUNK):
                for stamp in np.frombuffer(raw, "<i8").reshape(-1, 2).tolist():
                    yield Listed(next(each), tuple(stamp))

    def take(self, root: Path, progress: Progress | None = None) -> tuple[list[Skipped], Counter[str]]:
        """List the folder `root` here. Gives the folders that cannot be listed, and how many other files there are."""
        skipped: list[Skipped] = []
        ignored: Counter[str] = Counter()
        found = (os.fsencode(os.path.relpath(file, root)) for file in walk(root, skipped, ignored))
        self.names.parent.mkdir(parents=True, exist_ok=True)
        threads = min(16, 4 + (os.cpu_count() or 1))  # waiting for disks, mostly
        with (
            ThreadPoolExecutor(threads) as pool,
            self.names.open("wb") as names,
            self.stamps.open("wb") as stamps,
        ):
            ordered, done = _sorted(_told(found, progress), self.names.parent), 0
            while chunk := list(islice(ordered, CHUNK)):
                names.write(b"".join(name + b"\0" for name in chunk))
                here = (os.path.join(os.fsencode(root), name) for name in chunk)
                stamps.write(np.array(list(pool.map(stamp_of, here)), "<i8").tobytes())
                done += len(chunk)
                if progress is not None:
                    progress(done, 0)
            for file in (names, stamps):
                file.flush()
                os.fsync(file.fileno())
        return sorted(skipped), ignored


def stamp_of(path: bytes) -> tuple[int, int]:
    """(length, nanoseconds of the last change); GONE where it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns


def differences(before: Listing, now: Listing) -> Iterator[tuple[bytes, str]]:
    """(name, what happened to it): added, gone or changed; in order, none where the listings are equal."""
    old, new = iter(before), iter(now)
    a, b = next(old, None), next(new, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a.name < b.name):
            assert a is not None
            yield a.name, "gone"
            a = next(old, None)
        elif a is None or b.name < a.name:
            yield b.name, "added"
            b = next(new, None)
        else:
            if a.stamp != b.stamp:
                yield a.name, "changed"
            a, b = next(old, None), next(new, None)


def _told(names: Iterator[bytes], progress: Progress | None) -> Iterator[bytes]:
    for done, name in enumerate(names, 1):
        if progress is not None and done % CHUNK == 0:
            progress(done, 0)
        yield name


def _sorted(names: Iterator[bytes], scratch: Path) -> Iterator[bytes]:
    """The names in order of their bytes, as `Folder` has its pictures; `scratch` holds runs of them meanwhile."""
    runs: list[BinaryIO] = []
    try:
        while run := sorted(islice(names, RUN)):
            file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed below, all together
            runs.append(file)
            file.write(b"".join(name + b"\0" for name in run))
            file.seek(0)
        yield from heapq.merge(*map(_split, runs))
    finally:
        for file in runs:
            file.close()


def _split(file: BinaryIO) -> Iterator[bytes]:
    """What stands between the zero bytes of a file."""
    rest = b""
    while block := file.read(1 << 20):
        *whole, rest = (rest + block).split(b"\0")
        yield from whole
