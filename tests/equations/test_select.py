"""Selections: farthest first, one typical image per cluster, and outliers, each against its definition."""

import itertools

import numpy as np
import pytest

from dino_ssl.errors import UserError
from dino_ssl.search import select as selection
from dino_ssl.search.select import neighbor_distances, representatives, select


def rows_of(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def distances_of(rows: np.ndarray) -> np.ndarray:
    exact = rows.astype(np.float64)
    return 1 - exact @ exact.T


def test_coverage_is_farthest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BLOCK_ROWS", 7)
    rows, distance = rows_of(40), distances_of(rows_of(40))
    result = select(rows, 6)
    central = int((rows.astype(np.float64) @ rows.astype(np.float64).mean(0)).argmax())
    expected = [central]
    while len(expected) < 6:
        expected.append(int(distance[:, expected].min(1).argmax()))
    assert result.rows.tolist() == expected
    np.testing.assert_allclose(result.scores[1:], [distance[expected[i], expected[:i]].min() for i in range(1, 6)],
                               atol=1e-5)  # fmt: skip


def test_coverage_is_within_a_factor_of_two_of_the_best_radius() -> None:
    """By Euclidean distance, for which the bound holds; it has the same order as the cosine."""
    rows = rows_of(14, 3)
    euclidean = np.sqrt(np.maximum(2 * distances_of(rows), 0))

    def radius(centers):
        return euclidean[:, list(centers)].min(1).max()

    best = min(map(radius, itertools.combinations(range(14), 4)))
    assert best <= radius(select(rows, 4).rows) <= 2 * best


@pytest.mark.parametrize("method", ["coverage", "typical", "outliers"])
def test_a_second_round_continues_the_first(method) -> None:
    rows = rows_of(60)
    first = select(rows, 20, method=method)
    second = select(rows, 20, method=method, labeled=first.rows)
    assert len({*first.rows.tolist(), *second.rows.tolist()}) == 40
    assert len(select(rows, 100, method=method, labeled=first.rows).rows) == 40  # all that are left
    np.testing.assert_array_equal(first.rows, select(rows, 20, method=method).rows)
    if method != "typical":  # its clusters depend on the number of images
        np.testing.assert_array_equal([*first.rows, *second.rows], select(rows, 40, method=method).rows)
    with pytest.raises(UserError, match="No image is left"):
        select(rows, 1, method=method, labeled=range(60))


def test_typical_takes_the_densest_image_of_every_cluster_and_the_largest_first() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [30, 20, 10])
    rows = np.eye(6)[groups] + 0.1 * rng.normal(size=(60, 6))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    result = select(rows, 3, method="typical")
    assert groups[result.rows].tolist() == [0, 1, 2]
    for row, score, group in zip(result.rows, result.scores, range(3), strict=True):
        members = np.flatnonzero(groups == group)
        inside = np.sort(distances_of(rows[members]), axis=1)[:, 1:21].mean(1)
        assert row == members[inside.argmin()]
        assert score == pytest.approx(inside.min(), abs=5e-4)
    labeled = select(rows, 1, method="typical", labeled=[*np.flatnonzero(groups == 0), 30, 31])
    assert groups[labeled.rows].tolist() == [2]  # the cluster without labels


def test_outliers_are_far_from_their_neighbors() -> None:
    rows = rows_of(50, 4)
    rows[17] = rows[3:40:5].astype(np.float32).mean(0) * -1
    rows[17] /= np.linalg.norm(rows[17].astype(np.float32))
    expected = np.sort(distances_of(rows), axis=1)[:, 1:6].mean(1)
    np.testing.assert_allclose(neighbor_distances(rows, 5), expected, atol=5e-4)
    assert select(rows, 4, method="outliers").rows.tolist() == np.argsort(-expected)[:4].tolist()


@pytest.mark.parametrize("method", ["coverage", "typical", "outliers"])
def test_few_and_equal_images_are_selected_once(method) -> None:
    for rows in (rows_of(1), rows_of(2), rows_of(3), np.repeat(rows_of(1), 9, 0)):
        assert sorted(select(rows, 9, method=method).rows.tolist()) == list(range(len(rows)))


def test_representatives_are_the_nearest_and_diverse_ones_of_the_inner_half() -> None:
    rows = rows_of(40)
    center = rows.astype(np.float64).mean(0)
    members = np.argsort(-(rows.astype(np.float64) @ center))
    shown = representatives(rows, members, 5)
    assert shown[0] == members[0]
    assert len({*shown.tolist()} & {*members[:20].tolist()}) == 5
    assert sorted(representatives(rows, members[:3], 5)) == sorted(members[:3])
