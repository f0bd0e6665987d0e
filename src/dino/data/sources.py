"""Pictures by what a person names: a folder, the word `scenes`, settings, or `Pictures` themselves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dino.data.folder import Folder
from dino.data.pictures import Pictures
from dino.data.scenes import HERDS, Scenes
from dino.errors import UserError

PictureSource = str | Path | Folder | Scenes | Pictures
CLASS_FOLDERS = "Put the pictures of each class in a folder of its own: photos/cat/1.jpg, photos/dog/2.jpg, ..."
DRAWN = {"train": 2000, "val": 500, "test": 500}
"""How many pictures the words `scenes` and `herds` draw."""
WORDS = {"scenes": Scenes(), "herds": HERDS}


def open_pictures(
    source: PictureSource,
    progress: Callable[[int, int], None] | None = None,
    *,
    part: Literal["train", "val", "test"] = "train",
) -> Pictures:
    """The pictures of a source. `"scenes"` and `"herds"` draw 2000 of the part `train`, or 500 of another one."""
    if isinstance(source, Pictures):
        return source
    if str(source) in WORDS:
        source = replace(WORDS[str(source)], count=DRAWN[part], part=part)
    elif isinstance(source, str | Path):
        source = Folder(path=str(source))
    return source.open(progress)


def labelled_pair(
    train: PictureSource,
    val: PictureSource | None = None,
    *,
    held_back: float,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Pictures, Pictures]:
    """Pictures to learn from and pictures to be asked about, with one numbering of the classes.

    Without `val`, the share `held_back` of every class of `train` is asked about. Raises UserError where a side has
    no labels, `val` has classes that `train` lacks, or both are the same pictures: each would find itself.
    """
    known = open_pictures(train, progress)
    if known.labels is None:
        raise UserError(f"Accuracy needs labels, and {_named(train)} has none.\n{CLASS_FOLDERS}")
    if val is None:
        return known.split(held_back, seed)
    asked = open_pictures(val, progress, part="val")
    if asked.labels is None:
        raise UserError(f"Accuracy needs labels, and {_named(val)} has none.\n{CLASS_FOLDERS}")
    if asked.fingerprint == known.fingerprint and known.content is not None and asked.content == known.content:
        raise UserError(
            f"{_named(val)} has the pictures that are learned from: each would find itself.\n"
            "Leave it away, and a part of every class is held back and asked about; or name other pictures."
        )
    return known, relabelled(asked, known.classes)


def labelled_alone(pair: tuple[Pictures, Pictures], who: str) -> tuple[Pictures, Pictures]:
    """Of both sides the pictures that have a label. Raises UserError, in the name of `who`, where a side has none."""
    known, asked = (side.subset(np.flatnonzero(np.asarray(side.labels) >= 0)) for side in pair)
    for pictures, what in ((known, "to learn from"), (asked, "to be asked about")):
        if not len(pictures):
            raise UserError(f"{who} needs pictures {what}, and there are none with a label.")
    return known, asked


def relabelled(pictures: Pictures, classes: list[str]) -> Pictures:
    """The pictures with the numbers of these classes, matched by their names."""
    if pictures.classes == classes or pictures.labels is None:
        return pictures
    unknown = [name for name in pictures.classes if name not in classes]
    if unknown:
        raise UserError(
            f"The validation pictures have classes that the others lack: {', '.join(unknown[:8])}.\n"
            f"Training classes: {', '.join(classes[:12])}."
        )
    numbers = np.array([classes.index(name) for name in pictures.classes], dtype=np.int64)
    same = pictures.subset(np.arange(len(pictures)))
    same.labels = np.where(pictures.labels >= 0, numbers[np.maximum(pictures.labels, 0)], -1)
    same.classes = classes
    return same


def described(pictures: Pictures) -> dict[str, int | str]:
    """What a result's JSON says of the pictures."""
    return {
        "pictures": len(pictures),
        "classes": len(pictures.classes),
        "skipped": len(pictures.skipped),
        "fingerprint": pictures.fingerprint,
    }


def _named(source: PictureSource) -> str:
    return source.path if isinstance(source, Folder) else str(source) if isinstance(source, str | Path) else "the set"
