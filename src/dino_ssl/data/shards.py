"""Images in tar shards, with random access through an index.

    shard-000000.tar ...   WebDataset's layout: KEY.jpg (or .png, ...), KEY.cls, KEY.json
    index.arrow            one row per image (shard_index.py)
    info.json              format version, settings, classes, skipped files; written last

`shard_writer.pack` writes such a directory. An index of tar files from another program is built when they are opened
for the first time.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.bit_depth import estimate_bit_depth, sample_for_bit_depth
from dino_ssl.data.dataset import BadImage, ImageDataset, Reduction, Skipped, StoredNames, fingerprint
from dino_ssl.data.decode import decode
from dino_ssl.data.image_header import SUFFIXES
from dino_ssl.data.shard_index import (
    FORMAT,
    INDEX,
    ImageRow,
    map_index,
    numbers,
    read_batches,
    scan_shard,
    sort_labels,
    write_index,
)
from dino_ssl.data.workers import map_in_order
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import PART, write_errors, write_json
from dino_ssl.progress import Progress

INFO = "info.json"
MAX_OPEN = 256
"""Shards that are open at a time: systems allow about 1,000 open files."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Settings of the images and shards that are written."""

    side: int | None = None
    """Images with a longer short side are downscaled to this short side, in pixels, and stored as JPEG. None: every
    file is stored unchanged."""
    quality: int = 95
    """JPEG quality of the downscaled images, 1 to 100."""
    shard_size: float = 256.0
    """Size at which a shard is complete, in MiB."""

    def __post_init__(self) -> None:
        check_range(self, "side", least=1)
        check_range(self, "quality", least=1, most=100)
        check_range(self, "shard_size", above=0)


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """The content of info.json."""

    format: int = FORMAT
    source: str = ""
    """Name of the folder that was packed."""
    settings: PackSettings | None = None
    """None: the shards are from another program."""
    images: int = 0
    classes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of each file that was not used."""
    source_key: str | None = None
    """Content key of the folder."""
    shards: dict[str, int] = field(default_factory=dict)
    """Length of each tar file in bytes; empty until all are written, like the fields below."""
    fingerprint: str = ""
    """Of the dataset; that of the folder if its files are stored unchanged."""
    index_sha256: str = ""


def is_shards(path: Path) -> bool:
    """Return True if `path` has tar files and neither images nor folders, or if its shards are being written."""
    if not path.is_dir():
        return Path(f"{path}{PART}").exists()
    names: list[str] = []
    with suppress(OSError):
        names = [name for name in os.listdir(path) if not name.startswith(".")]
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    return ".tar" in suffixes and not suffixes & SUFFIXES and not any((path / name).is_dir() for name in names)


def open_shards(
    path: Path, progress: Progress | None = None, bit_depth: int | None = None, *, keep_damaged: bool = False
) -> "ShardDataset":
    """Open a directory of tar shards; raise UserError if it is incomplete.

    If there is no index, it is built first and stored next to the shards, or in the user's cache directory if that is
    not writable. bit_depth: see `ShardDataset`. keep_damaged: see `Folder`.
    """
    if path.name.endswith(PART) or (not path.exists() and is_shards(path)):
        raise UserError(f"{path} is incomplete: run the `dino data pack` command that began it again. It resumes.")
    if not is_shards(path):
        raise UserError(f"{path} has no tar shards: expected a directory with *.tar files, as `dino data pack` writes.")
    directory = path if (path / INFO).exists() or os.access(path, os.W_OK) else _cache_directory(path)
    if not ((directory / INFO).exists() and _is_current(path, directory)):
        _build_index(path, directory, progress)
    return ShardDataset(path, directory, bit_depth, [] if keep_damaged else None)


def read_info(directory: Path) -> ShardInfo:
    """Return the content of info.json; raise UserError if it is damaged or of another version."""
    try:
        data = json.loads((directory / INFO).read_text())
        if data["format"] != FORMAT:
            raise UserError(
                f"{directory} has format version {data['format']}, expected {FORMAT}. Remove it and pack again."
            )
        return from_dict(ShardInfo, data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{directory / INFO} is damaged ({error}). Copy it again, or pack the folder again.") from error


class ShardDataset(ImageDataset):
    """The images of a directory of tar shards. Other processes open it by its path."""

    def __init__(
        self,
        path: Path,
        directory: Path | None = None,
        bit_depth: int | None = None,
        kept_damage: list[Skipped] | None = None,
    ) -> None:
        """Open the shards in `path` by the index in `directory`; raise UserError if a file is missing or damaged.

        bit_depth: estimated if it is None. kept_damage: see `ImageDataset`.
        """
        self.path, self.directory = path, directory or path
        self.kept_damage = kept_damage
        self.info = read_info(self.directory)
        self.shards = shards = list(self.info.shards)
        for name, length in self.info.shards.items():
            actual = (path / name).stat().st_size if (path / name).is_file() else "none"
            if actual != length:
                raise UserError(f"{path / name}: expected {length} bytes, got {actual}. Copy the shards again.")
        try:
            self.index = map_index(self.directory / INDEX)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.directory / INDEX} is damaged ({error}). Copy it again.") from error
        super().__init__(
            names=StoredNames(self.index["path"]),
            sizes=numbers(self.index["size"]),
            labels=numbers(self.index["label"]) if self.info.classes else None,
            classes=self.info.classes,
            skipped=[Skipped(*item) for item in self.info.skipped],
        )
        if self.labels is not None and not ((self.labels >= -1) & (self.labels < len(self.classes))).all():
            raise UserError(f"{self.directory}: a label of {INDEX} is none of the classes in {INFO}. Copy both again.")
        self._file = lru_cache(MAX_OPEN)(lambda shard: _File(path / shards[shard]))
        self.bit_depth = bit_depth or estimate_bit_depth(self._sample())

    def __reduce__(self) -> tuple:
        return ShardDataset, (self.path, self.directory, self.bit_depth, self.kept_damage)

    def _sample(self) -> Iterator[tuple[str, bytes]]:
        for index in sample_for_bit_depth(self.names):
            with suppress(BadImage):
                yield self.names[index], self.encoded(index)

    @property
    def fingerprint(self) -> str:
        """The fingerprint that was stored when the index was written."""
        return self.info.fingerprint

    @property
    def content_key(self) -> str | None:
        """A key of the length and checksum of every image, and of the bit depth."""
        return self.decoded_key(self.info.index_sha256[:16])

    def _location(self, index: int) -> tuple[int, int, int]:
        """Return (shard, offset, length) of an image; raise BadImage if the index is damaged there."""
        shard, offset, length = (self.index[name][index].as_py() for name in ("shard", "offset", "length"))
        if (
            not 0 <= shard < len(self.shards)
            or not 0 <= offset < offset + length <= self.info.shards[self.shards[shard]]
        ):
            raise BadImage(self.names[index], f"{INDEX} is damaged")
        return shard, offset, length

    def encoded(self, index: int) -> bytes:
        """Return the bytes of an image file; raise BadImage if they cannot be read or their checksum differs."""
        shard, offset, length = self._location(index)
        try:
            file = self._file(shard)  # keeps it open if another thread removes it from the cache
            data = os.pread(file.descriptor, length, offset)
        except OSError as error:
            raise BadImage(self.names[index], error.strerror or str(error)) from error
        if zlib.crc32(data) != self.index["crc32"][index].as_py():
            raise BadImage(self.names[index], f"wrong checksum in {self.shards[shard]}")
        return data

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 RGB [height, width, 3]; raise BadImage if it cannot be read."""
        return self.read_downscaled(index, 1)

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        """Return image `index`; a JPEG is downscaled by this factor while it is decoded."""
        return decode(
            self.names[index],
            self.encoded(index),
            reduce=times,
            bit_depth=self.bit_depth,
            on_damage=self.on_damage(index),
        )

    def prefetch(self, indices: np.ndarray) -> None:
        """Advise the system to read these images, in the order of their position on the disk."""
        for index in np.sort(indices).tolist() if hasattr(os, "posix_fadvise") else []:
            with suppress(OSError, BadImage):  # `encoded` reports it
                shard, offset, length = self._location(index)
                file = self._file(shard)
                os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def damaged(self) -> Iterator[str | None]:
        """Read everything once, in order. Yield None or the damage of the index, then of each image."""
        yield None if _sha256(self.directory / INDEX) == self.info.index_sha256 else f"{INDEX}: wrong checksum"
        for index in range(len(self)):
            try:
                self.encoded(index)
                yield None
            except BadImage as bad:
                yield str(bad)


class _File:
    """An open file, closed when it is no longer used; other threads may still read when it leaves the cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def write_info(directory: Path, shards: Path, info: ShardInfo) -> None:
    """Write info.json for the index in `directory`, with all tar files of `shards`, the fingerprint and the digest."""
    file = directory / INDEX
    sizes, labels = (
        np.concatenate([numbers(batch[name]) for batch in read_batches(file)]) for name in ("size", "label")
    )
    names = (name for batch in read_batches(file) for name in batch["path"].to_pylist())
    info = replace(
        info,
        images=len(sizes),
        shards={tar.name: tar.stat().st_size for tar in tar_files(shards)},
        fingerprint=fingerprint(names, sizes, labels if info.classes else None),
        index_sha256=_sha256(file),
    )
    write_json(directory / INFO, to_dict(info))


def tar_files(path: Path) -> list[Path]:
    """Return the tar files in a directory, sorted by name."""
    return sorted(tar for tar in path.glob("*.tar") if not tar.name.startswith("."))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- shards of other programs --------------------------------------------------------------------------------


def _build_index(path: Path, directory: Path, progress: Progress | None) -> None:
    """Scan all shards in `path` and write their index into `directory`."""
    tars, skipped = tar_files(path), []

    def shards() -> Iterator[list[ImageRow]]:
        for done, (rows, bad) in enumerate(map_in_order(scan_shard, tars, threads=4), 1):
            skipped.extend(bad)
            if progress is not None:
                progress(done, len(tars))
            yield rows

    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    labels: dict[str, int] = {}
    write_index(directory, shards(), labels)
    classes = sort_labels(directory, labels)
    if not any(map(len, read_batches(directory / INDEX))):
        examples = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:5])
        raise UserError(f"No usable images in the shards of {path}: expected members KEY.jpg, KEY.png, ....{examples}")
    info = ShardInfo(source=path.resolve().name, classes=tuple(classes), skipped=tuple(sorted(skipped)))
    write_info(directory, path, info)


def _is_current(path: Path, directory: Path) -> bool:
    """Return True if the index is of the shards in `path`, by their names, lengths and modification times.

    Raises UserError for packed shards of another version; an index of other shards is built again.
    """
    with suppress(OSError, ValueError, AttributeError):  # reported by `read_info`
        content = json.loads((directory / INFO).read_text())
        if content.get("settings") is None and content.get("format") != FORMAT:
            return False
    info, status = read_info(directory), {tar.name: tar.stat() for tar in tar_files(path)}
    if info.settings is not None:
        return True  # ShardDataset raises if a file is missing
    newest = max((item.st_mtime_ns for item in status.values()), default=0)
    lengths = {name: item.st_size for name, item in status.items()}
    return lengths == info.shards and newest <= (directory / INFO).stat().st_mtime_ns


def _cache_directory(path: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dino-ssl" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
