"""Official scores of video object segmentation: region similarity J, contour accuracy F, and their mean (DAVIS-2017).

Defined in Perazzi et al., CVPR 2016 (J, F, decay) and Pont-Tuset et al., arXiv:1704.00675 (several objects, J&F). Equal
to the official scorer's semi-supervised task: the first and the last frame are not scored, every object has the same
weight, and all scores are fractions of 1.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dino_ssl import distributed
from dino_ssl.data.benchmarks.davis import open_davis
from dino_ssl.data.clips import Clip
from dino_ssl.data.masks import VOID, read_mask
from dino_ssl.errors import UserError
from dino_ssl.evals.base import CPU
from dino_ssl.evals.features import gather_rows
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
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ wide[:-1, 1:]) | (mask ^ wide[1:, :-1]) | (mask ^ wide[1:, 1:])


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
    pairs = [(mask == label, truth == label) for label in range(1, objects + 1)]
    return np.array([(jaccard(*pair), contour_accuracy(*pair)) for pair in pairs]).reshape(objects, 2)


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
    per_object = {
        name: dict(zip(STATISTICS, row, strict=True)) for name, row in zip(names, statistics.tolist(), strict=True)
    }
    j_and_f = float((mean[0] + mean[3]) / 2)
    return {"J&F-Mean": j_and_f, **dict(zip(STATISTICS, mean.tolist(), strict=True)), "per_object": per_object}


def count_objects(first_mask: np.ndarray) -> int:
    """Return the number of objects of a sequence: the largest label in its first mask."""
    return int(np.where(first_mask == VOID, 0, first_mask).max())


def score_clips(
    clips: Sequence[Clip],
    predict: Callable[[Clip, np.ndarray], Iterable[np.ndarray]],
    progress: Progress = lambda done, total: None,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Score `predict(clip, first mask)`, which yields the masks after the first one, see `summary`.

    Rank r processes videos r, r + world size, ...; the result is equal on every rank.
    """
    shard, rows, done = range(distributed.rank(), len(clips), distributed.world_size()), [], 0
    total = sum(len(clips[index]) - 2 for index in shard)

    def pairs(clip: Clip, first: np.ndarray, truths: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal done
        for number, (mask, truth) in enumerate(zip(predict(clip, first), truths, strict=False), 2):
            if number < len(clip):  # the last frame is not scored
                yield mask, truth
                done += 1
                progress(done, total)

    if short := [clip.name for clip in clips if len(clip) < 3]:
        raise UserError(f"{short[0]}: expected at least 3 frames, since the first and last are not scored.")
    for index in shard:
        truths = clips[index].masks()
        first = next(truths)
        statistics = sequence_statistics(pairs(clips[index], first, truths), count_objects(first))
        rows += [[index, number, *row] for number, row in enumerate(statistics.tolist(), 1)]
    tensor = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2 + len(STATISTICS))
    rows = sorted(gather_rows(tensor, device).tolist())
    names = [f"{clips[int(index)].name}_{int(number)}" for index, number, *_ in rows]  # as the official scorer's
    return summary(names, np.array([row[2:] for row in rows]))


def score_results(
    results: str | Path, root: str | Path, *, split: str = "val", progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Score existing masks, RESULTS/SEQUENCE/00001.png, against a DAVIS folder (its frames are not needed).

    Returns {"J&F-Mean": .69, "J-Mean": ..., "per_object": {"blackswan_1": {"J-Mean": ...}}}, fractions of 1.
    """
    clips = open_davis(root, split, frames=False)
    files = [Path(results, clip.name, f"{name}.png") for clip in clips for name in clip.frame_names[1:-1]]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(
            f"{len(missing)} of the {len(files)} masks to score do not exist, for example {', '.join(missing[:3])}.\n"
            f"Expected an indexed PNG for every frame except the first and the last: {results}/SEQUENCE/00001.png"
        )

    def predict(clip: Clip, first: np.ndarray) -> Iterator[np.ndarray]:
        for name in clip.frame_names[1:-1]:
            path, objects = Path(results, clip.name, f"{name}.png"), count_objects(first)
            mask = read_mask(path)
            if mask.shape != first.shape or mask.max(initial=0) > objects:
                raise UserError(
                    f"{path}: expected labels 0 to {objects} and {first.shape[1]} x {first.shape[0]} pixels, as in the "
                    f"first mask; got labels up to {mask.max()} and {mask.shape[1]} x {mask.shape[0]} pixels."
                )
            yield mask

    return score_clips(clips, predict, progress)
