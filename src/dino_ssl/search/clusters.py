"""Clusters of images: spherical k-means, or HDBSCAN for groups of any shape, with images that belong to none.

Shapes: N images, D feature dimensions, K clusters. Memory does not grow with N beyond a few numbers per image: clusters
are found on a sample, and every image is then assigned to one.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dino_ssl.errors import UserError, check_value, import_extra
from dino_ssl.formatting import Summarized
from dino_ssl.progress import Progress, ignore_progress
from dino_ssl.search.nearest import top_k
from dino_ssl.search.results import Arrays
from dino_ssl.viz.pca import principal_components

ROWS_PER_CLUSTER, MAX_ROWS = 256, 131_072
"""Rows of the sample for k-means: per cluster, as in faiss, and in total."""
SCORED_ROWS = 2000
"""Rows of the sample that chooses k; silhouettes need all of their distances."""
MAX_CHOSEN_K = 128
"""Clusters at most if `k` is not given: with more, the sample has too few rows of each."""
DENSITY_ROWS, DENSITY_COMPONENTS = 10_000, 32
"""Rows of the sample for HDBSCAN, whose time grows with their square, and their principal components."""
ITERATIONS = 25
BLOCK_ROWS, MAX_COSINES = 16_384, 2**25
"""Features that are read at once, and cosines that are computed at once: 128 MB."""
NOISE = -1


@dataclass(frozen=True, repr=False)
class Clusters(Summarized):
    """A partition of the images of an index."""

    assignment: np.ndarray
    """[N] int32: the cluster of each image, 0 to K - 1 by descending size; -1 (noise) for those of no cluster."""
    distances: np.ndarray
    """[N] float32, 0 to 2: one minus the cosine between the feature and the mean direction of its cluster."""
    sizes: list[int]
    """Images of each of the K clusters."""
    method: str
    """Algorithm, number of clusters, and the reason for it."""
    scores: dict[int, float] = field(default_factory=dict)
    """The silhouette of each number of clusters that was tried; empty if `k` was given."""
    agreement: dict[str, float] = field(default_factory=dict)
    """With labels: {"ami": adjusted mutual information, "purity": share of the images that have the most frequent
    label of their cluster, "images": labeled ones}; noise counts as one cluster."""

    def to_arrays(self) -> Arrays:
        """Return the clusters as arrays for a file."""
        details = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {"assignment": self.assignment, "distances": self.distances, "details": np.array(json.dumps(details))}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Clusters":
        """Return the clusters of `to_arrays`."""
        details = json.loads(str(arrays["details"]))
        details["scores"] = {int(k): score for k, score in details["scores"].items()}  # JSON has texts as keys
        return cls(arrays["assignment"], arrays["distances"], **details)

    @property
    def names(self) -> list[str]:
        """The name of the cluster of each image: its number, or `noise`."""
        return [cluster_name(number) for number in self.assignment.tolist()]

    @property
    def groups(self) -> Iterator[tuple[str, np.ndarray]]:
        """The name and the rows of each cluster, nearest to its center first; noise is last."""
        order = np.lexsort((self.distances, self.assignment))
        for number in [*range(len(self.sizes)), NOISE]:
            if len(rows := order[self.assignment[order] == number]):
                yield cluster_name(number), rows

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        noise = {"noise": int((self.assignment == NOISE).sum())} if NOISE in self.assignment else {}
        return {"method": self.method, "images": len(self.assignment), "sizes": self.sizes, **noise, **self.agreement}


def cluster_name(number: int) -> str:
    """Return the number of a cluster as text, or `noise`."""
    return "noise" if number == NOISE else str(number)


def find_clusters(
    features: Any,
    labels: Sequence[str | None],
    *,
    k: int | None = None,
    density: bool = False,
    min_size: int = 5,
    seed: int = 0,
    progress: Progress = ignore_progress,
) -> Clusters:
    """Partition features into clusters, deterministically.

    Args:
        features: [N, D] unit rows: an array, or anything whose slices and selections are arrays.
        labels: The class of each image or None, to measure the agreement of the clusters with them.
        k: Number of clusters. Default: the one with the highest mean silhouette of a sample (`choose_k`).
        density: HDBSCAN on principal components instead of k-means; it finds the number of clusters.
        min_size: Images of the smallest cluster of HDBSCAN; 5 as in scikit-learn.
        seed: Of the sample and of the initial centers.
        progress: Called with the numbers of images assigned and of all.
    """
    count = len(features)
    check_value("k", k, least=1, most=max(count, 1))
    check_value("min_size", min_size, least=2)
    if not count:
        raise UserError("The index has no images to cluster.")
    if density and k is not None:
        raise UserError("`density` finds the number of clusters itself: give either `k` or `density`.")
    scores: dict[int, float] = {}
    if density:
        rows = sample(count, DENSITY_ROWS, seed)
        found = hdbscan(floats(features, rows), min_size)
        nearest = found if len(rows) == count else found[nearest_rows(features, floats(features, rows), progress)]
        method = f"HDBSCAN, clusters of at least {min_size} images" + (
            f", on a sample of {len(rows):,}" if len(rows) < count else ""
        )
    else:
        if k is None:
            k, scores = choose_k(features, seed, progress)
        method = f"k-means, k = {k}" + (f", the highest silhouette ({scores[k]:.2f})" if scores else "")
        nearest = kmeans(features, k, seed, progress)
    assignment, sizes = by_size(nearest)
    distances = center_distances(features, assignment)
    return Clusters(assignment, distances, sizes, method, scores, label_agreement(assignment, labels))


def sample(count: int, most: int, seed: int) -> np.ndarray:
    """Return the sorted numbers of `most` random rows, or of all."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def floats(features: Any, rows: np.ndarray | slice) -> np.ndarray:
    """Return some rows as contiguous float32."""
    return np.ascontiguousarray(features[rows], dtype=np.float32)


def kmeans(features: Any, k: int, seed: int = 0, progress: Progress = ignore_progress) -> np.ndarray:
    """Return the cluster of each feature by k-means on a sample: int64 [N], with gaps if a cluster is empty."""
    rows = sample(len(features), min(MAX_ROWS, max(ROWS_PER_CLUSTER * k, SCORED_ROWS)), seed)
    return nearest_rows(features, spherical_kmeans(floats(features, rows), k, seed), progress)


def spherical_kmeans(rows: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Return the unit centers [K, D] of k-means by cosine, from centers chosen by k-means++: rows [n, D], K <= n."""
    if k >= len(rows):
        return rows
    start, _ = import_extra("sklearn.cluster", "search").kmeans_plusplus(rows, k, random_state=seed)
    settings = dict(niter=ITERATIONS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(rows))
    engine = import_extra("faiss", "search").Kmeans(rows.shape[1], k, spherical=True, **settings)
    engine.train(rows, init_centroids=start)
    return engine.centroids


def choose_k(features: Any, seed: int = 0, progress: Progress = ignore_progress) -> tuple[int, dict[int, float]]:
    """Return the number of clusters with the highest mean silhouette by cosine, and all silhouettes.

    The numbers tried are 2, 3, 4, 6, 8, 11, ...: powers of the square root of 2, up to MAX_CHOSEN_K and a fifth of the
    sample. Copies of an image count once.
    """
    rows = np.unique(floats(features, sample(len(features), SCORED_ROWS, seed)), axis=0)
    grid = [round(2 ** (power / 2)) for power in range(2, 2 * int(math.log2(MAX_CHOSEN_K)) + 1)]
    silhouette = import_extra("sklearn.metrics", "search").silhouette_score
    scores: dict[int, float] = {}
    for k in (k for k in grid if k <= max(2, len(rows) // 5) and k < len(rows)):
        progress(0, len(features))  # no image is assigned yet, but the caller may cancel
        assignment = nearest_rows(rows, spherical_kmeans(rows, k, seed))
        if len(set(assignment.tolist())) > 1:
            scores[k] = float(silhouette(rows, assignment, metric="cosine"))
    return (max(scores, key=lambda k: scores[k]), scores) if scores else (1, {})


def hdbscan(rows: np.ndarray, min_size: int) -> np.ndarray:
    """Return the cluster of each row [n, D] by density along their principal components, or -1: int64 [n]."""
    if len(rows) < min_size:
        return np.full(len(rows), NOISE)
    tensor = torch.from_numpy(rows)
    components = principal_components(tensor, DENSITY_COMPONENTS).project(tensor)
    engine = import_extra("sklearn.cluster", "search").HDBSCAN(min_cluster_size=min_size, copy=True)
    return engine.fit_predict(components.numpy())


def nearest_rows(features: Any, rows: np.ndarray, progress: Progress = ignore_progress) -> np.ndarray:
    """Return the number of the nearest of some rows [K, D] for each feature: int64 [N]."""
    nearest = np.empty(len(features), np.int64)
    step = max(1, min(BLOCK_ROWS, MAX_COSINES // len(rows)))
    for start in range(0, len(features), step):
        block = features[start : start + step]
        nearest[start : start + len(block)] = top_k(block, rows, 1, unit=True)[1][:, 0].numpy()
        progress(start + len(block), len(features))
    return nearest


def by_size(assignment: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return the clusters, numbered by descending size and without empty ones, int32 [N]; and their sizes."""
    old, sizes = np.unique(assignment[assignment != NOISE], return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    number = np.full(int(old.max(initial=0)) + 2, NOISE, np.int32)  # the last entry is that of noise
    number[old[order]] = np.arange(len(old))
    return number[assignment], sizes[order].tolist()


def center_distances(features: Any, assignment: np.ndarray) -> np.ndarray:
    """Return one minus the cosine between each feature and the mean direction of its cluster: float32 [N]."""
    groups = torch.from_numpy(assignment.astype(np.int64)) + 1  # noise is group 0
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(features), BLOCK_ROWS)]
    sums = torch.zeros(int(groups.max()) + 1, features.shape[1])
    for block in blocks:
        sums.index_add_(0, groups[block], torch.from_numpy(floats(features, block)))
    centers = F.normalize(sums, dim=1)
    cosines = [(torch.from_numpy(floats(features, block)) * centers[groups[block]]).sum(1) for block in blocks]
    return (1 - torch.cat(cosines)).clamp(min=0).numpy()


def label_agreement(assignment: np.ndarray, labels: Sequence[str | None]) -> dict[str, float]:
    """Return the agreement of clusters with the classes of the labeled images; empty with fewer than two classes."""
    labeled = [
        (cluster, label) for cluster, label in zip(assignment.tolist(), labels, strict=True) if label is not None
    ]
    if len({label for _, label in labeled}) < 2:
        return {}
    clusters, classes = zip(*labeled, strict=True)
    ami = import_extra("sklearn.metrics", "search").adjusted_mutual_info_score(classes, clusters)
    largest: dict[int, int] = {}
    for (cluster, _), number in Counter(labeled).items():
        largest[cluster] = max(number, largest.get(cluster, 0))
    return {"ami": float(ami), "purity": sum(largest.values()) / len(labeled), "images": len(labeled)}
