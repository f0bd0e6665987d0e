"""How good masks of a video's objects are: region similarity J, contour accuracy F, and their mean (DAVIS-2017).

Defined in Perazzi et al., CVPR 2016 (J, F, decay) and Pont-Tuset et al., arXiv:1704.00675 (several objects, J&F), and
the same number as the official scorer's, semi-supervised task: the first and the last frame do not count; every
object counts alike, whatever its size and its sequence's length; all are fractions of 1.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dino_ssl.data.benchmarks.davis import open_annotations
from dino_ssl.data.masks import VOID, read_mask
from dino_ssl.errors import UserError

STATISTICS = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
"""Of an object, in the order of the columns below."""

TOLERANCE = 0.008  # of the frame's diagonal: how far a contour may lie from the true one; 8 pixels at 854 x 480
RECALL = 0.5  # a frame is found where its J (or F) is above


def jaccard(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two bool masks [H, W]; 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels that differ from the next one to the right, below, or across; bool [H, W]."""
    right, below, across = mask.copy(), mask.copy(), mask.copy()  # nothing differs past the border
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    across[:-1, :-1] = mask[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ across)


def contour_accuracy(mask: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """F: harmonic mean of the shares of each contour that lie near the other one. Bool masks [H, W].

    Near: within a disk of ceil(tolerance * diagonal) pixels. Only the box around both masks is looked at.
    """
    reach = math.ceil(tolerance * math.hypot(*mask.shape))
    box = _box(mask | truth)
    mine, true = contour(mask[box]), contour(truth[box])
    if not mine.any() or not true.any():
        return float(mine.any() == true.any())  # both without contour: 1; precision or recall 0 otherwise: 0
    precision = np.count_nonzero(mine & _near(true, reach)) / np.count_nonzero(mine)
    recall = np.count_nonzero(true & _near(mine, reach)) / np.count_nonzero(true)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest box that holds a bool mask, and one pixel more on every side, where a contour can lie."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return slice(max(0, top - 1), top + height + 1), slice(max(0, left - 1), left + width + 1)


def _near(pixels: np.ndarray, reach: int) -> np.ndarray:
    """Which pixels lie within `reach` of one of `pixels`, bool [H, W]: dilation by a disk."""
    along = np.arange(-reach, reach + 1) ** 2
    disk = (along[:, None] + along <= reach**2).astype(np.uint8)
    return cv2.dilate(pixels.view(np.uint8), disk).view(bool)


def decay(values: np.ndarray) -> float:
    """How much is lost over time: the mean of the first quarter of the frames, less that of the last."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1  # quarters share their ends
    return float(values[ends[0] : ends[1] + 1].mean() - values[ends[3] : ends[4] + 1].mean())


def frame_scores(mask: np.ndarray, truth: np.ndarray, objects: int) -> np.ndarray:
    """J and F of objects 1 ... `objects` in one frame: label maps [H, W] -> [objects, 2]. Other numbers, void among
    them, are ground."""
    scores = np.empty((objects, 2))
    for label in range(1, objects + 1):
        mine, true = mask == label, truth == label
        scores[label - 1] = jaccard(mine, true), contour_accuracy(mine, true)
    return scores


def object_statistics(scores: Sequence[np.ndarray]) -> np.ndarray:
    """`frame_scores` of the frames that count -> [objects, 6], the columns as in `STATISTICS`."""
    series = np.stack(scores).transpose(1, 2, 0)  # [objects, 2, frames]
    rows = [[(one.mean(), (one > RECALL).mean(), decay(one)) for one in both] for both in series]
    return np.array(rows).reshape(-1, 6)


def summary(names: Sequence[str], statistics: np.ndarray) -> dict[str, Any]:
    """Names [N] and statistics [N, 6] of all objects -> what the official scorer prints, and `per_object`."""
    if not names:
        raise UserError("There is nothing to score: no first mask has an object (numbers 1, 2, ...).")
    mean = statistics.mean(axis=0)
    return {
        "J&F-Mean": float((mean[0] + mean[3]) / 2),
        **dict(zip(STATISTICS, mean.tolist(), strict=True)),
        "per_object": {
            name: dict(zip(STATISTICS, row, strict=True))
            for name, row in zip(names, statistics.tolist(), strict=True)
        },
    }  # fmt: skip


def objects_of(first_mask: np.ndarray) -> int:
    """How many objects a sequence has: the largest number in its first mask."""
    return int(np.where(first_mask == VOID, 0, first_mask).max())


def object_name(sequence: str, label: int) -> str:
    """blackswan_1: as the official scorer calls it."""
    return f"{sequence}_{label}"


def sequence_statistics(pairs: Iterable[tuple[np.ndarray, np.ndarray]], objects: int) -> np.ndarray:
    """`object_statistics` of one sequence: (mask, truth), label maps of the frames that count, one after the other."""
    return object_statistics([frame_scores(mask, true, objects) for mask, true in pairs])


def score_results(
    results: str | Path,
    root: str | Path,
    *,
    split: str = "val",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores masks that exist, RESULTS/SEQUENCE/00001.png, against a DAVIS folder, whose frames are not needed.

    {"J&F-Mean": .69, "J-Mean": ..., "per_object": {"blackswan_1": {"J-Mean": ...}}}, fractions of 1.
    """
    results, truths = Path(results), open_annotations(root, split)
    _check_complete(results, truths)
    names, statistics = [], []
    total, done = sum(len(files) - 2 for files in truths.values()), 0

    def scored(sequence: str, files: Sequence[Path], objects: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal done
        for file in files[1:-1]:
            truth = read_mask(file)
            yield _checked(results / sequence / file.name, truth.shape, objects), truth
            done += 1
            if progress is not None:
                progress(done, total)

    for sequence, files in truths.items():
        objects = objects_of(read_mask(files[0]))
        names += [object_name(sequence, label) for label in range(1, objects + 1)]
        statistics.append(sequence_statistics(scored(sequence, files, objects), objects))
    return summary(names, np.concatenate(statistics))


def _checked(path: Path, shape: tuple[int, ...], objects: int) -> np.ndarray:
    mask = read_mask(path)
    if mask.shape != shape:
        raise UserError(
            f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels; expected {shape[1]} x {shape[0]}, as the frames. "
            "Resize the masks with nearest neighbours, so that the numbers stay numbers."
        )
    if mask.max(initial=0) > objects:
        raise UserError(
            f"{path} has an object {mask.max()}, but the first mask of {path.parent.name} has {objects}. "
            f"Expected the numbers 0 to {objects}."
        )
    return mask


def _check_complete(results: Path, truths: Mapping[str, Sequence[Path]]) -> None:
    for sequence, files in truths.items():
        if len(files) < 3:
            raise UserError(f"{sequence} has {len(files)} masks; its first and last do not count, so 3 is the least.")
    wanted = [f"{sequence}/{file.name}" for sequence, files in truths.items() for file in files[1:-1]]
    if missing := [name for name in wanted if not (results / name).is_file()]:
        shown = ", ".join(missing[:3])
        raise UserError(
            f"{results} lacks {len(missing)} of the {len(wanted)} masks that are scored: {shown}"
            f"{' ...' if len(missing) > 3 else ''}.\n"
            f"Expected one indexed PNG for each frame, but for the first and the last: {results}/SEQUENCE/00001.png"
        )
