"""J, F and their statistics equal slow implementations of their definitions and the official scorer."""

import csv
import math

import numpy as np
import pytest

from dino_ssl.evals.davis_score import (
    contour,
    contour_accuracy,
    decay,
    jaccard,
    score_results,
    sequence_statistics,
    summary,
)


def blobs(seed: int, height: int = 37, width: int = 53) -> np.ndarray:
    """Return a bool mask of a few boxes, some at the border."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 4)):
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        mask[top : top + rng.integers(2, 20), left : left + rng.integers(2, 20)] = rng.random() < 0.9
    return mask


def slow_contour(mask: np.ndarray) -> list[tuple[int, int]]:
    height, width = mask.shape
    pixels = []
    for y in range(height):
        for x in range(width):
            down, right = min(y + 1, height - 1), min(x + 1, width - 1)
            across = mask[down, right]
            if mask[y, x] != mask[y, right] or mask[y, x] != mask[down, x] or mask[y, x] != across:
                pixels.append((y, x))
    return pixels


def slow_f(mask: np.ndarray, truth: np.ndarray) -> float:
    radius = math.ceil(0.008 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))
    predicted, true = slow_contour(mask), slow_contour(truth)
    if not predicted or not true:
        return float(not predicted and not true)

    def matched(contour: list, other: list) -> float:
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in other) for y, x in contour]
        return sum(near) / len(near)

    precision, recall = matched(predicted, true), matched(true, predicted)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_f_equals_its_definition(seed: int) -> None:
    mask, truth = blobs(seed), blobs(seed + 100)
    assert list(zip(*np.nonzero(contour(mask)), strict=True)) == slow_contour(mask)
    shifted = np.roll(mask, 1, axis=1)
    for other in (truth, shifted):
        assert contour_accuracy(mask, other) == pytest.approx(slow_f(mask, other), abs=1e-12)
    assert contour_accuracy(mask, mask) == 1


def test_contours_match_within_the_tolerance() -> None:
    truth = np.zeros((480, 854), bool)
    truth[100:300, 100:300] = True  # the tolerance is 8 pixels at this size
    assert contour_accuracy(np.roll(truth, 8, axis=1), truth) == pytest.approx(1, abs=0.02)
    assert contour_accuracy(np.roll(truth, 9, axis=1), truth) < 0.6


def test_empty_and_full_masks() -> None:
    empty, full, some = np.zeros((20, 30), bool), np.ones((20, 30), bool), blobs(0, 20, 30)
    assert jaccard(empty, empty) == contour_accuracy(empty, empty) == 1
    assert jaccard(empty, some) == contour_accuracy(empty, some) == contour_accuracy(some, empty) == 0
    assert contour_accuracy(full, full) == 1  # no contour on either side
    assert jaccard(full, some) == some.mean()


def test_statistics_equal_a_manual_computation() -> None:
    values = np.arange(10) / 10
    assert decay(values) == pytest.approx((0 + 1 + 2) / 30 - (7 + 8 + 9) / 30)  # ends at 0, 2, 4, 7, 9
    assert decay(np.array([0.7])) == 0
    truth = np.zeros((8, 12), np.uint8)
    truth[1:5, 1:5], truth[1:5, 7:11] = 1, 2
    half = truth.copy()
    half[3:5, 1:5] = 0
    rows = sequence_statistics([(mask, truth) for mask in (truth, truth, half, half)], 2)
    assert rows[0, :3].tolist() == [0.75, 0.5, 0.5]  # a J of one half is not above one half
    assert rows[1].tolist() == [1, 1, 0, 1, 1, 0]
    result = summary(["a_1", "a_2"], rows)
    assert result["J-Mean"] == 0.875
    assert result["J&F-Mean"] == pytest.approx((result["J-Mean"] + result["F-Mean"]) / 2)
    assert result["per_object"]["a_1"]["J-Recall"] == 0.5


def test_decay_of_a_long_video_compares_quarters() -> None:
    assert decay(np.arange(1000) / 1000) == pytest.approx(-0.75, abs=0.01)


def test_scores_of_osvos_equal_the_official_ones(shared) -> None:
    root = shared / "data/davis"
    result = score_results(root / "results/osvos", root)
    with (root / "expected_osvos_per_sequence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["Sequence"] for row in rows} == set(result["per_object"])
    for row in rows:
        scores = result["per_object"][row.pop("Sequence")]
        assert scores == pytest.approx({name: float(value) for name, value in row.items()}, abs=1e-6)
