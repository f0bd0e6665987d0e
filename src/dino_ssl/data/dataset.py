"""Interfaces of datasets: `ImageDataset`, which every part of the package reads, and `DatasetConfig`, which opens one.

A dataset from outside the package is one file that defines a frozen dataclass derived from `DatasetConfig`, whose
`open` returns an `ImageDataset`. Other torch datasets and lists are wrapped by adapters.py.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from operator import eq
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from torch.utils.data import Dataset

from dino_ssl.errors import UserError
from dino_ssl.progress import Progress
from dino_ssl.terminal import logger


class Skipped(NamedTuple):
    """An image that is not used, with the reason; the run report lists them."""

    name: str
    reason: str


USED = "used, although it is damaged"
"""Reason of a damaged image that a dataset keeps."""


class BadImage(UserError):  # noqa: N818
    """Error of an image file that cannot be used; `reason` describes it in one line."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(str(path), reason)  # both as args, so that the error survives pickling between processes
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


Reduction = Literal[1, 2, 4, 8]
"""Factor by which a JPEG can be downscaled while it is decoded."""


class StoredNames(Sequence[str]):
    """Names in a memory-mapped Arrow column, decoded on access: 10^8 Python strings would take gigabytes.

    Args:
        column: Chunked array of UTF-8 text as `large_binary`.
        chosen: Indices of the names in this sequence; None for all.
    """

    def __init__(self, column: Any, chosen: np.ndarray | None = None) -> None:
        self.column, self.chosen = column, chosen

    def __len__(self) -> int:
        return len(self.column) if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        stored = range(len(self))[index]  # negative indices count from the end, others raise IndexError
        stored = stored if self.chosen is None else int(self.chosen[stored])
        return self.column[stored].as_py().decode("utf-8", "backslashreplace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def subset(self, indices: np.ndarray) -> "StoredNames":
        """Return the names at these indices."""
        return StoredNames(self.column, indices if self.chosen is None else self.chosen[indices])


class ImageDataset(Dataset[tuple[np.ndarray, int]], ABC):
    """N images in a fixed order, a map-style torch dataset of (uint8 RGB [H, W, 3], label or -1).

    Datasets are pickled to worker processes; `read(i)` depends on i only.

    Attributes:
        names: N unique strings, equal between runs; they identify the images in all outputs.
        sizes: [N, 2] int64, width and height of each image.
        labels: [N] int64, -1 for an unlabeled image; None if the dataset has no labels.
        classes: Name of each label; empty without labels.
        skipped: Images that are not used, with the reason.
        bit_depth: Bits of the values in files with 16 bits per value, 8 to 16; None if there are no such files.
        kept_damage: Damaged images that were read, until `read_or_none` takes them; None: they are refused.
    """

    bit_depth: int | None = None
    kept_damage: list[Skipped] | None = None

    def __init__(
        self,
        *,
        names: Sequence[str],
        sizes: np.ndarray | Sequence[tuple[int, int]],
        labels: np.ndarray | Sequence[int] | None = None,
        classes: Sequence[str] = (),
        skipped: Iterable[Skipped] = (),
    ) -> None:
        self.names: Sequence[str] = names if isinstance(names, StoredNames) else list(names)
        self.sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = list(classes)
        self.skipped = list(skipped)
        if len(self.sizes) != len(self.names):
            raise ValueError(f"{len(self.names)} names but {len(self.sizes)} sizes")
        if self.labels is not None and self.labels.shape != (len(self.names),):
            raise ValueError(f"{len(self.names)} names but labels of shape {self.labels.shape}")

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 RGB [height, width, 3]. Raises BadImage if it cannot be read."""

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        """Return image `index`, downscaled by up to this factor if that makes decoding faster."""
        return self.read(index)

    def encoded(self, index: int) -> bytes:
        """Return the bytes of an image's file; raise BadImage if there is none or it cannot be read."""
        raise BadImage(self.names[index], "the dataset has no image files")

    def on_damage(self, index: int) -> Callable[[str], None] | None:
        """Return what `decode` does with the warning about a damaged image."""
        if (kept := self.kept_damage) is None:
            return None
        return lambda reason: kept.append(Skipped(self.names[index], f"{USED}: {reason}"))

    def decoded_key(self, key: str) -> str | None:
        """Return the content key of files with this key, as they are decoded here."""
        return derived_key(key, f"{self.bit_depth}{'' if self.kept_damage is None else ' damaged'}".encode())

    def prefetch(self, indices: np.ndarray) -> None:
        """Start to fetch images from a slow disk that will be read next; does nothing by default."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = range(len(self))[index]
        return self.read(index), -1 if self.labels is None else int(self.labels[index])

    @property
    def short_side(self) -> int:
        """Median of the shorter sides in pixels, from which the plan chooses the crop sizes."""
        return int(np.median(self.sizes.min(axis=1))) if len(self) else 0

    @property
    def nbytes(self) -> int:
        """Memory of all decoded images in bytes."""
        return int(3 * self.sizes.prod(axis=1).sum())

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, sizes and labels; a run resumes only on a dataset with the same fingerprint."""
        return fingerprint(self.names, self.sizes, self.labels)

    @property
    def content_key(self) -> str | None:
        """Cache key of values computed from the pixels of all images; None if changed pixels cannot be detected."""
        return None

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """Return the images at these indices, in this order, with the same classes."""
        return _Subset(self, np.asarray(indices, dtype=np.int64))

    def with_bit_depth(self, bits: int | None) -> "ImageDataset":
        """Return the dataset read with another bit depth, that of a network or an index; None returns it unchanged."""
        if bits in (None, self.bit_depth):
            return self
        dataset, source = copy.copy(self), getattr(self, "source", None)
        if isinstance(source, ImageDataset):
            dataset.source = source.with_bit_depth(bits)  # type: ignore[attr-defined]
        elif self.bit_depth is not None:
            _warn_of_bit_depth(self.bit_depth, bits)
        dataset.bit_depth = bits
        return dataset

    def evenly_spaced(self, most: int) -> "ImageDataset":
        """Return at most this many images, evenly spaced."""
        if len(self) <= most:
            return self
        return self.subset(spaced_indices(len(self), most))

    def in_memory(self, threads: int = 2, progress: Progress | None = None) -> "ImageDataset":
        """Decode every image into one block of `nbytes`, shared by forked workers."""
        return _InMemory(self, threads, progress)

    def split(self, fraction: float, seed: int) -> tuple["ImageDataset", "ImageDataset"]:
        """Return a stratified random split (train, validation).

        The validation set holds round(fraction n) of the n images of each class, at least one if n > 1. Unlabeled
        images stay in the training set unless all images are unlabeled.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"expected a fraction in (0, 1), got {fraction}")
        groups = np.zeros(len(self), dtype=np.int64) if self.labels is None else self.labels
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        in_val = np.zeros(len(self), dtype=bool)
        labels = np.unique(groups)
        for label in labels[labels >= 0] if (labels >= 0).any() else labels:
            members = np.flatnonzero(groups == label)
            count = min(max(round(fraction * len(members)), 1), len(members) - 1)
            in_val[rng.permutation(members)[:count]] = True
        return self.subset(np.flatnonzero(~in_val)), self.subset(np.flatnonzero(in_val))


class DatasetConfig(ABC):
    """Settings of a dataset: a base of frozen dataclasses, which are saved in run.json."""

    @property
    def spec(self) -> str:
        """The name on the command line, apart from settings: a path, `scenes`, or MODULE:CLASS."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    @property
    def short_name(self) -> str:
        """The first part of the name of a run's folder."""
        return type(self).__name__.lower()

    @property
    def folder(self) -> Path | None:
        """The folder of the images; None if they are not files."""
        return None

    @property
    def bit_depth(self) -> int | None:
        """Bits of the values in files with 16 bits per value; None if it is not known."""
        return None

    @property
    def is_given(self) -> bool:
        """False if the user has to name a folder first."""
        return True

    @abstractmethod
    def open(self, progress: Progress | None = None) -> ImageDataset:
        """Return the dataset; `progress` receives (done, total) while images are listed."""


def spaced_indices(count: int, most: int) -> np.ndarray:
    """Return at most this many of the indices 0 .. count - 1, evenly spaced, with both ends: int64, ascending."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


def fingerprint(names: Iterable[str], sizes: np.ndarray, labels: np.ndarray | None) -> str:
    """Return 16 hex digits over names, sizes and labels."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for array in (sizes, labels):
        if array is not None:
            digest.update(np.ascontiguousarray(array, "<i8").reshape(-1).data)
    return digest.hexdigest()[:16]


def derived_key(key: str | None, data: bytes) -> str | None:
    """Return the content key of a dataset derived from one with `key` by parameters `data`; None if `key` is None."""
    return key and hashlib.sha256(key.encode() + data).hexdigest()[:16]


@lru_cache(16)  # once for each pair
def _warn_of_bit_depth(own: int, bits: int) -> None:
    logger.warning(
        f"Files with 16 bits per value are read as {bits} bits, as in training or in the index, but have {own} bits."
    )


class _Subset(ImageDataset):
    def __init__(self, source: ImageDataset, indices: np.ndarray) -> None:
        names = source.names
        super().__init__(
            names=names.subset(indices) if isinstance(names, StoredNames) else [names[int(i)] for i in indices],
            sizes=source.sizes[indices],
            labels=None if source.labels is None else source.labels[indices],
            classes=source.classes,
            skipped=source.skipped,
        )
        self.source, self.indices, self.bit_depth = source, indices, source.bit_depth
        self.kept_damage = source.kept_damage

    @property
    def content_key(self) -> str | None:
        return derived_key(self.source.content_key, self.indices.tobytes())

    def read(self, index: int) -> np.ndarray:
        return self.source.read(int(self.indices[index]))

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        return self.source.read_downscaled(int(self.indices[index]), times)

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(int(self.indices[index]))

    def prefetch(self, indices: np.ndarray) -> None:
        self.source.prefetch(self.indices[indices])


class _InMemory(ImageDataset):
    def __init__(self, source: ImageDataset, threads: int, progress: Progress | None) -> None:
        super().__init__(
            names=source.names, sizes=source.sizes, labels=source.labels, classes=source.classes, skipped=source.skipped
        )
        self._content_key, self.kept_damage = source.content_key, source.kept_damage
        self.starts = np.concatenate([[0], 3 * self.sizes.prod(axis=1).cumsum()])
        self.block = np.empty(self.starts[-1], dtype=np.uint8)
        self.bad: dict[int, BadImage] = {}
        with ThreadPoolExecutor(threads) as pool:  # decoding releases the GIL
            for done, _ in enumerate(pool.map(lambda index: self._fill(source, index), range(len(self))), 1):
                if progress is not None:
                    progress(done, len(self))

    @property
    def content_key(self) -> str | None:
        return self._content_key

    def _fill(self, source: ImageDataset, index: int) -> None:
        try:
            image = source.read(index)
            if image.shape[1::-1] != tuple(self.sizes[index]):
                raise BadImage(self.names[index], f"size is {image.shape[1::-1]} now, was {self.sizes[index]}")
            self._image(index)[:] = image
        except BadImage as bad:
            self.bad[index] = bad

    def _image(self, index: int) -> np.ndarray:
        width, height = self.sizes[index]
        return self.block[self.starts[index] : self.starts[index + 1]].reshape(height, width, 3)

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise self.bad[index]
        return self._image(index)
