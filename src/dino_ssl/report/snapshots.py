"""Attention or similarity maps of sample images at several epochs, and their nearest neighbors, saved during training.

RUN/snapshots holds small JPEG files and two indices:

    index.json            the sample images, the epochs, and the panels of the latest snapshot
    images/0.jpg          a sample as the network gets it (resized, center crop)
    epoch_0010/0.jpg      the mean attention over heads, or the similarity, on the sample
    latest/0-1.jpg        panel 1 of the latest snapshot: mask, mean or similarity, then each head
    neighbors.json        the nearest images of each sample; thumbs/ holds them
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dino_ssl.data.dataset import BadImage, ImageDataset, spaced_indices
from dino_ssl.evals.features import ImageFeatures
from dino_ssl.evals.nearest import top_k
from dino_ssl.files import check_format, read_json, write_json
from dino_ssl.models.backbone import Backbone
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.viz.attention import attention_maps
from dino_ssl.viz.rendering import cutout, heat_map, overlay, save_image

FORMAT = 1
"""Version of index.json and neighbors.json."""
MAX_WIDTH = 192
"""Width in pixels of saved images."""
MAX_HEADS = 6
"""Heads of the latest snapshot that are saved."""


def choose_samples(dataset: ImageDataset, count: int = 6) -> list[int]:
    """Return the indices of evenly spaced images, in the order of their labels if there are any."""
    order = np.arange(len(dataset)) if dataset.labels is None else np.argsort(dataset.labels, kind="stable")
    return np.sort(order[spaced_indices(len(dataset), count)]).tolist()


def save_snapshot(
    backbone: Backbone, dataset: ImageDataset, indices: Sequence[int], folder: Path, epoch: int, size: int
) -> None:
    """Save the attention maps of these images at this epoch to RUN/snapshots. Call it on rank 0.

    Unreadable images are skipped. size: side of the network input in pixels.
    """
    index = read_index(folder)
    for i in map(int, indices):
        try:
            image = Preprocessing(size=size).center_crop(dataset.read(i))
        except BadImage:
            continue
        (maps,) = attention_maps(backbone, image, size=size)
        shape = (maps.image.shape[0], maps.image.shape[1])
        mean = "similarity" if maps.kind == "similarity" else "mean"
        panels = {"mask, 60 %": cutout(maps.image, maps.mask), mean: heat_map(maps.mean, shape)}
        if len(maps.heads) > 1:
            panels |= {f"head {head}": heat_map(maps.heads[head], shape) for head in maps.head_ids[:MAX_HEADS]}
        _save(folder / f"images/{i}.jpg", maps.image)
        _save(folder / f"epoch_{epoch:04d}/{i}.jpg", overlay(maps.image, maps.mean))
        for number, panel in enumerate(panels.values()):
            _save(folder / f"latest/{i}-{number}.jpg", panel)
        index["images"][str(i)] = _describe(dataset, i)
        index |= {"kind": maps.kind, "panels": list(panels), "latest": epoch}
    index["epochs"] = sorted({*index["epochs"], epoch})
    write_json(folder / "index.json", index)


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of the snapshots, or return an empty one."""
    return _read(folder / "index.json") or {"format": FORMAT, "images": {}, "epochs": []}


def write_neighbors(
    extracted: ImageFeatures,
    dataset: ImageDataset,
    queries: Sequence[int],
    folder: Path,
    *,
    k: int = 6,
    size: int = 112,
) -> Path:
    """Write the k nearest images of each query by cosine similarity, with thumbnails, and return neighbors.json.

    extracted: features of `dataset`. queries: indices into `dataset`; those without a feature are skipped.
    """
    rows = {int(index): row for row, index in enumerate(extracted.indices.tolist())}
    queries = [int(query) for query in queries if int(query) in rows]
    features = extracted.features
    similarity, nearest = top_k(features[[rows[query] for query in queries]], features, k + 1)
    results = []
    for query, values, neighbor_rows in zip(queries, similarity.tolist(), nearest.tolist(), strict=True):
        pairs = [(row, value) for row, value in zip(neighbor_rows, values, strict=True) if row != rows[query]]
        neighbors = [
            {**_describe(dataset, int(extracted.indices[row])), "similarity": round(value, 4)}
            for row, value in pairs[:k]
        ]
        results.append({**_describe(dataset, query), "neighbors": neighbors})
        for index in (query, *(neighbor["index"] for neighbor in neighbors)):
            _save_thumbnail(dataset, index, folder / f"thumbs/{index}.jpg", size)
    return write_json(folder / "neighbors.json", {"format": FORMAT, "images": len(features), "queries": results})


def read_neighbors(folder: Path) -> dict[str, Any]:
    """Read the result of `write_neighbors`, or return an empty dict."""
    return _read(folder / "neighbors.json") or {}


def _read(path: Path) -> dict[str, Any] | None:
    content = read_json(path)
    if content is not None:
        check_format(path, content.get("format"), FORMAT)
    return content


def _save(path: Path, image: np.ndarray) -> None:
    if image.shape[1] > MAX_WIDTH:
        height = max(1, round(image.shape[0] * MAX_WIDTH / image.shape[1]))
        image = cv2.resize(image, (MAX_WIDTH, height), interpolation=cv2.INTER_AREA)
    save_image(path, image, quality=82, optimize=True)


def _save_thumbnail(dataset: ImageDataset, index: int, path: Path, size: int) -> None:
    with suppress(BadImage):
        if not path.exists():
            _save(path, Preprocessing(size=size).center_crop(dataset.read(index)))


def _describe(dataset: ImageDataset, index: int) -> dict[str, Any]:
    label = -1 if dataset.labels is None else int(dataset.labels[index])
    name = dataset.classes[label] if 0 <= label < len(dataset.classes) else None if label < 0 else str(label)
    return {"index": index, "name": dataset.names[index], "label": name}
