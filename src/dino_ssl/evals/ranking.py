"""Ranked retrieval: ranks of target rows, average precision, precision at k.

Shapes: Q queries, N database rows, D dimensions. Ranks count from 0, the best.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.evals.base import check_finite
from dino_ssl.evals.nearest import BLOCK_ROWS, cosine_blocks
from dino_ssl.progress import Progress

QUERIES = 64  # queries at once: 5 MB of similarities in float64 for a database of 10,000 images


def average_precision(ranks: Sequence[int] | np.ndarray, positives: int) -> float:
    """Return the area under the precision-recall curve, given the ascending ranks of the positives that were found.

    Each positive adds the mean of the precision before it and at it, as in the official scorers of Oxford, Paris,
    Holidays and Copydays; a single positive at rank r > 0 gives 1 / (2 (r + 1)).
    """
    area, step = 0.0, 1 / positives
    for count, rank in enumerate(map(int, ranks)):
        before = count / rank if rank else 1.0
        area += (before + (count + 1) / (rank + 1)) * step / 2
    return area


def precision_at(ranks: Sequence[int] | np.ndarray, k: int) -> float:
    """Return the precision at k, given the ascending ranks of all positives, at least one.

    The revisited benchmarks ignore results after the last positive: 3 positives at the top give mP@10 = 1.
    """
    counts = np.asarray(ranks) + 1
    first = min(int(counts[-1]), k)
    return int((counts <= first).sum()) / first


def remove_junk(ranks: np.ndarray, junk: np.ndarray) -> np.ndarray:
    """Return the ranks after the rows at the ranks `junk` are removed from the ranking; both ascending."""
    return ranks - np.searchsorted(junk, ranks)


def sequential_mean(values: Sequence[float]) -> float:
    """Return the mean, summed in order as the official scorers do: pairwise summation differs in the last digit."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else float("nan")


def target_ranks(
    queries: Tensor,  # [Q, D]
    database: Tensor,  # [N, D]
    targets: Sequence[np.ndarray],  # Q arrays of row indices of the database
    progress: Progress = lambda done, total: None,
    *,
    block_rows: int = BLOCK_ROWS,
) -> list[np.ndarray]:
    """Return the ranks of each query's targets when all database rows are ranked by cosine, in the order of `targets`.

    The rows before a target are counted. A row that equals a target but is not one ranks before it, so constant
    descriptors score worst. A row of zeros (an image that could not be read) ranks last. Cosines are computed in
    float64 and compared in float32, so that copies of an image are equal.
    """
    check_finite("Descriptors", queries, database)
    rows, is_empty = F.normalize(database.double(), dim=1), (database == 0).all(1)
    ranks: list[np.ndarray] = []
    for block in F.normalize(queries.double(), dim=1).split(QUERIES):
        cosines = block.new_empty(len(block), len(rows), dtype=torch.float32)
        for start, part in cosine_blocks(block, rows, unit=True, block_rows=block_rows):
            cosines[:, start : start + part.shape[1]] = part
        for similarity in cosines.masked_fill(is_empty, -2.0):  # below any cosine
            indices = torch.as_tensor(targets[len(ranks)])
            of_targets = similarity[indices]
            similarity[indices] = -torch.inf
            before = len(similarity) - torch.searchsorted(similarity.sort().values, of_targets)
            among_targets = of_targets.argsort(descending=True, stable=True).argsort()
            ranks.append((before + among_targets).numpy())
        progress(len(ranks), len(queries))
    return ranks
