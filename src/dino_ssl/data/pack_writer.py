"""The files of a pack that is not whole yet: appended to, made to last every few seconds, and finished.

`progress.json` says how far the files reach for good. Whatever lies beyond is written again, at the same place, so that
it does not matter where a pack was stopped.
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_ssl.config import to_dict
from dino_ssl.data.dataset import Skipped, StoredNames, fingerprint
from dino_ssl.data.folder import class_level, labels_of
from dino_ssl.data.formats import SUFFIXES
from dino_ssl.data.listing import NAMES, STAMPS
from dino_ssl.data.pack import ARRAYS, About, Form, digest_of
from dino_ssl.errors import UserError
from dino_ssl.files import write_json

PROGRESS = "progress.json"
FILE_BYTES = 2**36
"""A data file ends before it is longer: 64 GiB, so that ten terabytes are 160 open files."""
SETTLE_SECONDS, SETTLE_RECORDS = 5.0, 50_000
"""How much work is lost at most where a pack is killed."""
BLOCK = 100_000
"""Names that are labelled at a time."""


class Kept(NamedTuple):
    """A picture as it is written."""

    end: int
    """Where it ends, all data files taken together."""
    opens: bool
    """Whether a new data file begins with it."""
    size: tuple[int, int]
    sum: int
    name: bytes


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How far a pack is, by what is on the disk for good."""

    form: Form
    seen: int = 0
    """Files of the listing that are done with."""
    kept: int = 0
    starts: tuple[int, ...] = (0,)
    """Where each data file begins, all taken together."""
    end: int = 0
    names: int = 0
    """Bytes of names."""
    skipped: int = 0
    """Bytes of the list of what was left out."""
    ignored: dict[str, int] = field(default_factory=dict)
    """How many files of the folder were left alone, as FolderPictures has it."""


class Writer:
    """Appends to the files of an unfinished pack. What `settle` has not reached is written again next time.

    All that an interrupt may leave half done lies in `new`, one entry a file of the listing.
    """

    def __init__(self, part: Path, reached: Reached) -> None:
        self.part, self.reached = part, reached
        self.new: list[Kept | Skipped] = []
        self.start, self.end = reached.starts[-1], reached.end
        self.data = self._open_data(len(reached.starts) - 1, self.end - self.start)
        self.settled_at = time.monotonic()

    @property
    def seen(self) -> int:
        return self.reached.seen + len(self.new)

    def _open_data(self, number: int, length: int = 0) -> int:
        """A data file, cut to `length`: of what a kill left beyond, not every picture may come again."""
        file = os.open(self.part / f"data-{number:05}", os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(file, length)
        return file

    def keep(self, name: str, data: bytes, size: tuple[int, int], sum: int) -> None:
        opens = self.end > self.start and self.end + len(data) - self.start > FILE_BYTES
        if opens:
            self.settle()
            before = self.data
            self.data, self.start = self._open_data(len(self.reached.starts)), self.end
            os.close(before)
        try:
            _write(self.data, data, self.end - self.start)
        except OSError:
            os.ftruncate(self.data, self.end - self.start)  # on a full disk that makes room to settle the others
            raise
        self.new.append(Kept(self.end + len(data), opens, size, sum, name.encode()))
        self.end += len(data)
        self._settle_sometimes()

    def skip(self, item: Skipped) -> None:
        self.new.append(item)
        self._settle_sometimes()

    def _settle_sometimes(self) -> None:
        if time.monotonic() - self.settled_at > SETTLE_SECONDS or len(self.new) >= SETTLE_RECORDS:
            self.settle()

    def settle(self, more_skipped: Iterable[Skipped] = ()) -> None:
        """Bring what is new to the disk, then say so. Twice is as good as once: every byte has its place."""
        before, new = self.reached, self.new
        kept = [item for item in new if isinstance(item, Kept)]
        skipped = [*more_skipped, *(item for item in new if isinstance(item, Skipped))]
        lines = "".join(json.dumps(item) + "\n" for item in skipped).encode()
        names = b"".join(item.name for item in kept)
        os.fsync(self.data)
        name_ends = np.cumsum([len(item.name) for item in kept], dtype=np.int64) + before.names
        self._put("ends", np.array([item.end for item in kept], "<i8"), before.kept + 1)  # the first begins at 0
        self._put("name_ends", name_ends.astype("<i8"), before.kept + 1)
        self._put("sizes", np.array([item.size for item in kept], "<i8"), 2 * before.kept)
        self._put("sums", np.array([item.sum for item in kept], "<u4"), before.kept)
        self._put("names", np.frombuffer(names, np.uint8), before.names)
        self._put("skipped", np.frombuffer(lines, np.uint8), before.skipped)
        ends = [before.end, *(item.end for item in kept)]
        reached = replace(
            before,
            seen=before.seen + len(new),
            kept=before.kept + len(kept),
            starts=before.starts + tuple(ends[i] for i, item in enumerate(kept) if item.opens),
            end=ends[-1],
            names=before.names + len(names),
            skipped=before.skipped + len(lines),
        )
        write_json(self.part / PROGRESS, to_dict(reached))
        self.reached, self.new, self.settled_at = reached, [], time.monotonic()

    def _put(self, name: str, values: np.ndarray, at: int) -> None:
        """The values from place `at` of an array on, and nothing behind them."""
        file = os.open(self.part / name, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            _write(file, values.tobytes(), at * values.itemsize)
            os.ftruncate(file, at * values.itemsize + values.nbytes)
            os.fsync(file)
        finally:
            os.close(file)

    def close(self) -> None:
        os.close(self.data)


def finish(part: Path, reached: Reached, source: Path) -> About:
    """Labels, digests and what pack.json says, once every file of the listing is done with."""
    if not reached.kept:
        lines = (part / "skipped").read_text().splitlines()[:5]
        shown = "".join(f"\n  {name}: {reason}" for name, reason in map(json.loads, lines))
        raise UserError(
            f"{source} holds no picture that can be used: expected files named {', '.join(sorted(SUFFIXES))}, at any "
            f"depth.{shown}"
        )
    lengths = np.diff([*reached.starts, reached.end]).tolist()
    names = StoredNames(np.memmap(part / "names", "u1", "r"), np.memmap(part / "name_ends", "<i8", "r"))
    level, classes = class_level(names)
    labels = _label(part / "labels", names, level, classes) if classes else None
    sizes = np.memmap(part / "sizes", "<i8", "r").reshape(-1, 2)
    index = [*ARRAYS, "names", "skipped", NAMES, STAMPS]
    digests = {name: digest_of(part / name) for name in sorted(index) if name != "labels" or classes}
    files = {f"data-{number:05}": length for number, length in enumerate(lengths)}
    return About(
        source=source.resolve().name,
        form=reached.form,
        dataset=reached.kept,
        classes=tuple(classes),
        fingerprint=fingerprint(names, sizes, labels),
        ignored=reached.ignored,
        files=files | {name: (part / name).stat().st_size for name in digests},
        digests=digests,
    )


def _label(file: Path, names: StoredNames, level: int, classes: list[str]) -> np.ndarray:
    with file.open("wb") as write:
        for at in range(0, len(names), BLOCK):
            write.write(labels_of(names[at : at + BLOCK], level, classes).astype("<i8").tobytes())
        write.flush()
        os.fsync(write.fileno())
    return np.memmap(file, "<i8", "r")


def _write(file: int, data: bytes, at: int) -> None:
    """All of it: the system may take less than it is given, on a disk that is nearly full."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, at)
        rest, at = rest[done:], at + done


def flush(folder: Path) -> None:
    """A folder's own entries, where the file system can."""
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
