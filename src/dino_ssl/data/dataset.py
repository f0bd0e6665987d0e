"""The contract that every source of images meets: names, labels, sizes, and `read(i)`, and nothing else.

Training, evaluation and embedding see `ImageDataset` only; a folder, the drawn scenes and a benchmark's files are
the same to them. A source reads in any process (it is pickled to the workers), and read(i) is a function of
i.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import eq
from typing import Literal, NamedTuple, overload

import numpy as np

from dino_ssl.errors import UserError


class Skipped(NamedTuple):
    """A picture that is not used, and why: listed by name in the run's report."""

    name: str
    reason: str


class BadImage(UserError):  # noqa: N818
    """Error of an image file that cannot be used; `reason` describes it in one line."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(str(path), reason)  # both as args, so that the error survives pickling between processes
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


Reduction = Literal[1, 2, 4, 8]
"""How many times smaller a JPEG can be decoded."""


class StoredNames(Sequence[str]):
    """Names in one block of text, made into strings as they are asked for: a hundred million strings are gigabytes."""

    def __init__(self, text: np.ndarray, ends: np.ndarray, chosen: np.ndarray | None = None) -> None:
        self.text, self.ends, self.chosen = text, ends, chosen
        """uint8, all names in a row; [N + 1], where each begins and the last one ends; which of them these are."""

    def __len__(self) -> int:
        return len(self.ends) - 1 if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        place = range(len(self))[index]  # negative ones count from the end, others raise IndexError
        place = place if self.chosen is None else int(self.chosen[place])
        return self.text[self.ends[place] : self.ends[place + 1]].tobytes().decode("utf-8", "backslashreplace")

    def __iter__(self) -> Iterator[str]:
        if self.chosen is not None:
            yield from map(self.__getitem__, range(len(self)))
            return
        for at in range(0, len(self), 4096):  # five times as fast as one by one
            ends = self.ends[at : at + 4097]
            text = self.text[ends[0] : ends[-1]].tobytes()
            for start, end in pairwise((ends - ends[0]).tolist()):
                yield text[start:end].decode("utf-8", "backslashreplace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def subset(self, indices: np.ndarray) -> "StoredNames":
        return StoredNames(self.text, self.ends, indices if self.chosen is None else self.chosen[indices])


class ImageDataset(ABC):
    """N pictures in a fixed order.

    names    N unique strings, stable between runs: the key of a picture in every output
    labels   [N] int64, -1 where a picture has none; None where the source has no labels at all
    classes  the label's name by its number; empty without labels
    sizes    [N, 2] int64: width and height as read(i) gives them
    skipped  what was found and left out, with the reason
    """

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
        """Picture `index` as uint8 [height, width, 3] RGB; raises BadImage where it cannot be read."""

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        """Picture `index` as `read` gives it, or up to so many times smaller in each direction where that is faster."""
        return self.read(index)

    def prefetch(self, indices: np.ndarray) -> None:  # noqa: B027 - most sources need nothing
        """These will be read next: a source on a slow disk may begin to fetch them."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def short_side(self) -> int:
        """The median of the pictures' shorter sides, in pixels: the plan chooses the crops' sizes by it."""
        return int(np.median(self.sizes.min(axis=1))) if len(self) else 0

    @property
    def nbytes(self) -> int:
        """The memory that all pictures take once decoded."""
        return int(3 * self.sizes.prod(axis=1).sum())

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, sizes and labels: equal where the same pictures come in the same
        order."""
        return fingerprint(self.names, self.sizes, self.labels)

    @property
    def content_key(self) -> str | None:
        """Equal only where every picture is the same, pixel by pixel: the key of what was computed of them. None
        where the source cannot tell, and nothing is kept."""
        return None

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """These pictures alone, in this order, with the same classes."""
        return _Subset(self, np.asarray(indices, dtype=np.int64))

    def in_memory(self, threads: int = 2, progress: Callable[[int, int], None] | None = None) -> "ImageDataset":
        """The same pictures, each decoded once, now, into one block of `nbytes`. Forked workers share the
        block."""
        return _InMemory(self, threads, progress)

    def split(self, fraction: float, seed: int) -> tuple["ImageDataset", "ImageDataset"]:
        """(the rest, a val-fraction part), disjoint: round(fraction n) pictures of every class that has n, at
        least
        one where n > 1. Pictures without a label are never held back unless no picture has one."""
        if not 0 < fraction < 1:
            raise ValueError(f"a fraction in (0, 1) is held back, got {fraction}")
        groups = np.zeros(len(self), dtype=np.int64) if self.labels is None else self.labels
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        held = np.zeros(len(self), dtype=bool)
        kinds = np.unique(groups)
        for kind in kinds[kinds >= 0] if (kinds >= 0).any() else kinds:
            members = np.flatnonzero(groups == kind)
            count = min(max(round(fraction * len(members)), 1), len(members) - 1)
            held[rng.permutation(members)[:count]] = True
        return self.subset(np.flatnonzero(~held)), self.subset(np.flatnonzero(held))


def fingerprint(names: Iterable[str], sizes: np.ndarray, labels: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for numbers in (sizes, labels):
        if numbers is not None:
            digest.update(np.ascontiguousarray(numbers, "<i8").reshape(-1).data)
    return digest.hexdigest()[:16]


class _Subset(ImageDataset):
    def __init__(self, source: ImageDataset, indices: np.ndarray) -> None:
        super().__init__(
            names=_chosen(source.names, indices),
            sizes=source.sizes[indices],
            labels=None if source.labels is None else source.labels[indices],
            classes=source.classes,
            skipped=source.skipped,
        )
        self.source, self.indices = source, indices

    @property
    def content_key(self) -> str | None:
        whole = self.source.content_key
        return whole and hashlib.sha256(whole.encode() + self.indices.tobytes()).hexdigest()[:16]

    def read(self, index: int) -> np.ndarray:
        return self.source.read(int(self.indices[index]))

    def read_downscaled(self, index: int, times: Reduction) -> np.ndarray:
        return self.source.read_downscaled(int(self.indices[index]), times)

    def prefetch(self, indices: np.ndarray) -> None:
        self.source.prefetch(self.indices[indices])


def _chosen(names: Sequence[str], indices: np.ndarray) -> Sequence[str]:
    return names.subset(indices) if isinstance(names, StoredNames) else [names[int(i)] for i in indices]


class _InMemory(ImageDataset):
    def __init__(self, source: ImageDataset, threads: int, progress: Callable[[int, int], None] | None) -> None:
        super().__init__(
            names=source.names,
            sizes=source.sizes,
            labels=source.labels,
            classes=source.classes,
            skipped=source.skipped,
        )
        self.content_read = source.content_key
        self.starts = np.concatenate([[0], 3 * self.sizes.prod(axis=1).cumsum()])
        self.block = np.empty(self.starts[-1], dtype=np.uint8)
        self.bad: dict[int, BadImage] = {}
        with ThreadPoolExecutor(threads) as pool:  # decoding releases the interpreter's lock
            for done, _ in enumerate(pool.map(lambda index: self._fill(source, index), range(len(self))), 1):
                if progress is not None:
                    progress(done, len(self))

    @property
    def content_key(self) -> str | None:
        return self.content_read

    def _fill(self, source: ImageDataset, index: int) -> None:
        try:
            picture = source.read(index)
            if picture.shape[1::-1] != tuple(self.sizes[index]):
                raise BadImage(self.names[index], f"is {picture.shape[1::-1]} now, was {self.sizes[index]}")
            self._cell(index)[:] = picture
        except BadImage as bad:
            self.bad[index] = bad

    def _cell(self, index: int) -> np.ndarray:
        width, height = self.sizes[index]
        return self.block[self.starts[index] : self.starts[index + 1]].reshape(height, width, 3)

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise self.bad[index]
        return self._cell(index)
