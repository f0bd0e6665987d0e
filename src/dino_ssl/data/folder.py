"""Folders of images, nested or flat, with or without class folders. Unusable files are listed, not fatal."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino_ssl.data.dataset import BadImage, DatasetConfig, ImageDataset, Reduction, Skipped
from dino_ssl.data.decode import MAX_PIXELS, SUFFIXES, decode, probe
from dino_ssl.data.shard_index import map_in_order
from dino_ssl.data.shards import is_shards, open_shards
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


@dataclass(frozen=True, kw_only=True)
class Folder(DatasetConfig):
    """A folder of images, or a directory of tar shards."""

    path: str
    """The folder; every image below it is used, except hidden files. Or a directory of tar shards in WebDataset layout,
    as `dino data pack` writes."""

    @property
    def spec(self) -> str:
        """The path."""
        return self.path

    @property
    def short_name(self) -> str:
        """The name of the folder."""
        return Path(self.path).resolve().name

    @property
    def folder(self) -> Path:
        """The path, with the home directory for `~`."""
        return Path(self.path).expanduser()

    @property
    def is_given(self) -> bool:
        """False if the path is empty, as in presets."""
        return bool(self.path)

    def open(self, progress: Progress | None = None) -> ImageDataset:
        """List the images and read their headers; `progress` receives (done, total)."""
        root = self.folder
        if is_shards(root):
            return open_shards(root, progress)
        if not root.exists():
            raise UserError(f"There is no folder {self.path}. Check the path.")
        if not root.is_dir():
            raise UserError(
                f"Expected a folder of images, got the file {self.path}. Did you mean its folder, {root.parent}/?"
            )
        skipped: list[Skipped] = []
        ignored: Counter[str] = Counter()
        paths = sorted(walk(root, skipped, ignored), key=os.fsencode)
        files, sizes, bad = probe_files(paths, progress)
        skipped += (Skipped(printable(path, root), reason) for path, reason in bad)
        if not files:
            raise UserError(_no_images(self.path, skipped, ignored))
        names = [printable(file, root) for file in files]
        labels, classes = class_folders(names)
        return FolderDataset(root, files, names, sizes, labels, classes, sorted(skipped), ignored)


def probe_files(
    paths: Sequence[str], progress: Progress | None = None
) -> tuple[list[str], list[tuple[int, int]], list[Skipped]]:
    """Read the headers of image files; return (usable files, their sizes (width, height), unusable files)."""
    files: list[str] = []
    sizes: list[tuple[int, int]] = []
    bad: list[Skipped] = []
    threads = min(16, 4 + (os.cpu_count() or 1))  # they mostly wait for disks
    for done, (path, result) in enumerate(zip(paths, map_in_order(_probe, paths, threads, 1000), strict=True), 1):
        if isinstance(result, str):
            bad.append(Skipped(path, result))
        else:
            files.append(path)
            sizes.append(result)
        if progress is not None:
            progress(done, len(paths))
    return files, sizes, bad


def _probe(path: str) -> tuple[int, int] | str:
    try:
        return probe(path)
    except BadImage as bad:
        return bad.reason


class FolderDataset(ImageDataset):
    """Image files; `ignored` counts the files of the folder that are "hidden", or are not images ("other")."""

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        names: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        labels: np.ndarray | None,
        classes: Sequence[str],
        skipped: Sequence[Skipped],
        ignored: Counter[str],
    ) -> None:
        super().__init__(names=names, sizes=sizes, labels=labels, classes=classes, skipped=skipped)
        self.root, self.ignored = str(root), ignored
        # Only names that are not UTF-8 differ from root/name; a second list of a million paths would take memory.
        self._unprintable = {i: f for i, f in enumerate(files) if os.path.join(root, names[i]) != f}

    def encoded(self, index: int) -> bytes:
        """Return the content of the file of image `index`."""
        try:
            return Path(self._file(index)).read_bytes()
        except OSError as error:
            raise BadImage(self.names[index], error.strerror or str(error)) from error

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 RGB [height, width, 3]."""
        return decode(self._file(index))

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        """Return image `index`; a JPEG is downscaled by this factor while it is decoded."""
        return decode(self._file(index), reduce=times)

    @property
    def content_key(self) -> str | None:
        """Key over the size and modification time of each file; None if a file is missing."""
        digest = hashlib.sha256(self.fingerprint.encode())
        try:
            for index in range(len(self)):
                status = os.stat(self._file(index))
                digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        except OSError:
            return None
        return digest.hexdigest()[:16]

    def _file(self, index: int) -> str:
        return self._unprintable.get(index) or os.path.join(self.root, self.names[index])


def class_folders(names: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """Return (labels [N], classes) of names like `cat/1.jpg`; (None, []) without class folders.

    If every image is in one of two or more first-level folders, that folder is its class. If these folders are all
    called train, val, test or similar, the second level is used under the same condition.
    """
    level, classes = class_level(names)
    return (labels_of(names, level, classes) if classes else None), classes


def class_level(names: Iterable[str]) -> tuple[int, list[str]]:
    """Return (level of the class folder in the path, all classes); no classes without class folders."""
    first: set[str] = set()
    second: set[str] = set()
    in_splits = True
    for name in names:
        parts = name.split("/")
        if len(parts) < 2:
            return 0, []
        in_splits = in_splits and len(parts) > 2 and parts[0].lower() in SPLITS
        first.add(parts[0])
        if in_splits:
            second.add(parts[1])
    classes = sorted(second if in_splits else first)
    if len(classes) < 2 or SPLITS.issuperset(c.lower() for c in classes):
        return 0, []
    return int(in_splits), classes


def labels_of(names: Sequence[str], level: int, classes: Sequence[str]) -> np.ndarray:
    """Return the label of each image, [N] int64."""
    label = {name: i for i, name in enumerate(classes)}
    return np.fromiter((label[name.split("/")[level]] for name in names), np.int64, len(names))


def printable(file: str, root: Path) -> str:
    r"""Return the path below root with `/`; bytes that are not UTF-8 become \xNN, so that every output can hold it."""
    relative = os.path.relpath(file, root).replace(os.sep, "/")
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


def walk(root: Path, skipped: list[Skipped], ignored: Counter[str]) -> Iterator[str]:
    """Yield the image files below root in no defined order, by their suffixes.

    Adds folders that cannot be listed to `skipped` and counts other files in `ignored`. Each real folder is entered
    once, so links to a parent do not loop. Links to folders are followed last, so that the name of an image does not
    depend on links to it.
    """
    visited: set[tuple[int, int]] = set()
    folders, links = [str(root)], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        below: list[os.DirEntry[str]] = []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            for entry in _entries(folder):
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    ignored["hidden"] += 1
                elif entry.is_dir():
                    below.append(entry)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    yield entry.path
                else:
                    ignored["other"] += 1
        except OSError as error:
            skipped.append(Skipped(printable(folder, root), f"the folder cannot be listed: {error.strerror}"))
        for entry in sorted(below, key=lambda entry: entry.name):
            (links if entry.is_symlink() else folders).append(entry.path)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _no_images(path: str, skipped: Sequence[Skipped], ignored: Counter[str]) -> str:
    if not skipped:
        others = f" It has {ignored.total()} other or hidden files." if ignored.total() else ""
        return (
            f"There are no images in {path}.{others} Expected files named {', '.join(sorted(SUFFIXES))}, at any depth."
        )
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in sorted(skipped)[:5])
    more = f"\n  ... and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return (
        f"None of the {len(skipped)} files in {path} is a usable image:\n{reasons}{more}\n"
        f"Expected complete JPEG, PNG, WebP, BMP, GIF or TIFF files of at most {MAX_PIXELS} pixels."
    )
