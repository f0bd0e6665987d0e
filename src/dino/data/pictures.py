"""The contract that every source of images meets: names, labels, sizes, and `read(i)`, and nothing else.

Training, evaluation and embedding see `Pictures` only; a folder, the drawn scenes and a benchmark's files are
the same to them. A source reads in any process (it is pickled to the workers), and read(i) is a function of
i.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np


class Skipped(NamedTuple):
    """A picture that is not used, and why: listed by name in the run's report."""

    name: str
    reason: str


class BadImage(Exception):  # noqa: N818 - it is the image that is bad
    """This file holds no picture that can be used; `reason` says why in one line."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(str(path), reason)  # both are args, so that it survives pickling between processes
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Pictures(ABC):
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
        self.names = list(names)
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
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self.sizes.astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def content(self) -> str | None:
        """Equal only where every picture is the same, pixel by pixel: the key of what was computed of them. None
        where the source cannot tell, and nothing is kept."""
        return None

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Pictures":
        """These pictures alone, in this order, with the same classes."""
        return _Subset(self, np.asarray(indices, dtype=np.int64))

    def in_memory(self, threads: int = 2, progress: Callable[[int, int], None] | None = None) -> "Pictures":
        """The same pictures, each decoded once, now, into one block of `nbytes`. Forked workers share the
        block."""
        return _InMemory(self, threads, progress)

    def split(self, fraction: float, seed: int) -> tuple["Pictures", "Pictures"]:
        """(the rest, a held-back part), disjoint: round(fraction n) pictures of every class that has n, at
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


class _Subset(Pictures):
    def __init__(self, source: Pictures, indices: np.ndarray) -> None:
        super().__init__(
            names=[source.names[i] for i in indices],
            sizes=source.sizes[indices],
            labels=None if source.labels is None else source.labels[indices],
            classes=source.classes,
            skipped=source.skipped,
        )
        self.source, self.indices = source, indices

    @property
    def content(self) -> str | None:
        whole = self.source.content
        return whole and hashlib.sha256(whole.encode() + self.indices.tobytes()).hexdigest()[:16]

    def read(self, index: int) -> np.ndarray:
        return self.source.read(int(self.indices[index]))


class _InMemory(Pictures):
    def __init__(self, source: Pictures, threads: int, progress: Callable[[int, int], None] | None) -> None:
        super().__init__(
            names=source.names,
            sizes=source.sizes,
            labels=source.labels,
            classes=source.classes,
            skipped=source.skipped,
        )
        self.content_read = source.content
        self.starts = np.concatenate([[0], 3 * self.sizes.prod(axis=1).cumsum()])
        self.block = np.empty(self.starts[-1], dtype=np.uint8)
        self.bad: dict[int, BadImage] = {}
        with ThreadPoolExecutor(threads) as pool:  # decoding releases the interpreter's lock
            for done, _ in enumerate(pool.map(lambda index: self._fill(source, index), range(len(self))), 1):
                if progress is not None:
                    progress(done, len(self))

    @property
    def content(self) -> str | None:
        return self.content_read

    def _fill(self, source: Pictures, index: int) -> None:
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
