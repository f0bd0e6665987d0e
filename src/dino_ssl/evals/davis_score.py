"""Official scores of video object segmentation: region similarity J, contour accuracy F, and their mean (DAVIS-2017).

Defined in Perazzi et al., CVPR 2016 (J, F, decay) and Pont-Tuset et al., arXiv:1704.00675 (several objects, J&F). Equal
to the official scorer's semi-supervised task: the first and the last frame are not scored, every object has the same
weight, and all scores are fractions of 1.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dino_ssl.data.benchmarks.davis import open_annotations
from dino_ssl.data.masks import VOID, read_mask
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

STATISTICS = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
"""Statistics of an object, in column order."""

TOLERANCE = 0.008  # distance between matching contours as a fraction of the frame's diagonal: 8 pixels at 854 x 480
RECALL = 0.5  # recall is the fraction of frames whose J (or F) is above


def jaccard(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two bool masks [H, W]; 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from their right, lower or lower right neighbor; bool [H, W] -> bool [H, W]."""
    right, below, across = mask.copy(), mask.copy(), mask.copy()  # equal to their neighbor at the border
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    across[:-1, :-1] = mask[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ across)


def contour_accuracy(mask: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """F: harmonic mean of contour precision and recall of two bool masks [H, W].

    Contour pixels match within a disk of ceil(tolerance * diagonal) pixels.
    """
    radius = math.ceil(tolerance * math.hypot(*mask.shape))
    box = _bounding_box(mask | truth)
    predicted, true = contour(mask[box]), contour(truth[box])
    if not predicted.any() or not true.any():
        return float(predicted.any() == true.any())  # both without contour: 1; otherwise precision or recall is 0
    precision = np.count_nonzero(predicted & _dilate(true, radius)) / np.count_nonzero(predicted)
    recall = np.count_nonzero(true & _dilate(predicted, radius)) / np.count_nonzero(true)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the bounding box of a bool mask plus one pixel on every side, which may belong to its contour."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return slice(max(0, top - 1), top + height + 1), slice(max(0, left - 1), left + width + 1)


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    offsets = np.arange(-radius, radius + 1) ** 2
    disk = (offsets[:, None] + offsets <= radius**2).astype(np.uint8)
    return cv2.dilate(mask.view(np.uint8), disk).view(bool)


def decay(values: np.ndarray) -> float:
    """Return the mean over the first quarter of the frames minus the mean over the last quarter."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1  # neighboring quarters share a frame
    return float(values[ends[0] : ends[1] + 1].mean() - values[ends[3] : ends[4] + 1].mean())


def frame_scores(mask: np.ndarray, truth: np.ndarray, objects: int) -> np.ndarray:
    """Return J and F of objects 1 ... `objects` in one frame: label maps [H, W] -> [objects, 2]."""
    scores = np.empty((objects, 2))
    for label in range(1, objects + 1):
        predicted, true = mask == label, truth == label
        scores[label - 1] = jaccard(predicted, true), contour_accuracy(predicted, true)
    return scores


def sequence_statistics(pairs: Iterable[tuple[np.ndarray, np.ndarray]], objects: int) -> np.ndarray:
    """Return the `STATISTICS` of each object, [objects, 6], from the (mask, truth) label maps of the scored frames."""
    scores = np.stack([frame_scores(mask, truth, objects) for mask, truth in pairs])
    series = scores.transpose(1, 2, 0)  # [objects, 2, frames]
    rows = [[(values.mean(), (values > RECALL).mean(), decay(values)) for values in pair] for pair in series]
    return np.array(rows).reshape(-1, 6)


def summary(names: Sequence[str], statistics: np.ndarray) -> dict[str, Any]:
    """Return the official scores and `per_object`, from the names [N] and statistics [N, 6] of all objects."""
    if not names:
        raise UserError("No object to score: every first mask is background.")
    mean = statistics.mean(axis=0)
    per_object = {name: dict(zip(STATISTICS, row, strict=True)) for name, row in zip(names, statistics.tolist())}  # noqa: B905
    j_and_f = float((mean[0] + mean[3]) / 2)
    return {"J&F-Mean": j_and_f, **dict(zip(STATISTICS, mean.tolist(), strict=True)), "per_object": per_object}


def count_objects(first_mask: np.ndarray) -> int:
    """Return the number of objects of a sequence: the largest label in its first mask."""
    return int(np.where(first_mask == VOID, 0, first_mask).max())


def object_name(sequence: str, label: int) -> str:
    """Return the official scorer's name of an object, for example blackswan_1."""
    return f"{sequence}_{label}"


def score_results(
    results: str | Path, root: str | Path, *, split: str = "val", progress: Progress | None = None
) -> dict[str, Any]:
    """Score existing masks, RESULTS/SEQUENCE/00001.png, against a DAVIS folder (its frames are not needed).

    Returns {"J&F-Mean": .69, "J-Mean": ..., "per_object": {"blackswan_1": {"J-Mean": ...}}}, fractions of 1.
    """
    results, truths = Path(results), open_annotations(root, split)
    _check_complete(results, truths)
    names, statistics = [], []
    total, done = sum(len(files) - 2 for files in truths.values()), 0

    def pairs(sequence: str, files: Sequence[Path], objects: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal done
        for file in files[1:-1]:
            truth = read_mask(file)
            yield _read_result(results / sequence / file.name, truth.shape, objects), truth
            done += 1
            if progress is not None:
                progress(done, total)

    for sequence, files in truths.items():
        objects = count_objects(read_mask(files[0]))
        names += [object_name(sequence, label) for label in range(1, objects + 1)]
        statistics.append(sequence_statistics(pairs(sequence, files, objects), objects))
    return summary(names, np.concatenate(statistics))


def _read_result(path: Path, shape: tuple[int, ...], objects: int) -> np.ndarray:
    mask = read_mask(path)
    if mask.shape != shape:
        raise UserError(
            f"{path}: expected {shape[1]} x {shape[0]} pixels, the size of the frames; got {mask.shape[1]} x "
            f"{mask.shape[0]}. Resize masks with nearest-neighbor interpolation."
        )
    if mask.max(initial=0) > objects:
        raise UserError(f"{path}: expected labels 0 to {objects}, as in the first mask; got {mask.max()}.")
    return mask


def _check_complete(results: Path, truths: Mapping[str, Sequence[Path]]) -> None:
    for sequence, files in truths.items():
        if len(files) < 3:
            raise UserError(
                f"{sequence}: expected at least 3 masks, the first and last are not scored; got {len(files)}."
            )
    files = [results / sequence / mask.name for sequence, masks in truths.items() for mask in masks[1:-1]]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(
            f"{len(missing)} of the {len(files)} masks to score do not exist, for example {', '.join(missing[:3])}.\n"
            f"Expected an indexed PNG for every frame except the first and the last: {results}/SEQUENCE/00001.png"
        )
