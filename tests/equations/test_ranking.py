"""Average precision, precision at k, junk and ranks, compared with slow implementations of their definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.evals import ranking
from dino_ssl.evals.ranking import average_precision, precision_at, remove_junk, target_ranks


def area(relevant: np.ndarray, positives: int) -> float:
    """Trapezoids under the precision-recall curve, point by point over the whole ranking."""
    points, hits = [(0.0, 1.0)], 0
    for count, hit in enumerate(relevant, 1):
        hits += hit
        points.append((hits / positives, hits / count))
    return sum((r1 - r0) * (p0 + p1) / 2 for (r0, p0), (r1, p1) in pairwise(points))


def rankings(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(rng.integers(1, 40)) < rng.random() for _ in range(count)]


def test_average_precision_is_the_area_under_the_curve() -> None:
    for relevant in rankings(60):
        positives = int(relevant.sum()) + 2  # two are not retrieved
        expected = area(relevant, positives)
        assert average_precision(np.flatnonzero(relevant), positives) == pytest.approx(expected, abs=1e-12)
    assert average_precision([0, 1, 2], 3) == 1
    assert average_precision([], 3) == 0
    assert average_precision([9], 1) == pytest.approx(1 / 20)


def test_precision_at_counts_up_to_the_last_positive() -> None:
    for relevant in rankings(60):
        ranks = np.flatnonzero(relevant)
        for k in (1, 5, 10):
            if len(ranks):
                first = min(k, ranks[-1] + 1)
                assert precision_at(ranks, k) == relevant[:first].mean()
    assert precision_at([0, 1, 2], 10) == 1
    assert precision_at([0, 9], 10) == 0.2


def test_junk_is_removed_from_the_ranking() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        kinds = rng.choice(["positive", "junk", "negative"], 30)
        ranks, junk = np.flatnonzero(kinds == "positive"), np.flatnonzero(kinds == "junk")
        expected = np.flatnonzero(kinds[kinds != "junk"] == "positive")
        np.testing.assert_array_equal(remove_junk(ranks, junk), expected)


def problem(queries: int = 9, rows: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    make = torch.Generator().manual_seed(seed)
    targets = [rng.choice(rows, rng.integers(0, 7), replace=False) for _ in range(queries)]
    return torch.randn(queries, 5, generator=make), torch.randn(rows, 5, generator=make), targets


def by_sorting(query: Tensor, database: Tensor, targets: np.ndarray) -> list[int]:
    """Sort the whole database; targets come after equal rows that are not targets."""
    cosine = [float(query @ row / (query.norm() * row.norm())) if row.any() else -2.0 for row in database]
    order = sorted(
        range(len(database)),
        key=lambda row: (-round(cosine[row], 6), row in targets, list(targets).index(row) if row in targets else row),
    )
    return [order.index(row) for row in targets]


def test_ranks_equal_those_of_the_sorted_database() -> None:
    queries, database, targets = problem()
    database[[7, 8]] = database[3].clone()  # copies of one image
    database[[11, 12]] = 0  # two unreadable images
    targets[0], targets[1] = np.array([12, 7, 3, 2]), np.array([3])
    ranks = target_ranks(queries, database, targets)
    assert [r.tolist() for r in ranks] == [by_sorting(q, database, s) for q, s in zip(queries, targets, strict=True)]


def test_block_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, database, targets = problem(queries=23, rows=97)
    database[40:60] = database[:20]
    expected = target_ranks(queries, database, targets)
    for size in (1, 7):
        monkeypatch.setattr(ranking, "QUERIES", size)
        for block_rows in (10, 97, 1000):
            blocks = target_ranks(queries, database, targets, block_rows=block_rows)
            for ranks, whole in zip(blocks, expected, strict=True):
                np.testing.assert_array_equal(ranks, whole)


def test_vector_lengths_do_not_matter() -> None:
    queries, database, targets = problem()
    longer = database * torch.rand(len(database), 1).add(0.1)
    expected = target_ranks(queries, database, targets)
    for ranks, whole in zip(target_ranks(3 * queries, longer, targets), expected, strict=True):
        np.testing.assert_array_equal(ranks, whole)


def test_constant_descriptors_retrieve_nothing() -> None:
    same = torch.ones(20, 4)
    assert target_ranks(same[:2], same, [np.array([0]), np.array([1, 0])])[0].tolist() == [19]
    assert sorted(target_ranks(same[:2], same, [np.array([0]), np.array([1, 0])])[1].tolist()) == [18, 19]


def test_nan_descriptors_are_refused() -> None:
    queries, database, targets = problem()
    database[3, 2] = torch.nan
    with pytest.raises(UserError, match="diverged"):
        target_ranks(queries, database, targets)
