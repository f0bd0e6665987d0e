"""Average precision, precision at k, junk and places against slow readings of their definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.evals import ranking
from dino_ssl.evals.ranking import average_precision, places_of, precision_at, ranked_places, without


def area(right: np.ndarray, positives: int) -> float:
    """Trapezoids under the curve of precision over recall, point by point down the whole ranking."""
    points, found = [(0.0, 1.0)], 0
    for seen, hit in enumerate(right, 1):
        found += hit
        points.append((found / positives, found / seen))
    return sum((r1 - r0) * (p0 + p1) / 2 for (r0, p0), (r1, p1) in pairwise(points))


def rankings(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(rng.integers(1, 40)) < rng.random() for _ in range(count)]


def test_average_precision_is_the_area_under_the_curve() -> None:
    for right in rankings(60):
        positives = int(right.sum()) + 2  # two are never found
        assert average_precision(np.flatnonzero(right), positives) == pytest.approx(area(right, positives), abs=1e-12)
    assert average_precision([0, 1, 2], 3) == 1
    assert average_precision([], 3) == 0
    assert average_precision([9], 1) == pytest.approx(1 / 20)


def test_precision_at_counts_up_to_the_last_positive() -> None:
    for right in rankings(60):
        places = np.flatnonzero(right)
        for k in (1, 5, 10):
            if len(places):
                first = min(k, places[-1] + 1)
                assert precision_at(places, k) == right[:first].mean()
    assert precision_at([0, 1, 2], 10) == 1
    assert precision_at([0, 9], 10) == 0.2


def test_junk_is_taken_out_of_the_ranking() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        kinds = rng.choice(["right", "junk", "wrong"], 30)
        places, junk = np.flatnonzero(kinds == "right"), np.flatnonzero(kinds == "junk")
        np.testing.assert_array_equal(without(places, junk), np.flatnonzero(kinds[kinds != "junk"] == "right"))


def test_places_in_a_given_ranking() -> None:
    assert ranked_places(np.array([4, 2, 0, 3, 1]), [1, 4]).tolist() == [0, 4]
    assert ranked_places(np.array([4, 2, 0, 3, 1]), []).tolist() == []


def problem(queries: int = 9, rows: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    make = torch.Generator().manual_seed(seed)
    sought = [rng.choice(rows, rng.integers(0, 7), replace=False) for _ in range(queries)]
    return torch.randn(queries, 5, generator=make), torch.randn(rows, 5, generator=make), sought


def by_sorting(query: Tensor, database: Tensor, sought: np.ndarray) -> list[int]:
    """The whole ranking; of equal rows those first that are not sought."""
    cosine = [float(query @ row / (query.norm() * row.norm())) if row.any() else -2.0 for row in database]
    order = sorted(
        range(len(database)),
        key=lambda row: (-round(cosine[row], 6), row in sought, list(sought).index(row) if row in sought else row),
    )
    return [order.index(row) for row in sought]


def test_places_are_those_of_the_sorted_database() -> None:
    queries, database, sought = problem()
    database[[7, 8]] = database[3].clone()  # copies of one picture
    database[[11, 12]] = 0  # two that could not be read
    sought[0], sought[1] = np.array([12, 7, 3, 2]), np.array([3])
    places = places_of(queries, database, sought)
    assert [p.tolist() for p in places] == [by_sorting(q, database, s) for q, s in zip(queries, sought, strict=True)]


def test_blocks_change_nothing_and_are_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, database, sought = problem(queries=23, rows=97)
    database[40:60] = database[:20]
    sizes, cosines = [], ranking.cosines

    def watched(*both: Tensor) -> Tensor:
        sizes.append([len(side) for side in both])
        return cosines(*both)

    whole = places_of(queries, database, sought)
    monkeypatch.setattr(ranking, "cosines", watched)
    for block in ((4, 10), (1, 1), (23, 97), (7, 1000)):
        sizes.clear()
        for one, expected in zip(places_of(queries, database, sought, block=block), whole, strict=True):
            np.testing.assert_array_equal(one, expected)
        assert all((q <= block[0] and n <= block[1]) or (q == 1 and n <= 6) for q, n in sizes)  # 6: the sought


def test_the_length_of_a_vector_does_not_count() -> None:
    queries, database, sought = problem()
    longer = database * torch.rand(len(database), 1).add(0.1)
    for one, other in zip(places_of(queries, database, sought), places_of(3 * queries, longer, sought), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_vector_for_everything_finds_nothing() -> None:
    same = torch.ones(20, 4)
    assert places_of(same[:2], same, [np.array([0]), np.array([1, 0])])[0].tolist() == [19]
    assert sorted(places_of(same[:2], same, [np.array([0]), np.array([1, 0])])[1].tolist()) == [18, 19]


def test_features_that_are_no_numbers_are_refused() -> None:
    queries, database, sought = problem()
    database[3, 2] = torch.nan
    with pytest.raises(UserError, match="diverged"):
        places_of(queries, database, sought)
