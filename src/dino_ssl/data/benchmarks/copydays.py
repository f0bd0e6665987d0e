"""Copy detection (Table 4): the Copydays files, or distorted copies of other images."""

import hashlib
import os
import re
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.transforms import distortions
from dino_ssl.errors import UserError
from dino_ssl.terminal import logger

BLOCKS = ("strong", "crops", "jpeg")  # distortions that are scored separately; the paper reports strong
_EXPECTED = """Expected:
  copydays/
    original/            200000.jpg, 200100.jpg, ...: the names end with 00
    crops/10/ .. 80/     200001.jpg, ...: the first four digits name the original
    jpeg/3/ .. 75/       or jpegqual/
    strong/"""
_FOLDER = re.compile(r"(?:copydays[_-])?(original|crop|jpeg|strong)(?:s|qual)?", re.IGNORECASE)
_BLOCK = {"crop": "crops"}  # name of a folder or distortion -> name of its block, if different


class Copies(NamedTuple):
    """Copy-detection benchmark: each copy is a query for its original."""

    originals: ImageDataset
    copies: ImageDataset
    original_of: np.ndarray  # [Q]: index of the original of each copy
    blocks: list[tuple[str, str]]  # (block, strength or kind within it) of each copy, e.g. ("crops", "50")
    others: ImageDataset | None  # distractors that belong to the benchmark


def find_copies(dataset: ImageDataset) -> Copies | None:
    """Return the benchmark in a folder of the layout of Copydays; None for another layout."""
    images = [(i, PurePosixPath(name).stem, _block_of(name)) for i, name in enumerate(dataset.names)]
    others = {os.path.dirname(dataset.names[i]) or "." for i, _, block in images if not block}
    images = [(i, stem, block) for i, stem, block in images if block]
    if not any(re.fullmatch(r"\d{6}", stem) for _, stem, _ in images):
        return None
    if others:
        logger.warning(f"Copydays: ignored the images in {', '.join(sorted(others))}. {_EXPECTED}")
    originals = {stem[:4]: i for i, stem, (block, _) in images if block == "original"}
    position = {group: n for n, group in enumerate(originals)}
    copies = [(i, stem[:4], block) for i, stem, block in images if block[0] != "original"]
    patterns = {"original": r"\d{4}00"}
    wrong = [i for i, stem, (block, _) in images if not re.fullmatch(patterns.get(block, r"\d{6}"), stem)]
    if wrong := wrong or [i for i, group, _ in copies if group not in originals]:
        examples = ", ".join(dataset.names[i] for i in wrong[:3])
        raise UserError(
            f"{len(wrong)} images have no name of six digits, or no original that starts with the same four and ends "
            f"with 00, for example {examples}. {_EXPECTED}"
        )
    if not copies or len(originals) + len(copies) < len(images):
        raise UserError(f"Found {len(copies)} copies, or originals with the same first four digits. {_EXPECTED}")
    return Copies(
        dataset.subset(list(originals.values())),
        dataset.subset([i for i, _, _ in copies]),
        np.array([position[group] for _, group, _ in copies]),
        [block for _, _, block in copies],
        None,
    )


def _block_of(name: str) -> tuple[str, str] | None:
    """Return ("crops", "50") for crops/50/200003.jpg; None if no folder of the path is one of Copydays."""
    folders = name.split("/")[:-1]
    for depth, folder in enumerate(folders):
        if match := _FOLDER.fullmatch(folder):
            kind = match[1].lower()
            return _BLOCK.get(kind, kind), "/".join(folders[depth + 1 :])
    return None


def make_copies(dataset: ImageDataset, originals: int, seed: int = 0) -> Copies:
    """Return distorted copies of randomly chosen images, with the other images as distractors.

    A tenth of the other images, at most as many as originals, are backgrounds into which copies are pasted; these are
    not part of the searched database.
    """
    if len(dataset) < 4:
        raise UserError(f"Distorted copies need a dataset of at least 4 images; got {len(dataset)}.")
    order = np.random.default_rng([seed, len(dataset)]).permutation(len(dataset))
    count = min(originals, len(dataset) // 2)
    pages = min(count, max(1, (len(dataset) - count) // 10))
    chosen, into, others = (dataset.subset(part) for part in np.split(order, [count, count + pages]))
    return distort(chosen, into, others, seed)


def distort(originals: ImageDataset, pages: ImageDataset, others: ImageDataset | None, seed: int = 0) -> Copies:
    """Return the benchmark of every distortion of every original; `pages` are the backgrounds of pasted copies."""
    copies = DistortedCopies(originals, pages, seed)
    kinds = [kind.split("_") for _, kind in copies.items]
    blocks = [(_BLOCK.get(kind, kind), strength) for kind, strength in kinds]
    return Copies(originals, copies, np.array([i for i, _ in copies.items]), blocks, others)


class DistortedCopies(ImageDataset):
    """Copies made by `distortions.copies` when they are read, a function of (seed, original)."""

    def __init__(self, originals: ImageDataset, pages: ImageDataset, seed: int) -> None:
        blank = np.zeros((8, 8, 3), np.uint8)
        kinds = list(distortions.copies(blank, np.random.default_rng(0), into=blank))
        self.items = [(i, kind) for i in range(len(originals)) for kind in kinds]
        self.originals, self.pages, self.seed = originals, pages, seed
        names = [f"{originals.names[i]}#{kind}" for i, kind in self.items]
        super().__init__(names=names, sizes=[self._size(i, kind) for i, kind in self.items])
        self._last: tuple[int, dict[str, np.ndarray]] = (-1, {})  # copies of one original are read consecutively

    @property
    def content_key(self) -> str | None:
        """Key over the images and the distortions."""
        keys = (self.originals.content_key, self.pages.content_key)
        return self._digest(*keys, distortions.VERSION) if all(keys) else None

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the images and the seed."""
        return self._digest(super().fingerprint, self.originals.fingerprint, self.pages.fingerprint)

    def _digest(self, *parts: object) -> str:
        return hashlib.sha256(repr((self.seed, *parts)).encode()).hexdigest()[:16]

    def _size(self, original: int, kind: str) -> tuple[int, int]:
        width, height = self.originals.sizes[original].tolist()
        if kind == "strong_paste":
            width, height = self.pages.sizes[original % len(self.pages)].tolist()
        elif kind.startswith("crop_"):
            height, width = distortions.cropped(height, width, int(kind.removeprefix("crop_")) / 100)
        return width, height

    def read(self, index: int) -> np.ndarray:
        """Return copy `index`, uint8 RGB [height, width, 3]."""
        original, kind = self.items[index]
        if self._last[0] != original:
            rng = np.random.default_rng([self.seed, original])
            page = self.pages.read(original % len(self.pages))
            self._last = (original, distortions.copies(self.originals.read(original), rng, into=page))
        return self._last[1][kind]
