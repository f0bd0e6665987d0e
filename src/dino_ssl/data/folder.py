"""Folders of images, nested or flat, with or without class folders. Unusable files are listed, not fatal."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dino_ssl.data.bit_depth import estimate_bit_depth, sample_for_bit_depth
from dino_ssl.data.dataset import BadImage, DatasetConfig, ImageDataset, Reduction, Skipped
from dino_ssl.data.decode import decode
from dino_ssl.data.image_header import MAX_PIXELS, SUFFIXES, probe
from dino_ssl.data.shards import is_shards, open_shards
from dino_ssl.data.workers import map_in_order
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import IS_OUTPUT, is_output
from dino_ssl.formatting import visible
from dino_ssl.progress import Progress
from dino_ssl.terminal import logger

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


@dataclass(frozen=True, kw_only=True)
class Folder(DatasetConfig):
    """A folder of images, or a directory of tar shards."""

    path: str
    """The folder; every image below it is used, except hidden files. Or a directory of tar shards in WebDataset layout,
    as `dino data pack` writes."""
    bit_depth: int | None = None
    """Bits of the values in images with 16 bits per value, 8 to 16: 2^bits - 1 is white. None: estimated from a sample
    of the dataset. A validation set is read with that of the training set."""

    keep_damaged: bool = False
    """Use damaged JPEGs that can be decoded in part, and list them in skipped.jsonl. Default: they are skipped, since
    most of their pixels may be wrong."""

    def __post_init__(self) -> None:
        check_range(self, "bit_depth", least=8, most=16, prefix="data.")

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
            return open_shards(root, progress, self.bit_depth, keep_damaged=self.keep_damaged)
        skipped: list[Skipped] = []
        paths = list(walk(root, skipped))
        images = list(readable_images(paths, partial(printable, root=root), skipped, progress, len(paths)))
        if not images:
            raise no_images(root, skipped)
        files, names, sizes = zip(*images, strict=True)
        labels, classes = class_folders(names)
        dataset = FolderDataset(root, files, names, sizes, labels, classes, sorted(skipped), self.bit_depth)
        dataset.kept_damage = [] if self.keep_damaged else None
        return dataset


def readable_images(
    paths: Iterable[str],
    name: Callable[[str], str],
    skipped: list[Skipped],
    progress: Progress | None = None,
    total: int = 0,
) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yield (path, name, (width, height)) of the images by their headers, in order; add other files to `skipped`."""
    threads = min(16, 4 + (os.cpu_count() or 1))  # they mostly wait for disks
    for done, (path, result) in enumerate(map_in_order(_probe, paths, threads, chunk=25), 1):
        if isinstance(result, str):
            skipped.append(Skipped(name(path), result))
        else:
            yield path, name(path), result
        if progress is not None:
            progress(done, total)


def _probe(path: str) -> tuple[str, tuple[int, int] | str]:
    try:
        return path, probe(path)
    except BadImage as bad:
        return path, bad.reason


class FolderDataset(ImageDataset):
    """Image files."""

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        names: Sequence[str],
        sizes: np.ndarray | Sequence[tuple[int, int]],
        labels: np.ndarray | None,
        classes: Sequence[str],
        skipped: Sequence[Skipped],
        bit_depth: int | None = None,
    ) -> None:
        super().__init__(names=names, sizes=sizes, labels=labels, classes=classes, skipped=skipped)
        self.root = str(root)
        # Only names that are not UTF-8 differ from root/name; a second list of a million paths would take memory.
        self._unprintable = {i: f for i, f in enumerate(files) if os.path.join(root, names[i]) != f}
        sample = ((self.path(index), None) for index in sample_for_bit_depth(names))
        self.bit_depth = bit_depth or estimate_bit_depth(sample)

    def encoded(self, index: int) -> bytes:
        """Return the content of the file of image `index`."""
        return read_bytes(self.path(index))

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 RGB [height, width, 3]."""
        return self.read_downscaled(index, 1)

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        """Return image `index`; a JPEG is downscaled by this factor while it is decoded."""
        return decode(self.path(index), reduce=times, bit_depth=self.bit_depth, on_damage=self.on_damage(index))

    @property
    def content_key(self) -> str | None:
        """Key over the size and modification time of each file; None if a file is missing."""
        digest = hashlib.sha256(self.fingerprint.encode())
        try:
            for index in range(len(self)):
                status = os.stat(self.path(index))
                digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        except OSError:
            return None
        return self.decoded_key(digest.hexdigest()[:16])

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        return self._unprintable.get(index) or os.path.join(self.root, self.names[index])


def read_bytes(path: str) -> bytes:
    """Return the content of a file; raise BadImage if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error


def class_folders(names: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """Return (labels [N], classes) of names like `cat/1.jpg`; (None, []) without class folders.

    If every image is in one of two or more first-level folders, that folder is its class. If these folders are all
    called train, val, test or similar, the second level is used under the same condition.
    """
    level, classes = class_level(names)
    label = {name: i for i, name in enumerate(classes)}
    return (np.array([label[name.split("/")[level]] for name in names]) if classes else None), classes


def class_level(names: Iterable[str]) -> tuple[int, list[str]]:
    """Return (level of the class folder in the path, all classes); no classes without class folders."""
    levels: tuple[set[str], set[str]] = set(), set()
    depth = 2  # of the shallowest image
    for name in names:
        folders = name.split("/")[:-1][:depth]
        depth = len(folders)
        for level, folder in zip(levels, folders, strict=False):
            level.add(folder)
    level = int(depth == 2 and SPLITS.issuperset(map(str.lower, levels[0])))
    classes = sorted(levels[level])
    is_split = SPLITS.issuperset(map(str.lower, classes))
    return (0, []) if depth == 0 or len(classes) < 2 or is_split else (level, classes)


def printable(file: str, root: Path | None = None) -> str:
    r"""Return a path (below root) with `/`; bytes that are not UTF-8, and control characters, become \xNN.

    So every output can hold it, and a name cannot change the terminal.
    """
    path = file if root is None else os.path.relpath(file, root).replace(os.sep, "/")
    return visible(os.fsencode(path).decode("utf-8", "backslashreplace"))


def walk(root: Path, skipped: list[Skipped] | None = None) -> Iterator[str]:
    """Yield the image files below root by their suffixes, sorted by path, and add unreadable folders to `skipped`.

    Raises UserError if root is not a folder, or an output of dino. Hidden files and folders are ignored, and outputs
    of dino, which are logged unless `skipped` is None. Each real folder is entered once: a link to a folder is followed
    unless its target is listed anyway, so the name of an image does not depend on links. Memory is that of the names in
    one folder at a time.
    """
    if not root.is_dir():
        parent = f"Expected a folder of images, got the file {root}. Did you mean its folder, {root.parent}/?"
        raise UserError(parent if root.exists() else f"There is no folder {root}. Check the path.")
    listed, visited, outputs, others = [Path(os.path.realpath(root))], set(), [], Counter[str]()

    def below(folder: str) -> Iterator[str]:
        names: list[bytes] = []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) not in visited:
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(os.fsencode(folder)) as entries:  # folders end with a /: they sort as their files do
                    names = sorted(e.name + b"/" * _is_folder(e) for e in entries)
        except OSError as error:
            if skipped is not None:
                skipped.append(Skipped(printable(folder, root), f"the folder cannot be listed: {error.strerror}"))
        if is_output(names):
            outputs.append(printable(folder, root))
            return
        prefix = os.path.join(folder, "")
        for entry in os.fsdecode(b"\0".join(names)).split("\0"):  # one call for all: names cannot contain \0
            name = entry.removesuffix("/")
            if not name or _is_hidden(name):
                continue
            path = prefix + name
            if name == entry:
                stem, dot, suffix = name.rpartition(".")
                suffix = dot + suffix.lower() if stem else ""
                if suffix in SUFFIXES:
                    yield path
                else:
                    others[suffix] += 1
            elif not os.path.islink(path):
                yield from below(path)
            elif not _is_below(target := Path(os.path.realpath(path)), listed):
                listed.append(target)
                yield from below(path)

    yield from below(str(root))
    if "." in outputs:
        raise UserError(IS_OUTPUT.format(root))
    if others and skipped is not None:
        counts = [f"{count:,} {visible(suffix) or 'without suffix'}" for suffix, count in others.most_common(5)]
        more = ", ..." * (len(others) > 5)
        logger.info(f"Ignored files in {root} that are no images by their names: {', '.join(counts)}{more}.")
    if outputs and skipped is not None:
        logger.info(
            f"Skipped folders in {root} that dino wrote: {', '.join(outputs[:3])}{', ...' * (len(outputs) > 3)}"
        )


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Return True for a folder or a link to one; False for a link to itself, for which `is_dir` raises."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_below(target: Path, folders: Iterable[Path]) -> bool:
    """Return True if the files in `target` are listed as those of one of `folders`."""
    parts = [target.relative_to(folder).parts for folder in folders if target.is_relative_to(folder)]
    return any(not any(map(_is_hidden, path)) for path in parts)


def no_images(root: Path, skipped: Sequence[Skipped]) -> UserError:
    """Return the error of a folder without usable images."""
    if not skipped:
        number = sum(len(files) for *_, files in os.walk(root))
        others = f" It has {number} other or hidden files." if number else ""
        return UserError(
            f"There are no images in {root}.{others} Expected files named {', '.join(sorted(SUFFIXES))}, at any depth."
        )
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in sorted(skipped)[:5])
    more = f"\n  ... and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return UserError(
        f"None of the {len(skipped)} files in {root} is a usable image:\n{reasons}{more}\n"
        f"Expected complete JPEG, PNG, WebP, AVIF, HEIC, BMP, GIF or TIFF files of at most {MAX_PIXELS} pixels."
    )
