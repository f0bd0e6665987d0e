"""Datasets by what the user passes: a path, the name of a synthetic dataset, settings, or a Python object."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dino_ssl.data.adapters import AdaptedDataset, ExternalDataset, kind_of, open_paths
from dino_ssl.data.dataset import DatasetConfig, ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import SIMPLE_SCENES, SMALL_OBJECTS, Scenes
from dino_ssl.errors import UserError
from dino_ssl.names import SYNTHETIC
from dino_ssl.progress import Progress

DatasetSource = (
    str | Path | DatasetConfig | ImageDataset | Dataset[Any] | Sequence[str | Path | Image.Image | np.ndarray]
)
"""Whatever is accepted as a dataset; see `open_dataset`."""
CLASS_FOLDERS = "Put the images of each class in a folder: photos/cat/1.jpg, photos/dog/2.jpg, ..."
DRAWN = {"train": 2000, "val": 500, "test": 500}
"""Number of images of the synthetic datasets that are opened by name."""
WORDS: dict[str, Scenes] = dict(zip(SYNTHETIC, (Scenes(), SIMPLE_SCENES, SMALL_OBJECTS), strict=True))
"""Synthetic datasets by name."""


def open_dataset(
    source: DatasetSource, progress: Progress | None = None, *, part: Literal["train", "val", "test"] = "train"
) -> ImageDataset:
    """Return the dataset of a source.

    Args:
        source: A folder; the name of a synthetic dataset; a DatasetConfig; an ImageDataset; a map-style torch dataset
            (see `adapters.AdaptedDataset` for its items); or a list of paths, PIL images, or uint8 arrays [H, W, 3].
        progress: Receives (done, total) while images are listed.
        part: Part of a synthetic dataset that is opened by name.
    """
    if isinstance(source, ImageDataset):
        return source
    if isinstance(source, str | Path | DatasetConfig):
        return dataset_config(source, part).open(progress)
    if isinstance(source, Sequence) and source and all(isinstance(item, str | PathLike) for item in source):
        return open_paths(source, progress)  # type: ignore[arg-type]
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return AdaptedDataset(source, progress)  # type: ignore[arg-type]
    raise UserError(f"Expected a folder, a map-style dataset or a list of images, got {type(source).__name__}.")


def config_of(source: DatasetSource, dataset: ImageDataset | None = None) -> DatasetConfig:
    """Return the settings that run.json stores for a source; `dataset`: the opened source, if it is open already."""
    if isinstance(source, str | Path | DatasetConfig):
        config = dataset_config(source, "train")
        return replace(config, bit_depth=dataset.bit_depth) if isinstance(config, Folder) and dataset else config
    dataset = dataset or open_dataset(source)
    settings: Any = {name: getattr(dataset, name) for name in ("fingerprint", "bit_depth")}
    return ExternalDataset(kind=kind_of(source), length=len(dataset), **settings)


def dataset_config(source: str | Path | DatasetConfig, part: Literal["train", "val", "test"]) -> DatasetConfig:
    """Return the settings of a path or of the name of a synthetic dataset, of which `part` is opened."""
    if isinstance(source, DatasetConfig):
        return source
    if scenes := WORDS.get(str(source)):
        return replace(scenes, count=DRAWN[part], part=part)
    return Folder(path=str(source))


def labeled_pair(
    train: DatasetSource,
    val: DatasetSource | None = None,
    *,
    val_fraction: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """Return (training set, validation set) with the same classes; without `val`, a split of `train`.

    Raises UserError if one has no labels, if `val` has classes that `train` lacks, if both have the same images, or if
    each class has a single image, so that none can be held out.
    """
    train_set = open_dataset(train, progress)
    if train_set.labels is None:
        raise UserError(f"Accuracy needs labels, and {source_name(train)} has none.\n{CLASS_FOLDERS}")
    if val is None:
        pair = train_set.split(val_fraction, seed)
        if not len(pair[1]):
            raise UserError(
                f"No image of {source_name(train)} can be held out, because each class has a single one. Add images, "
                "or pass a validation set."
            )
        return pair
    val_set = open_dataset(val, progress, part="val").with_bit_depth(train_set.bit_depth)
    check_distinct(train, train_set, val, val_set)
    return train_set, relabeled(val_set, train_set.classes, source_name(val))


def check_distinct(train: DatasetSource, train_set: ImageDataset, val: DatasetSource, val_set: ImageDataset) -> None:
    """Raise UserError if a validation set has images of the training set: the same ones, or a folder in the other's."""
    key, folder, val_folder = train_set.content_key, folder_path(train), folder_path(val)
    same = key is not None and (key, train_set.fingerprint) == (val_set.content_key, val_set.fingerprint)
    if not same and folder is not None and val_folder is not None:
        same = has_images_in(train_set, folder, val_folder) or has_images_in(val_set, val_folder, folder)
    if same:
        raise UserError(
            f"The validation set {source_name(val)} has images of the training set, so it cannot measure the quality "
            "on new images.\nOmit it to hold out a part of the training set, or pass other images."
        )


def has_images_in(dataset: ImageDataset, folder: Path, subfolder: Path) -> bool:
    """Return True if the dataset of `folder` has images below `subfolder`, another folder."""
    relative = Path(os.path.relpath(subfolder.resolve(), folder.resolve())).as_posix()
    return relative[:2] not in (".", "..") and any(name.startswith(f"{relative}/") for name in dataset.names)


def labeled_only(pair: tuple[ImageDataset, ImageDataset], method: str) -> tuple[ImageDataset, ImageDataset]:
    """Return the labeled images of both datasets. Raises UserError, naming `method`, if one has none."""
    train_set, val_set = (side.subset(np.flatnonzero(np.asarray(side.labels) >= 0)) for side in pair)
    for dataset, role in ((train_set, "training"), (val_set, "validation")):
        if not len(dataset):
            raise UserError(f"{method} needs labeled {role} images, and there are none.")
    return train_set, val_set


def relabeled(dataset: ImageDataset, classes: list[str], name: str) -> ImageDataset:
    """Return a validation set with labels as indices into `classes`, those of the training set, matched by name.

    The folder of a single class is its label too, if the training set has this class. Raises UserError, with the
    `name` of the validation set, for other classes or without labels.
    """
    if dataset.classes == classes:
        return dataset
    labels, own = dataset.labels, dataset.classes
    if labels is None:
        folders = {path.rpartition("/")[0].split("/")[0] for path in dataset.names}  # "" outside of all folders
        if len(folders) != 1 or "" in folders:
            raise UserError(f"Accuracy needs labels, and the validation set {name} has none.\n{CLASS_FOLDERS}")
        labels, own = np.zeros(len(dataset), dtype=np.int64), list(folders)
    if unknown := [name for name in own if name not in classes]:
        raise UserError(
            f"The validation set has classes that the training set lacks: {', '.join(unknown[:8])}.\n"
            f"Training classes: {', '.join(classes[:12])}."
        )
    new_labels = np.array([classes.index(name) for name in own], dtype=np.int64)
    copy = dataset.subset(np.arange(len(dataset)))
    copy.labels = np.where(labels >= 0, new_labels[np.maximum(labels, 0)], -1)
    copy.classes = classes
    return copy


def described(dataset: ImageDataset) -> dict[str, int | str]:
    """Return the summary of a dataset for a JSON result."""
    return {
        "images": len(dataset),
        "classes": len(dataset.classes),
        "skipped": len(dataset.skipped),
        "fingerprint": dataset.fingerprint,
    }


def source_name(source: DatasetSource) -> str:
    """Return a short name of a source for messages: the path of a folder, otherwise the name or type."""
    if isinstance(source, DatasetConfig) and source.folder is not None:
        return source.spec
    return str(source) if isinstance(source, str | Path) else f"the dataset ({type(source).__name__})"


def folder_path(source: DatasetSource) -> Path | None:
    """Return the path of a source that is a file or folder; None for synthetic datasets and Python objects."""
    return dataset_config(source, "train").folder if isinstance(source, str | Path | DatasetConfig) else None


def open_annotated(
    source: DatasetSource,
    read_folder: Callable[[Path], ImageDataset],
    kind: Any,
    annotations: str,
    progress: Progress | None = None,
) -> Any:
    """Return the dataset of a source whose images have annotations; a folder is one of a benchmark.

    Args:
        source: See `open_dataset`; a synthetic dataset is its part val.
        read_folder: Returns the dataset of a benchmark's folder.
        kind: Protocol of the dataset, which has a method for the annotations.
        annotations: Their names in messages, such as "masks".
        progress: Receives (done, total) while images are listed.
    """
    path = folder_path(source)
    dataset = open_dataset(source, progress, part="val") if path is None else read_folder(path)
    return annotated(dataset, kind, annotations)


def annotated(dataset: ImageDataset, kind: Any, annotations: str) -> Any:
    """Return a dataset. Raises UserError if it has no annotations; see `open_annotated`."""
    if not isinstance(dataset, kind):
        methods = annotations.replace("boxes", "boxes(i)").replace("masks", "mask(i)")
        raise UserError(
            f"Expected images with {annotations}; {type(dataset).__name__} has none. Give the folder of a benchmark, "
            f"`scenes`, or a dataset with a method {methods}."
        )
    return dataset


def synthetic_scenes(source: DatasetSource, **changes: Any) -> Scenes | None:
    """Return the settings of a synthetic source, with `changes` if it is given by name; None for other sources."""
    if isinstance(source, str | Path):
        return replace(WORDS[str(source)], **changes) if str(source) in WORDS else None
    return getattr(source, "scenes", None)
