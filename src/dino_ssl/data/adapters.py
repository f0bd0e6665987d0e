"""Adapters that make an `ImageDataset` of another torch dataset, or of a list of paths, PIL images or arrays."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dino_ssl.data.dataset import BadImage, DatasetConfig, ImageDataset, Skipped, fingerprint
from dino_ssl.data.folder import FolderDataset, printable, readable_images
from dino_ssl.errors import UserError
from dino_ssl.preprocessing import to_rgb
from dino_ssl.progress import Progress


class Indexable(Protocol):
    """Map-style dataset, e.g. a `torch.utils.data.Dataset` or a list, whose items are images or (image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def open_paths(paths: Sequence[str | os.PathLike[str]], progress: Progress | None = None) -> ImageDataset:
    """Return the image files at these paths, in this order, unlabeled; the names are the paths."""
    names = [os.fspath(path) for path in paths]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"The list of paths contains {repeated[0]} more than once; expected unique paths.")
    skipped: list[Skipped] = []
    images = list(readable_images(names, printable, skipped, progress, len(names)))
    if not images:
        several = f"None of the {len(names)} paths is a usable image: " if len(names) > 1 else ""
        raise UserError(f"{several}{skipped[0].name}: {skipped[0].reason}")
    files, names, sizes = zip(*images, strict=True)
    return FolderDataset("", files, names, sizes, None, (), skipped)


class AdaptedDataset(ImageDataset):
    """Map-style dataset as an `ImageDataset`.

    An item is an image or a tuple (image, label, ...). An image is a PIL image, a uint8 array [H, W, 3] or a uint8
    tensor [3, H, W]; one channel is accepted as well. Labels that are not integers are ignored. The attribute
    `classes` of the dataset, if any, names the labels.

    Every item is read once when the dataset is opened, for the sizes, the labels and the fingerprint. The fingerprint
    covers the type of the dataset, its length, sizes, labels and all pixels. A run therefore resumes only if the items
    are the same each time: leave random transforms to `views`.
    """

    def __init__(self, source: Indexable, progress: Progress | None = None) -> None:
        count = len(source)
        sizes, labels = np.empty((count, 2), np.int64), np.full(count, -1, np.int64)
        digest = hashlib.sha256(f"{kind_of(source)} {count}".encode())
        for index in range(count):
            image, label = _split_item(source[index], index)
            sizes[index] = image.shape[1::-1]
            labels[index] = label
            digest.update(image.data)
            if progress is not None:
                progress(index + 1, count)
        if not count:
            raise UserError("The dataset is empty; expected at least one image.")
        names = [f"{index:0{len(str(count - 1))}d}" for index in range(count)]
        labeled = bool((labels >= 0).any())
        classes = [str(name) for name in getattr(source, "classes", ())] or [str(i) for i in range(labels.max() + 1)]
        if labeled and labels.max() >= len(classes):
            raise UserError(f"The dataset has {len(classes)} classes, but an item with the label {labels.max()}.")
        super().__init__(
            names=names, sizes=sizes, labels=labels if labeled else None, classes=classes if labeled else ()
        )
        digest.update(fingerprint(names, sizes, labels).encode())
        self.source, self._fingerprint = source, digest.hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over type, length, sizes, labels and all pixels."""
        return self._fingerprint

    @property
    def content_key(self) -> str:
        """The fingerprint, since it covers all pixels."""
        return self._fingerprint

    def read(self, index: int) -> np.ndarray:
        """Return item `index` as uint8 RGB [H, W, 3]. Raises BadImage if the dataset cannot read it."""
        try:
            return _split_item(self.source[index], index)[0]
        except OSError as error:
            raise BadImage(self.names[index], str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ExternalDataset(DatasetConfig):
    """Record in run.json of a dataset that was passed as a Python object."""

    kind: str
    """Type of the dataset."""
    length: int
    """Number of images."""
    fingerprint: str
    """Fingerprint of the dataset, compared on resume."""
    bit_depth: int | None = None
    """Of images with 16 bits per value in a list of files."""

    def open(self, progress: Progress | None = None) -> ImageDataset:
        """Raise UserError: a Python object cannot be opened from its record."""
        raise UserError(
            f"The dataset of this run was a Python object ({self.kind}, {self.length} images), which run.json cannot "
            "restore. Pass the same dataset again to resume."
        )


def kind_of(source: object) -> str:
    """Return the qualified name of the type of a dataset, e.g. `torchvision.datasets.cifar.CIFAR10`."""
    kind = type(source)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _split_item(item: Any, index: int) -> tuple[np.ndarray, int]:
    image, label = (item[0], item[1]) if isinstance(item, tuple) else (item, -1)
    pixels = to_rgb(image, f"Item {index} of the dataset", " (or a tuple of one and its label)")
    try:
        return pixels, int(label)
    except (TypeError, ValueError):  # e.g. the boxes or the mask of an image
        return pixels, -1
