"""Images to label first, or to look at: a spread, a typical, or an unusual subset.

Shapes: N images, D feature dimensions, n images to select.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dino_ssl.errors import UserError, check_value
from dino_ssl.progress import Progress, ignore_progress
from dino_ssl.search.clusters import BLOCK_ROWS, floats, kmeans, sample
from dino_ssl.search.nearest import neighbors, top_k

Method = Literal["coverage", "typical", "outliers"]
NEIGHBORS = {"typical": 20, "outliers": 5}
"""Neighbors whose mean cosine is the density of an image: as in TypiClust, and few for outliers."""
MAX_CLUSTERS = 500
"""Clusters of `typical` at most, as in TypiClust: with more, they are single images."""
MAX_MEMBERS = 4096
"""Members of a cluster among which neighbors are searched; from a larger one, a random sample is taken."""
CANDIDATES = 256


class Selection(NamedTuple):
    """Selected images, in the order in which to label them."""

    rows: np.ndarray
    """int64 [n]."""
    scores: np.ndarray
    """float32 [n], one minus a cosine: to the nearest image selected before (coverage), or the mean over the nearest
    neighbors (typical: low; outliers: high)."""


def select(
    features: Any,
    count: int,
    *,
    method: Method = "coverage",
    labeled: Sequence[int] = (),
    seed: int = 0,
    progress: Progress = ignore_progress,
) -> Selection:
    """Select images, deterministically; fewer if not so many are left.

    Args:
        features: [N, D] unit rows: an array, or anything whose slices and selections are arrays.
        count: Number of images.
        method: "coverage": each image is the one farthest from all before it, which covers the dataset with the
            smallest radius up to a factor of 2 (Gonzalez 1985; for labeling: Sener and Savarese 2018). "typical": the
            densest image of each of as many clusters, largest first (TypiClust, Hacohen et al. 2022). "outliers": the
            lowest mean cosine to the nearest neighbors.
        labeled: Rows that are labeled already. They are not selected, and count as selected before.
        seed: Of k-means, for "typical".
        progress: Called with the numbers of images selected and of all.
    """
    check_value("count", count, least=1)
    known = np.unique(np.asarray(labeled, np.int64))
    if len(known) == len(features):
        raise UserError(f"No image is left to select: all {len(features):,} of the index are labeled.")
    count = min(count, len(features) - len(known))
    if method == "coverage":
        return farthest_first(features, count, known, progress)
    if method == "typical":
        return most_typical(features, count, known, seed, progress)
    distances = neighbor_distances(features, NEIGHBORS["outliers"])
    distances[known] = -1
    rows = np.argsort(-distances, kind="stable")[:count]
    return Selection(rows, distances[rows])


def farthest_first(features: Any, count: int, start: np.ndarray, progress: Progress = ignore_progress) -> Selection:
    """Return rows, each the farthest from `start` and from those before it (k-center greedy).

    Without `start`, the first is the row nearest to the mean, whose score is 1.
    """
    distances = np.full(len(features), np.inf, np.float32)
    for done in range(0, len(start), BLOCK_ROWS):
        _approach(distances, features, floats(features, start[done : done + BLOCK_ROWS]))
    rows, scores = [], []
    for _ in range(count):
        if not (rows or len(start)):
            row, score = _central_row(features), 1.0
        else:
            row = int(distances.argmax())
            score = max(float(distances[row]), 0.0)  # rounding
        rows.append(row)
        scores.append(score)
        _approach(distances, features, floats(features, np.array([row])))
        distances[[*rows, *start]] = -1  # rounding, and copies, must not select a row twice
        progress(len(rows), count)
    return Selection(np.array(rows), np.array(scores, np.float32))


def _approach(distances: np.ndarray, features: Any, rows: np.ndarray) -> None:
    """Lower each distance [N] to that of the nearest of some rows [m, D]."""
    targets = torch.from_numpy(rows).T
    for start in range(0, len(features), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        cosines = torch.from_numpy(floats(features, block)) @ targets
        np.minimum(distances[block], 1 - cosines.amax(1).numpy(), out=distances[block])


def _central_row(features: Any) -> int:
    """Return the row nearest to the mean of all."""
    blocks = range(0, len(features), BLOCK_ROWS)
    mean = sum(floats(features, slice(start, start + BLOCK_ROWS)).sum(0) for start in blocks)
    return int(top_k(np.asarray(mean)[None], features, 1, unit=True)[1])


def most_typical(
    features: Any, count: int, known: np.ndarray, seed: int, progress: Progress = ignore_progress
) -> Selection:
    """Return the densest image of the cluster with the fewest known or selected ones, the largest of these first."""
    assignment = kmeans(features, min(len(known) + count, MAX_CLUSTERS, len(features)), seed)
    queues: dict[int, list[tuple[float, int]]] = {}
    taken = dict.fromkeys(np.unique(assignment).tolist(), 0) | Counter(assignment[known].tolist())
    sizes = np.bincount(assignment)
    heap = [(number, -int(sizes[cluster]), cluster) for cluster, number in taken.items()]
    heapq.heapify(heap)
    selected: list[tuple[float, int]] = []
    while len(selected) < count:
        number, size, cluster = heapq.heappop(heap)
        if cluster not in queues:
            queues[cluster] = by_density(features, np.flatnonzero(assignment == cluster), known, seed)
        if queues[cluster]:
            selected.append(queues[cluster].pop())
            heapq.heappush(heap, (number + 1, size, cluster))
            progress(len(selected), count)
    scores, rows = zip(*selected, strict=True)
    return Selection(np.array(rows), np.array(scores, np.float32))


def by_density(features: Any, members: np.ndarray, known: np.ndarray, seed: int) -> list[tuple[float, int]]:
    """Return (mean distance to the nearest members, row) of the members that are not known, the densest last."""
    members = members[sample(len(members), MAX_MEMBERS, seed)]
    distances = neighbor_distances(floats(features, members), NEIGHBORS["typical"])
    unknown = ~np.isin(members, known)
    pairs = zip(distances[unknown].tolist(), members[unknown].tolist(), strict=True)
    return sorted(pairs, reverse=True)


def neighbor_distances(rows: Any, k: int) -> np.ndarray:
    """Return one minus the mean cosine of each row to its k nearest others, fewer if there are not so many: [N]."""
    if len(rows) < 2:
        return np.zeros(len(rows), np.float32)
    cosines, nearest = neighbors(rows, k)
    is_known = nearest >= 0  # an approximate search may miss some
    mean = cosines.where(is_known, 0).sum(1) / is_known.sum(1).clamp(min=1)
    return (1 - mean).clamp(min=0).numpy()


def representatives(features: Any, members: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` rows that show a cluster: the nearest to its center, and diverse ones of its inner half.

    members: the rows of the cluster, nearest to its center first.
    """
    inner = members[: max(count, min(len(members) // 2, CANDIDATES))]
    chosen = farthest_first(floats(features, inner), min(count, len(inner)) - 1, np.array([0])).rows
    return inner[[0, *chosen]]
