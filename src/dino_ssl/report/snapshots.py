"""What a run keeps to be looked at: attention of a few sample pictures at several epochs, and their
neighbours.

Everything lies in RUN/snapshots, small, with a JSON index beside it:

    index.json            the sample pictures, and for each epoch the maps' files
    pictures/0.jpg        a sample as the network sees it (resized, center crop)
    epoch_0010/0.png      its maps, one grey pixel per patch, side by side: every head, the mean
                          (each stretched to 0 .. 255), and the mean's mask
    epoch_0010/0.jpg      the mean over heads, laid over the picture
    neighbours.json       for each query its nearest pictures; thumbs/ holds them
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.transforms.eval import eval_transform
from dino_ssl.errors import UserError
from dino_ssl.evals.features import ImageFeatures
from dino_ssl.evals.knn import nearest_neighbours
from dino_ssl.files import read_json, write_json
from dino_ssl.models.backbone import Backbone
from dino_ssl.viz.attention import cls_attention_or_similarity
from dino_ssl.viz.rendering import overlay, rescale
from dino_ssl.viz.saving import save_image

JPEG = {"quality": 82, "optimize": True}


def choose_samples(dataset: ImageDataset, count: int = 6) -> list[int]:
    """Pictures to look at: evenly spaced, and of as many classes as possible where there are classes."""
    total = len(dataset)
    if dataset.labels is None or not len(dataset.labels):
        return np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).astype(int)).tolist()
    members = [np.flatnonzero(dataset.labels == kind) for kind in np.unique(dataset.labels)]
    if len(members) > count:
        members = [members[i] for i in np.linspace(0, len(members) - 1, count).astype(int)]
    turns = max(len(group) for group in members)
    ordered = [int(group[turn]) for turn in range(turns) for group in members if turn < len(group)]
    return sorted(ordered[:count])


def snapshot(
    backbone: Backbone, dataset: ImageDataset, indices: Sequence[int], folder: Path, epoch: float, size: int
) -> Path:
    """Adds the maps of these pictures at this epoch to `folder` (RUN/snapshots); returns the index.

    Call it on the main rank alone. A picture that cannot be read is left out; the same epoch again is written
    over.
    """
    index = read_index(folder)
    entry: dict[str, Any] = {"epoch": epoch, "maps": {}}
    here = f"epoch_{epoch:08.3f}".rstrip("0").rstrip(".") if epoch % 1 else f"epoch_{int(epoch):04d}"
    for place in map(int, indices):
        try:
            picture = eval_transform(dataset.read(place), size)
        except BadImage:
            continue
        seen = cls_attention_or_similarity(backbone, picture, size=size)
        entry |= {"kind": seen.kind, "heads": len(seen.heads), "grid": list(seen.mean.shape)}
        maps = [*(rescale(values) for values in (*seen.heads, seen.mean)), seen.mask.astype(np.float32)]
        strip = np.concatenate(maps, axis=1)
        save_image(folder / here / f"{place}.png", (strip * 255).round().astype(np.uint8), optimize=True)
        save_image(folder / here / f"{place}.jpg", overlay(seen.image, seen.mean), **JPEG)
        if str(place) not in index["images"]:
            save_image(folder / f"pictures/{place}.jpg", seen.image, **JPEG)
            index["images"][str(place)] = {"name": dataset.names[place], "label": _label(dataset, place)}
        entry["maps"][str(place)] = f"{here}/{place}"
    kept = [other for other in index["epochs"] if other["epoch"] != epoch]
    index["epochs"] = sorted([*kept, entry], key=lambda item: item["epoch"])
    return write_json(folder / "index.json", index)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of the maps; an empty one where there is none, or none that can be read."""
    index = read_json(folder / "index.json")
    return index if isinstance(index, dict) and {"images", "epochs"} <= set(index) else {"images": {}, "epochs": []}


def write_neighbours(
    extracted: ImageFeatures,
    dataset: ImageDataset,
    queries: Sequence[int],
    folder: Path,
    *,
    k: int = 6,
    size: int = 112,
) -> Path:
    """The k nearest pictures of each query by cosine, itself left out, with thumbnails; returns
    neighbours.json.

    extracted: features of `dataset`; queries: numbers of pictures among them.
    """
    rows = {int(index): row for row, index in enumerate(extracted.indices.tolist())}
    asked = [int(query) for query in queries if int(query) in rows]
    if not asked:
        raise UserError(f"no feature was extracted for any of the query pictures {list(queries)}.")
    features = extracted.features
    similarity, found = nearest_neighbours(features, features[[rows[query] for query in asked]], k + 1)
    listed = []
    for query, values, places in zip(asked, similarity.tolist(), found.tolist(), strict=True):
        others = [
            (int(extracted.indices[place]), value)
            for value, place in zip(values, places, strict=True)
            if place != rows[query]
        ]
        near = [_thumb(dataset, index, folder, size) | {"similarity": round(v, 4)} for index, v in others[:k]]
        listed.append({**_thumb(dataset, query, folder, size), "neighbours": near})
    return write_json(folder / "neighbours.json", {"images": len(features), "queries": listed})


def read_neighbours(folder: Path) -> dict[str, Any]:
    """What `write_neighbours` wrote; empty where there is nothing."""
    found = read_json(folder / "neighbours.json")
    return found if isinstance(found, dict) else {}


def _thumb(dataset: ImageDataset, index: int, folder: Path, size: int) -> dict[str, Any]:
    """Saves a square thumbnail once, and describes the picture; a picture gone bad since has no file."""
    described = {"index": index, "name": dataset.names[index], "label": _label(dataset, index)}
    path = folder / f"thumbs/{index}.jpg"
    if not path.exists():
        try:
            image = dataset.read(index)
        except BadImage:
            return described
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = np.ascontiguousarray(image[top : top + side, left : left + side])
        how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
        save_image(path, cv2.resize(square, (size, size), interpolation=how), **JPEG)
    return described | {"file": f"thumbs/{index}.jpg"}


def _label(dataset: ImageDataset, index: int) -> str | None:
    if dataset.labels is None or dataset.labels[index] < 0:
        return None
    label = int(dataset.labels[index])
    return dataset.classes[label] if label < len(dataset.classes) else str(label)
