"""Copies and their originals (Table 4): Copydays' own files, or edited copies of any pictures."""

import hashlib
import re
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.transforms import distortions
from dino_ssl.errors import UserError

LAYOUT = """\
  copydays/
    original/            200000.jpg, 200100.jpg, ...: they end with 00
    crops/10/ .. 80/     200001.jpg, ...: the first four digits say which original
    jpeg/3/ .. 75/
    strong/"""

BLOCKS = ("strong", "crops", "jpeg")
"""Kinds of edits that are scored each for itself; the paper reports strong."""
_KIND = re.compile(r"(?:copydays[_-])?(original|crop|jpeg|strong)s?", re.IGNORECASE)
_NAME = re.compile(r"\d{6}")
_OFFICIAL = re.compile(r"2[01]\d{4}")  # 200000 to 215699: other sets have names of six digits too
_BLOCK = {"crop": "crops"}  # a folder's or an edit's name -> the block's, where they differ


_EXPECTED = f"Expected:\n{LAYOUT}"


class Copies(NamedTuple):
    """Originals to be found, and copies to find them by."""

    name: str
    originals: ImageDataset
    copies: ImageDataset
    original_of: np.ndarray  # [Q]: the number of the original of each copy
    blocks: list[tuple[str, str]]  # Q times the block and the strength or kind within it: ("crops", "50")
    others: ImageDataset | None  # pictures that nobody looks for, besides those that a person gives


def find_copies(dataset: ImageDataset) -> Copies | None:
    """The benchmark that a folder laid out like Copydays holds; None where it is not laid out so.

    All in one folder will do as well: then names that end with 00 are the originals, and one block holds the rest.
    """
    stems = [PurePosixPath(name).stem for name in dataset.names]
    kinds = [_kind(name) for name in dataset.names]
    if not any(kinds) and all(map(_OFFICIAL.fullmatch, stems)) and any(stem.endswith("00") for stem in stems):
        kinds = [("original" if stem.endswith("00") else "copies", "") for stem in stems]
    kind_of = {i: kind for i, kind in enumerate(kinds) if kind}
    originals = [i for i, (block, _) in kind_of.items() if block == "original"]
    copies = [i for i, (block, _) in kind_of.items() if block != "original"]
    if not originals or not copies:
        if any(_NAME.fullmatch(stems[i]) for i in kind_of):
            raise UserError(f"Found {len(originals)} originals and {len(copies)} copies. {_EXPECTED}")
        return None
    if wrong := [dataset.names[i] for i in kind_of if not _NAME.fullmatch(stems[i])]:
        raise UserError(f"{wrong[0]} is not named by six digits, as Copydays' pictures are. {_EXPECTED}")
    if wrong := [dataset.names[i] for i in originals if not stems[i].endswith("00")]:
        raise UserError(f"{wrong[0]} lies among the originals, whose names end with 00. {_EXPECTED}")
    number = {stems[i][:4]: place for place, i in enumerate(originals)}  # the first four digits are the group
    if len(number) < len(originals):
        raise UserError(f"Two originals share their first four digits. {_EXPECTED}")
    if wrong := [dataset.names[i] for i in copies if stems[i][:4] not in number]:
        raise UserError(f"{len(wrong)} copies have no original: {', '.join(wrong[:3])}, ... {_EXPECTED}")
    original_of = np.array([number[stems[i][:4]] for i in copies], dtype=np.int64)
    blocks = [kind_of[i] for i in copies]
    return Copies("copydays", dataset.subset(originals), dataset.subset(copies), original_of, blocks, None)


def _kind(name: str) -> tuple[str, str] | None:
    """crops/50/200003.jpg -> ("crops", "50"); None where no folder of the name is one of Copydays'."""
    folders = name.split("/")[:-1]
    for depth, folder in enumerate(folders):
        if found := _KIND.fullmatch(folder):
            kind = found[1].lower()
            return _BLOCK.get(kind, kind), "/".join(folders[depth + 1 :])
    return None


def make_copies(dataset: ImageDataset, originals: int, seed: int = 0) -> Copies:
    """Edited copies of some of the pictures, drawn by the seed; the others are what they must be told from.

    A tenth of the others, at most as many as there are originals, is what copies are pasted into, and is not searched.
    """
    if len(dataset) < 4:
        raise UserError(f"Edited copies need at least 4 pictures to choose from; got {len(dataset)}.")
    order = np.random.default_rng([seed, len(dataset)]).permutation(len(dataset))
    count = min(originals, len(dataset) // 2)
    pages = min(count, max(1, (len(dataset) - count) // 10))
    chosen, into, rest = np.split(order, [count, count + pages])
    return edited(dataset.subset(chosen), dataset.subset(into), dataset.subset(rest), seed)


def edited(originals: ImageDataset, pages: ImageDataset, others: ImageDataset | None, seed: int = 0) -> Copies:
    """Every edit of every original."""
    copies = EditedCopies(originals, pages, seed)
    kinds = [edit.split("_") for _, edit in copies.items]
    blocks = [(_BLOCK.get(kind, kind), strength) for kind, strength in kinds]
    return Copies("edited", originals, copies, np.array([i for i, _ in copies.items]), blocks, others)


class EditedCopies(ImageDataset):
    """Copies of originals by `edits.copies`, made when they are read: a function of (seed, original) alone."""

    def __init__(self, originals: ImageDataset, pages: ImageDataset, seed: int) -> None:
        blank = np.zeros((8, 8, 3), np.uint8)
        kinds = list(distortions.copies(blank, np.random.default_rng(0), into=blank))
        self.items = [(i, kind) for i in range(len(originals)) for kind in kinds]
        self.originals, self.pages, self.seed = originals, pages, seed
        names = [f"{originals.names[i]}#{kind}" for i, kind in self.items]
        super().__init__(names=names, sizes=[self._size(i, kind) for i, kind in self.items])
        self._last: tuple[int, dict[str, np.ndarray]] = (-1, {})  # copies of one original are read one after the other

    @property
    def content_key(self) -> str | None:
        """By the pictures, and by what this version of the package makes of one."""
        parts = (self.originals.content_key, self.pages.content_key)
        return self._digest(*parts, *_sample()) if all(parts) else None

    @property
    def fingerprint(self) -> str:
        return self._digest(super().fingerprint, self.originals.fingerprint, self.pages.fingerprint)

    def _digest(self, *parts: object) -> str:
        return hashlib.sha256(repr((self.seed, *parts)).encode()).hexdigest()[:16]

    def _page(self, original: int) -> int:
        return original % len(self.pages)

    def _size(self, original: int, kind: str) -> tuple[int, int]:
        width, height = self.originals.sizes[original].tolist()
        if kind == "strong_paste":
            width, height = self.pages.sizes[self._page(original)].tolist()
        elif kind.startswith("crop_"):
            height, width = distortions.cropped(height, width, int(kind.removeprefix("crop_")) / 100)
        return width, height

    def read(self, index: int) -> np.ndarray:
        original, kind = self.items[index]
        if self._last[0] != original:
            rng = np.random.default_rng([self.seed, original])
            page = self.pages.read(self._page(original))
            self._last = (original, distortions.copies(self.originals.read(original), rng, into=page))
        return self._last[1][kind]


def _sample() -> list[str]:
    """What the edits make of a small picture: another edit, another text."""
    wave = (127 + 120 * np.sin(np.arange(48 * 32 * 3) / 7)).astype(np.uint8).reshape(48, 32, 3)
    made = distortions.copies(wave, np.random.default_rng(0), into=wave[::-1].copy())
    return [f"{kind} {hashlib.sha256(image.tobytes()).hexdigest()}" for kind, image in made.items()]
