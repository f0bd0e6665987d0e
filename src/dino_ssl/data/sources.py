"""Pictures by what a person names: a folder, the word `scenes`, settings, or `ImageDataset` themselves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import HERDS, Scenes
from dino_ssl.errors import UserError

DatasetSource = str | Path | Folder | Scenes | ImageDataset
CLASS_FOLDERS = "Put the pictures of each class in a folder of its own: photos/cat/1.jpg, photos/dog/2.jpg, ..."
DRAWN = {"train": 2000, "val": 500, "test": 500}
"""How many pictures the words `scenes` and `herds` draw."""
WORDS = {"scenes": Scenes(), "herds": HERDS}


def open_dataset(
    source: DatasetSource,
    progress: Callable[[int, int], None] | None = None,
    *,
    part: Literal["train", "val", "test"] = "train",
) -> ImageDataset:
    """The pictures of a source. `"scenes"` and `"herds"` draw 2000 of the part `train`, or 500 of another one."""
    if isinstance(source, ImageDataset):
        return source
    if str(source) in WORDS:
        source = replace(WORDS[str(source)], count=DRAWN[part], part=part)
    elif isinstance(source, str | Path):
        source = Folder(path=str(source))
    return source.open(progress)


def labelled_pair(
    train: DatasetSource,
    val: DatasetSource | None = None,
    *,
    val_fraction: float,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """Pictures to learn from and pictures to be asked about, with one numbering of the classes.

    Without `val`, the share `val_fraction` of every class of `train` is asked about. Raises UserError where a side has
    no labels, `val` has classes that `train` lacks, or both are the same pictures: each would find itself.
    """
    known = open_dataset(train, progress)
    if known.labels is None:
        raise UserError(f"Accuracy needs labels, and {_named(train)} has none.\n{CLASS_FOLDERS}")
    if val is None:
        return known.split(val_fraction, seed)
    asked = open_dataset(val, progress, part="val")
    if asked.labels is None:
        raise UserError(f"Accuracy needs labels, and {_named(val)} has none.\n{CLASS_FOLDERS}")
    if (
        asked.fingerprint == known.fingerprint
        and known.content_key is not None
        and asked.content_key == known.content_key
    ):
        raise UserError(
            f"{_named(val)} has the pictures that are learned from: each would find itself.\n"
            "Leave it away, and a part of every class is held back and asked about; or name other pictures."
        )
    return known, relabelled(asked, known.classes)


def labelled_alone(pair: tuple[ImageDataset, ImageDataset], who: str) -> tuple[ImageDataset, ImageDataset]:
    """Of both sides the pictures that have a label. Raises UserError, in the name of `who`, where a side has none."""
    known, asked = (side.subset(np.flatnonzero(np.asarray(side.labels) >= 0)) for side in pair)
    for dataset, what in ((known, "to learn from"), (asked, "to be asked about")):
        if not len(dataset):
            raise UserError(f"{who} needs pictures {what}, and there are none with a label.")
    return known, asked


def relabelled(dataset: ImageDataset, classes: list[str]) -> ImageDataset:
    """The pictures with the numbers of these classes, matched by their names."""
    if dataset.classes == classes or dataset.labels is None:
        return dataset
    unknown = [name for name in dataset.classes if name not in classes]
    if unknown:
        raise UserError(
            f"The validation pictures have classes that the others lack: {', '.join(unknown[:8])}.\n"
            f"Training classes: {', '.join(classes[:12])}."
        )
    numbers = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    same = dataset.subset(np.arange(len(dataset)))
    same.labels = np.where(dataset.labels >= 0, numbers[np.maximum(dataset.labels, 0)], -1)
    same.classes = classes
    return same


def described(dataset: ImageDataset) -> dict[str, int | str]:
    """What a result's JSON says of the pictures."""
    return {
        "images": len(dataset),
        "classes": len(dataset.classes),
        "skipped": len(dataset.skipped),
        "fingerprint": dataset.fingerprint,
    }


def _named(source: DatasetSource) -> str:
    return source.path if isinstance(source, Folder) else str(source) if isinstance(source, str | Path) else "the set"
