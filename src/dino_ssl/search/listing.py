"""The images of a source with what reveals a change of them, listed without opening one."""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.adapters import kind_of
from dino_ssl.data.dataset import DatasetConfig, ImageDataset, Skipped
from dino_ssl.data.folder import Folder, FolderDataset, class_level, no_images, printable, walk
from dino_ssl.data.shards import ShardDataset, is_shards
from dino_ssl.data.sources import DatasetSource, dataset_config, open_dataset
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress
from dino_ssl.search.store import Labels
from dino_ssl.terminal import logger


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The n images of a source."""

    paths: pa.Array
    """[n] binary: unique names, as in the file system."""
    sizes: np.ndarray
    """[n] int64: bytes of each file; -1 if there are no files."""
    mtimes: np.ndarray
    """[n] int64: modification time in nanoseconds, or the checksum of an image in a shard; -1 if unknown."""
    open: Callable[[np.ndarray], ImageDataset]
    """Returns the images at these positions, whose headers need not be read."""
    labels: Labels
    """Returns the class names of images by their names; those of a folder depend on all names."""
    skipped: Sequence[Skipped] = ()
    """Files that a dataset has refused already."""
    content_key: str | None = None
    """Changes if images without files change; None if there are files."""


def list_images(source: DatasetSource, progress: Progress | None = None) -> Listing:
    """Return the images of a source. A folder is walked; other sources are opened."""
    if isinstance(source, str | Path | DatasetConfig):
        config = dataset_config(source, "train")
        if type(config) is Folder and not is_shards(config.folder):
            return _list_folder(config.folder, progress)
    return _list_dataset(open_dataset(source, progress))


def _list_folder(root: Path, progress: Progress | None) -> Listing:
    skipped: list[Skipped] = []
    files, sizes, mtimes = [], [], []
    for file in walk(root, skipped):
        try:
            status = os.stat(file)
        except OSError as error:  # a broken link, or removed in the meantime
            skipped.append(Skipped(printable(file, root), error.strerror or str(error)))
            continue
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            skipped.append(Skipped(printable(file, root), "not a regular file"))
            continue
        files.append(file)
        sizes.append(status.st_size)
        mtimes.append(status.st_mtime_ns)
        if progress is not None and len(files) % 1000 == 0:
            progress(len(files), 0)
    for name, reason in skipped:
        logger.warning("skipped: %s: %s", name, reason)
    if not files:
        raise no_images(root, skipped)
    prefix = len(os.path.join(root, ""))
    paths = os.fsencode("\0".join(file[prefix:] for file in files)).split(b"\0")  # names cannot contain \0

    def open_at(positions: np.ndarray) -> ImageDataset:
        chosen = [files[position] for position in positions]
        names = [printable(file[prefix:]) for file in chosen]
        return FolderDataset(root, chosen, names, np.zeros((len(chosen), 2)), None, (), ())

    def labels(names: Sequence[str]) -> list[str | None]:
        level, classes = class_level(names)
        return [name.split("/")[level] for name in names] if classes else [None] * len(names)

    return Listing(
        paths=pa.array(paths, pa.binary()),
        sizes=np.array(sizes, np.int64),
        mtimes=np.array(mtimes, np.int64),
        open=open_at,
        labels=labels,
        skipped=skipped,
    )


def _list_dataset(dataset: ImageDataset) -> Listing:
    unknown = np.full(len(dataset), -1, np.int64)
    sizes, mtimes, content_key = unknown, unknown, None
    if isinstance(dataset, ShardDataset):
        sizes, mtimes = (np.asarray(dataset.index[name], np.int64) for name in ("length", "crc32"))
    elif isinstance(dataset, FolderDataset):
        stats = [os.stat(dataset.path(index)) for index in range(len(dataset))]
        sizes, mtimes = (np.array([getattr(s, name) for s in stats], np.int64) for name in ("st_size", "st_mtime_ns"))
    else:
        content_key = dataset.content_key or dataset.fingerprint

    def labels(names: Sequence[str]) -> list[str | None]:
        if dataset.labels is None:
            return [None] * len(names)
        known = dict(zip(dataset.names, dataset.labels.tolist(), strict=True))
        return [dataset.classes[known[name]] if known[name] >= 0 else None for name in names]

    return Listing(
        paths=pa.array([os.fsencode(name) for name in dataset.names], pa.binary()),
        sizes=sizes,
        mtimes=mtimes,
        open=dataset.subset,
        labels=labels,
        skipped=dataset.skipped,
        content_key=content_key,
    )


def describe_source(source: DatasetSource) -> dict[str, Any]:
    """Return how index.json names a source: its folder, its settings, or only its type."""
    if isinstance(source, str | Path | DatasetConfig):
        config = dataset_config(source, "train")
        if type(config) is Folder:
            return {"folder": str(config.folder.resolve())}
        return {"dataset": to_dict(config)}
    return {"object": kind_of(source)}


def restore_source(description: dict[str, Any], trust: bool = False) -> DatasetSource:
    """Return the source that `describe_source` described. Raises UserError for a Python object."""
    if "folder" in description:
        return description["folder"]
    if "dataset" in description:
        return from_dict(DatasetConfig, description["dataset"], trust=trust)
    raise UserError(
        f"The images of this index were a Python object ({description['object']}): open it in Python, with "
        "Index(path, images=...)."
    )
