"""Clusters: groups that are far apart are found, numbered by size, and compared with labels."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from dino_ssl.errors import UserError
from dino_ssl.search import clusters
from dino_ssl.search.clusters import NOISE, choose_k, find_clusters, label_agreement, spherical_kmeans


def mixture(sizes: tuple[int, ...] = (40, 30, 20, 10), width: int = 16, noise: float = 0.15, seed: int = 0):
    """Return unit rows [N, D] float16 around orthogonal directions, shuffled, and their groups."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = np.eye(width)[groups] + noise * rng.normal(size=(len(groups), width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), groups


def test_groups_are_found_and_numbered_by_size() -> None:
    rows, groups = mixture()
    found = find_clusters(rows, [f"class {group}" for group in groups])
    assert "k = 4" in found.method
    assert found.sizes == [40, 30, 20, 10]
    np.testing.assert_array_equal(found.assignment, groups)
    assert found.agreement == {"ami": 1.0, "purity": 1.0, "images": 100}
    assert [(name, len(members)) for name, members in found.groups] == [("0", 40), ("1", 30), ("2", 20), ("3", 10)]


def test_distances_are_those_to_the_mean_direction_of_the_cluster() -> None:
    rows, groups = mixture()
    found, exact = find_clusters(rows, [None] * 100, k=4), rows.astype(np.float64)
    for name, members in found.groups:
        center = exact[groups == int(name)].sum(0)
        expected = 1 - exact[members] @ center / np.linalg.norm(center)
        np.testing.assert_allclose(found.distances[members], expected, atol=1e-5)
        assert (np.diff(found.distances[members]) >= 0).all()
    assert not found.agreement


@pytest.mark.parametrize("density", [False, True])
def test_samples_and_blocks_change_nothing_in_separate_groups(density: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, groups = mixture()
    monkeypatch.setattr(clusters, "BLOCK_ROWS", 7)
    monkeypatch.setattr(clusters, "MAX_ROWS", 60)
    monkeypatch.setattr(clusters, "DENSITY_ROWS", 80)
    first, again = (
        find_clusters(rows, [None] * 100, k=None if density else 4, density=density, min_size=4) for _ in range(2)
    )
    np.testing.assert_array_equal(first.assignment, groups)
    np.testing.assert_array_equal(first.assignment, again.assignment)
    assert ("sample of 80" in first.method) == density


def test_centers_are_fixed_points_of_kmeans() -> None:
    rows = mixture(noise=0.4)[0].astype(np.float32)
    centers = spherical_kmeans(rows, 5, seed=3)
    nearest = (rows @ centers.T).argmax(1)
    for number, center in enumerate(centers):
        mean = rows[nearest == number].sum(0)
        np.testing.assert_allclose(center, mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_array_equal(centers, spherical_kmeans(rows, 5, seed=3))


def test_the_number_of_clusters_has_the_highest_silhouette() -> None:
    rows, groups = mixture((30, 30, 30, 30, 30, 30))
    k, scores = choose_k(rows)
    assert k == 6
    assert list(scores) == [2, 3, 4, 6, 8, 11, 16, 23, 32]
    cosine = 1 - rows.astype(np.float64) @ rows.astype(np.float64).T
    own = np.array([cosine[i][groups == groups[i]].sum() / 29 for i in range(180)])
    other = np.array([min(cosine[i][groups == g].mean() for g in range(6) if g != groups[i]) for i in range(180)])
    assert scores[6] == pytest.approx(((other - own) / np.maximum(own, other)).mean(), abs=2e-3)


def test_density_leaves_single_images_as_noise() -> None:
    rows, groups = mixture((30, 20, 1, 1, 1))
    found = find_clusters(rows, [None] * 53, density=True, min_size=5)
    assert found.sizes == [30, 20]
    assert (found.assignment[groups > 1] == NOISE).all()
    assert [name for name, _ in found.groups] == ["0", "1", "noise"]
    assert found.summary["noise"] == 3


def test_agreement_counts_labeled_images_only() -> None:
    result = label_agreement(np.array([0, 0, 0, 1, 1, NOISE]), ["a", "a", "b", "b", None, "b"])
    assert result["purity"] == pytest.approx(4 / 5)
    assert result["images"] == 5
    assert result["ami"] == adjusted_mutual_info_score(["a", "a", "b", "b", "b"], [0, 0, 0, 1, NOISE])
    assert label_agreement(np.zeros(3), ["a", None, "a"]) == {}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_few_or_equal_images_are_clustered(count: int) -> None:
    rows = mixture()[0][:count]
    for options in ({}, {"k": count}, {"density": True}):
        assert len(find_clusters(rows, [None] * count, **options).assignment) == count
        copies = find_clusters(np.repeat(rows[:1], count, 0), [None] * count, **options)
        assert len(copies.sizes) <= 1
        assert copies.distances.max() < 5e-4


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (0, {}, "no images"),
        (5, {"k": 6}, "`k` must be at least 1 and at most 5"),
        (5, {"k": 2, "density": True}, "either `k` or `density`"),
        (5, {"density": True, "min_size": 1}, "`min_size` must be at least 2"),
    ],
)
def test_bad_settings_are_refused(rows: int, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_clusters(mixture()[0][:rows], [None] * rows, **options)
