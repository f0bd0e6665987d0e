"""Any folder of pictures: nested or flat, with or without class folders; what is wrong in it is listed, not
fatal."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino_ssl.data.dataset import BadImage, ImageDataset, Reduction, Skipped
from dino_ssl.data.decode import decode, probe
from dino_ssl.data.formats import MAX_PIXELS, SUFFIXES
from dino_ssl.data.pack import is_pack, open_pack, unfinished
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of pictures on this machine, or a pack of one."""

    path: str
    """The folder. Every picture below it is used, at any depth; hidden files and other files are left
    alone. Or what `dino data pack` made of one."""

    def open(self, progress: Progress | None = None) -> ImageDataset:
        """Find the pictures and look at each one's header: (done, total) is told to `progress` on the way."""
        root = Path(self.path).expanduser()
        if is_pack(root) or unfinished(root):
            return open_pack(root)
        if not root.exists():
            raise UserError(f"no folder {self.path}: expected a folder of pictures. Check the path")
        if not root.is_dir():
            raise UserError(
                f"{self.path} is a file: expected a folder of pictures. Give the folder that holds it: {root.parent}"
            )
        skipped: list[Skipped] = []
        ignored: Counter[str] = Counter()
        found = sorted(walk(root, skipped, ignored), key=os.fsencode)
        with ThreadPoolExecutor(min(16, 4 + (os.cpu_count() or 1))) as pool:  # waiting for disks, mostly
            sizes: list[tuple[int, int]] = []
            files: list[str] = []
            for done, (file, result) in enumerate(zip(found, pool.map(_look, found), strict=True), 1):
                if isinstance(result, str):
                    skipped.append(Skipped(printable(file, root), result))
                else:
                    files.append(file)
                    sizes.append(result)
                if progress is not None:
                    progress(done, len(found))
        if not files:
            raise UserError(_nothing(self.path, skipped, ignored))
        return FolderDataset(root, files, sizes, sorted(skipped), ignored)


class FolderDataset(ImageDataset):
    """The pictures of a folder, sorted by name; a name is the path below the folder, with /.

    Labels: where every picture lies in one of two or more folders of the first level, that folder's name is
    its class. Where these are all called train, val, test or the like, the next level is taken, under the
    same condition.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        skipped: Sequence[Skipped],
        ignored: Counter[str],
    ) -> None:
        names = [printable(file, root) for file in files]
        labels, classes = class_folders(names)
        super().__init__(names=names, sizes=sizes, labels=labels, classes=classes, skipped=skipped)
        self.root = str(root)
        self.ignored = ignored
        """How many files were left alone: "hidden", and "other" for those that are not named like a
        picture."""
        # Only a name that is not UTF-8 differs from its file: a second list of a million paths would be
        # memory.
        self._unprintable = {i: f for i, f in enumerate(files) if os.path.join(root, names[i]) != f}

    def read(self, index: int) -> np.ndarray:
        return decode(self._file(index))

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        return decode(self._file(index), reduce=times)

    @property
    def content_key(self) -> str | None:
        """By each file's name, length and time of its last change; None where one is gone."""
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
    """(labels [N], classes) by the rule of FolderPictures; (None, []) where it finds no class folders."""
    level, classes = class_level(names)
    return (labels_of(names, level, classes) if classes else None), classes


def class_level(names: Iterable[str]) -> tuple[int, list[str]]:
    """(which part of the path is a picture's class, all classes); no classes where there are no class folders."""
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
    """[N] int64: the number of each picture's class."""
    number = {name: i for i, name in enumerate(classes)}
    return np.fromiter((number[name.split("/")[level]] for name in names), np.int64, len(names))


def printable(file: str, root: Path) -> str:
    """The path below root, with /; bytes that are no UTF-8 are spelled \\xNN, so that every output can hold
    it."""
    relative = os.path.relpath(file, root).replace(os.sep, "/")
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


def _look(file: str) -> tuple[int, int] | str:
    try:
        return probe(file)
    except BadImage as bad:
        return bad.reason


def walk(root: Path, skipped: list[Skipped], ignored: Counter[str]) -> Iterator[str]:
    """The files named like pictures, in no order. Folders that cannot be listed are added to `skipped`, and how many
    other files there are to `ignored`.

    Each real folder is entered once, however many links lead to it: a link back up is no loop. Links to
    folders wait until the real folders are done, so that a picture has the same name whether or not a link
    to it exists.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [str(root)], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        below: list[os.DirEntry[str]] = []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
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


def _nothing(path: str, skipped: Sequence[Skipped], ignored: Counter[str]) -> str:
    if not skipped:
        others = f" ({ignored.total()} other or hidden files are there)" if ignored.total() else ""
        return (
            f"no pictures in {path}{others}: expected files named {', '.join(sorted(SUFFIXES))}, at any "
            "depth. Give the folder that holds the pictures"
        )
    shown = "\n".join(f"  {name}: {reason}" for name, reason in sorted(skipped)[:5])
    more = f"\n  ... and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return (
        f"none of the {len(skipped)} files in {path} is a picture that can be used:\n{shown}{more}\n"
        f"Expected whole JPEG, PNG, WebP, BMP, GIF or TIFF files of at most {MAX_PIXELS} pixels. "
        "Copy them again"
    )
