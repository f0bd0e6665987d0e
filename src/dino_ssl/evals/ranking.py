"""Ranked retrieval: ranks of target rows, average precision, precision at k.

Shapes: Q queries, N database rows, D dimensions. Ranks count from 0, the best.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

QUERIES, ROWS = 256, 4096  # a block of similarities: 8 MB in float64 for any database


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
    """Return the mean, summed in order: pairwise summation differs from the official scorers in the last digit."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def target_ranks(
    queries: Tensor,  # [Q, D]
    database: Tensor,  # [N, D]
    targets: Sequence[np.ndarray],  # Q arrays of row indices of the database
    *,
    block: tuple[int, int] = (QUERIES, ROWS),
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Return the ranks of each query's targets when all database rows are ranked by cosine, in the order of `targets`.

    The ranking and the matrix [Q, N] are never stored: rows before a target are counted block by block. A row that
    equals a target but is not one ranks before it, so constant descriptors score worst. A row of zeros (an image
    that could not be read) ranks last.

    Cosines are computed in float64 and compared in float32, so they do not depend on the block size, and copies of an
    image are equal.
    """
    if not (queries.isfinite().all() and database.isfinite().all()):
        raise UserError("Descriptors contain NaN or infinity: the training of this network has probably diverged.")
    with torch.inference_mode():
        ranks: list[np.ndarray] = []
        for start in range(0, len(queries), block[0]):
            part = slice(start, start + block[0])
            ranks += _block_ranks(queries[part], database, [torch.as_tensor(t) for t in targets[part]], block[1])
            if progress is not None:
                progress(min(start + block[0], len(queries)), len(queries))
    return ranks


def _block_ranks(queries: Tensor, database: Tensor, targets: list[Tensor], block_rows: int) -> list[np.ndarray]:
    width = max((len(t) for t in targets), default=0)
    similarity = torch.full((len(queries), width), torch.inf)  # no row ranks before the padding
    for q, rows in enumerate(targets):
        similarity[q, : len(rows)] = cosines(queries[q : q + 1], database[rows])[0]
    before = torch.zeros(len(queries), width, dtype=torch.int64)
    owner = torch.cat([torch.full((len(t),), q) for q, t in enumerate(targets)])
    target_rows = torch.cat(targets)
    for start in range(0, len(database), block_rows):
        block = cosines(queries, database[start : start + block_rows])
        inside = (target_rows >= start) & (target_rows < start + block_rows)
        block[owner[inside], target_rows[inside] - start] = -torch.inf  # targets are counted in `_add_targets`
        ordered = block.sort(dim=1).values
        before += ordered.shape[1] - torch.searchsorted(ordered, similarity)  # rows that are at least as similar
    return [_add_targets(similarity[q, : len(t)], before[q, : len(t)]) for q, t in enumerate(targets)]


def _add_targets(similarity: Tensor, before: Tensor) -> np.ndarray:
    """Add the number of more similar targets to the number of other rows before each target."""
    order = similarity.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return (before + rank).numpy()


def cosines(queries: Tensor, rows: Tensor) -> Tensor:
    """Return cosines [Q, n] in float32 for [Q, D] and [n, D]; -2, below any cosine, for a row of zeros."""
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    return similarity.float().masked_fill((rows == 0).all(1), -2.0)
