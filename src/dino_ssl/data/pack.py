"""A pack: the files of a folder's pictures one after the other in a few large files, with an index.

A folder `photos.ds` that `dino data pack` makes (packing.py). It gives the pictures that the folder gives, in the same
order, and any one of them by one read at a known place. Arrays are little-endian and are mapped, not loaded:

pack.json          version, settings, classes, and the length of every other file: the last file to be written
data-00000 ...     the pictures' files, one after the other; a picture lies in one data file
ends               [N + 1] int64: where each picture begins in the data files taken together; where the last one ends
sizes              [N, 2] int64: width and height once decoded
sums               [N] uint32: the CRC-32 of each picture's bytes
labels             [N] int64; absent where there are no class folders
names, name_ends   UTF-8, one after the other; [N + 1] int64
skipped            what was found and left out, a JSON line each
source.*           what was packed (listing.py), to tell whether the folder has changed since
"""

import json
import os
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from dino_ssl.config import from_dict
from dino_ssl.data.dataset import BadImage, ImageDataset, Reduction, Skipped, StoredNames
from dino_ssl.data.decode import decode
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import PART

VERSION = 1
ABOUT = "pack.json"
ARRAYS = {
    "ends": ("<i8", ()),
    "sizes": ("<i8", (2,)),
    "sums": ("<u4", ()),
    "labels": ("<i8", ()),
    "name_ends": ("<i8", ()),
}
"""Each array's type, and the shape of its rows."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the pictures are kept."""

    side: int | None = None
    """None: the files as they are. A number: larger pictures are made smaller, to this short side, and kept as JPEG."""
    quality: int = 95
    """JPEG quality of the pictures that are made smaller, 1 to 100."""

    def __post_init__(self) -> None:
        check_range(self, "side", least=1)
        check_range(self, "quality", least=1, most=100)


@dataclass(frozen=True, kw_only=True)
class About:
    """What pack.json says."""

    version: int = VERSION
    source: str = ""
    """The name of the folder that was packed."""
    form: Form = field(default_factory=Form)
    dataset: int = 0
    classes: tuple[str, ...] = ()
    fingerprint: str = ""
    """The folder's own, where its files are kept as they are."""
    ignored: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """The length of every file."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file but the data files, which have a sum for each picture."""

    @property
    def data(self) -> list[str]:
        return sorted(name for name in self.files if name.startswith("data-"))

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def is_pack(path: Path) -> bool:
    return (path / ABOUT).is_file()


def unfinished(path: Path) -> bool:
    """Whether a pack at `path` was begun, or `path` is such a beginning itself, and there is nothing else there."""
    return path.name.endswith(PART) or (not path.exists() and Path(f"{path}{PART}").exists())


def read_about(path: Path) -> About:
    """What the pack at `path` says of itself; its files are there, of the right length. Raises UserError."""
    if not is_pack(path):
        raise UserError(_no_pack(path))
    try:
        said = json.loads((path / ABOUT).read_text())
        if said["version"] != VERSION:
            raise UserError(
                f"{path} is a pack of version {said['version']}, and this dino reads version {VERSION}. Pack the "
                "folder again, or install the dino that made it."
            )
        about = from_dict(About, said)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / ABOUT} is damaged ({error}): copy it again, or pack the folder again.") from error
    for name, length in about.files.items():
        if Path(name).name != name:
            raise UserError(f"{path / ABOUT} names a file elsewhere, {name!r}: this is no pack that dino made.")
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != length:
            came = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{path / name} {came}, expected {length} bytes: copy the pack again, whole.")
    return about


def _no_pack(path: Path) -> str:
    if not path.exists():
        begun = Path(f"{path}{PART}")
        more = f" {begun} is one that was begun: the command that began it goes on with it." if begun.exists() else ""
        return f"There is no pack {path}.{more}"
    if path.name.endswith(PART):
        return f"{path} is a pack that is not finished: give the command that began it once more, it goes on."
    return f"{path} is no pack: expected what `dino data pack photos/ -o photos.ds` makes, a folder with {ABOUT}."


class PackedDataset(ImageDataset):
    """The pictures of a pack. In a worker process, or on another rank, it is opened by its path."""

    def __init__(self, path: Path) -> None:
        self.path, self.about = path, read_about(path)
        labelled = "labels" in self.about.files
        super().__init__(
            names=StoredNames(self._mapped("names", "u1", ()), self._array("name_ends")),
            sizes=self._array("sizes"),
            labels=self._array("labels") if labelled else None,
            classes=self.about.classes,
            skipped=_skipped(path),
        )
        self.ignored = Counter(self.about.ignored)
        self.ends, self.sums = self._array("ends"), self._array("sums")
        self.starts = np.cumsum([0, *(self.about.files[name] for name in self.about.data)])
        """Where each data file begins when they are taken together, and where the last one ends."""
        self.files = [os.open(path / name, os.O_RDONLY) for name in self.about.data]
        weakref.finalize(self, _close, self.files)

    def __reduce__(self) -> tuple:
        return open_pack, (self.path,)

    def _array(self, name: str) -> np.ndarray:
        return self._mapped(name, *ARRAYS[name])

    def _mapped(self, name: str, kind: str, row: tuple[int, ...]) -> np.ndarray:
        # "c": torch takes only what may be written; what is written stays in this process
        return np.asarray(np.memmap(self.path / name, kind, "c")).reshape(-1, *row)

    @property
    def fingerprint(self) -> str:
        return self.about.fingerprint

    @property
    def content_key(self) -> str:
        """By the length and sum of every picture's bytes."""
        return sha256(
            f"{self.fingerprint} {self.about.digests['ends']} {self.about.digests['sums']}".encode()
        ).hexdigest()[:16]

    def _place(self, index: int) -> tuple[int, int, int]:
        """(which data file, where in it, how many bytes)."""
        start, end = self.ends[index : index + 2].tolist()
        number = int(np.searchsorted(self.starts[:-1], start, "right")) - 1
        return number, start - int(self.starts[number]), end - start

    def encoded(self, index: int) -> bytes:
        """The bytes of picture `index`, as they were packed; raises BadImage where they are not any more."""
        number, start, length = self._place(index)
        if number < 0 or not 0 < length <= self.starts[number + 1] - self.starts[number] - start:
            raise BadImage(self.names[index], "damaged in the pack: the index names no place in the data files")
        try:
            data = os.pread(self.files[number], length, start)
        except OSError as error:
            raise BadImage(self.names[index], error.strerror or str(error)) from error
        if len(data) != length or zlib.crc32(data) != self.sums[index]:
            raise BadImage(self.names[index], f"damaged in the pack: wrong check sum in {self.about.data[number]}")
        return data

    def read(self, index: int) -> np.ndarray:
        return decode(self.names[index], self.encoded(index))

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        return decode(self.names[index], self.encoded(index), reduce=times)

    def prefetch(self, indices: np.ndarray) -> None:
        """Asks the system to fetch these while others are decoded, in the order in which they lie on the disk."""
        if hasattr(os, "posix_fadvise"):
            for index in np.sort(indices).tolist():
                number, start, length = self._place(index)
                with suppress(OSError, OverflowError):  # a damaged index: `encoded` says so
                    os.posix_fadvise(self.files[number], start, length, os.POSIX_FADV_WILLNEED)

    def damaged(self) -> Iterator[str | None]:
        """Reads everything once, from the front: for each picture None, or what is wrong with it; then for each file of
        the index."""
        for index in range(len(self)):
            try:
                self.encoded(index)
                yield None
            except BadImage as bad:
                yield str(bad)
        for name, digest in self.about.digests.items():
            yield (
                None
                if digest_of(self.path / name) == digest
                else f"{name}: the index is damaged: pack the folder again"
            )


def open_pack(path: Path) -> PackedDataset:
    """The pictures of the pack at `path`. Raises UserError where it is none, or not whole."""
    return PackedDataset(Path(path))


def digest_of(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as read:
        while block := read.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _skipped(path: Path) -> Sequence[Skipped]:
    with (path / "skipped").open() as lines:
        return sorted(Skipped(*json.loads(line)) for line in lines)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
