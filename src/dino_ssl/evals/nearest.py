"""Exact nearest neighbors by cosine, in blocks.

Shapes: Q queries, N rows, D dimensions.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.evals.base import full_precision

BLOCK_ROWS = 65536
"""Rows per block: 64 MB of similarities for 256 queries."""
CACHE_ROWS = 1024
"""float16 rows that are converted at once on a CPU: 1.5 MB of 384 dimensions stay in the cache."""
GROUP_COLUMNS = 64
"""Columns whose maximum is taken first."""


def top_k(
    queries: Any,
    rows: Any,
    k: int,
    *,
    where: np.ndarray | None = None,
    unit: bool = False,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Return the k nearest rows of each query, best first: cosines [Q, k] float32 and row numbers [Q, k] int64.

    Computed in float32: at temperature 0.07, a bfloat16 error of 0.004 in a cosine changes a vote of k-NN by 6 %.
    Equal cosines are ordered by row. If there are fewer rows than k, all are returned.

    Args:
        queries: [Q, D], a tensor or array. It decides the device.
        rows: [N, D] of any floating type, a tensor, an array, or anything whose slices are arrays (memory-mapped
            shards); one block at a time is converted.
        k: Number of rows, at least 1.
        where: [N] True for the rows that are compared; others have the cosine -inf.
        unit: The rows have unit length already.
        block_rows: Rows that are compared at once.
    """
    queries = torch.as_tensor(queries)
    with full_precision(queries.device):
        queries = F.normalize(queries.float(), dim=1)
        best = queries.new_empty(len(queries), 0)
        nearest = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start, cosines in cosine_blocks(queries, rows, unit=unit, block_rows=block_rows):
            if where is not None:
                part = where[start : start + cosines.shape[1]]
                cosines[:, ~torch.as_tensor(part, device=cosines.device)] = -torch.inf
            values, columns = _largest(cosines, k)
            best, nearest = torch.cat([best, values], 1), torch.cat([nearest, columns + start], 1)
            best, keep = _largest(best, k)  # earlier rows come first, and stay first among equal ones
            nearest = nearest.gather(1, keep)
    return best, nearest


def cosine_blocks(
    queries: Tensor, rows: Any, *, unit: bool = False, block_rows: int = BLOCK_ROWS
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row of each block and its cosines with unit queries [Q, D]: [Q, at most block_rows].

    Computed in the type of the queries and on their device; in float32 within `full_precision`. Each tensor overwrites
    the one before. `rows` and `unit` as in `top_k`.
    """
    buffer = queries.new_empty(len(queries), min(block_rows, len(rows)))
    for start in range(0, len(rows), block_rows):
        yield start, _cosines(queries, torch.as_tensor(rows[start : start + block_rows]), unit, buffer)


def _cosines(queries: Tensor, rows: Tensor, unit: bool, buffer: Tensor) -> Tensor:
    """Return queries [Q, D] times rows [n, D], in the first columns of the buffer."""
    out = buffer[:, : len(rows)]
    if not unit or rows.dtype == queries.dtype or queries.device.type != "cpu":
        rows = rows.to(queries)
        return torch.mm(queries, (rows if unit else F.normalize(rows, dim=1)).T, out=out)
    cached = queries.new_empty(CACHE_ROWS, rows.shape[1])  # reused: new memory costs as much as the product
    for start in range(0, len(rows), CACHE_ROWS):
        part = rows[start : start + CACHE_ROWS]
        torch.mm(queries, cached[: len(part)].copy_(part).T, out=out[:, start : start + len(part)])
    return out


def _topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `values.topk(k, dim=1)`, any of equal ones; a quarter of its time on long lines on a CPU.

    The k largest values of a line are in the groups of the k largest maxima.
    """
    groups = values.shape[1] // GROUP_COLUMNS
    if groups < 4 * k or values.device.type != "cpu":
        return values.topk(k, dim=1)
    maxima = values[:, : groups * GROUP_COLUMNS].unflatten(1, (groups, GROUP_COLUMNS)).amax(2)
    columns = GROUP_COLUMNS * maxima.topk(k, dim=1).indices[:, :, None] + torch.arange(GROUP_COLUMNS)
    ungrouped = torch.arange(groups * GROUP_COLUMNS, values.shape[1]).expand(len(values), -1)
    columns = torch.cat([columns.flatten(1), ungrouped], 1)
    largest, places = values.gather(1, columns).topk(k, dim=1)
    return largest, columns.gather(1, places)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each line, descending, and their columns; the first of equal ones first."""
    k = min(k, values.shape[1])
    largest, columns = _topk(values, min(k + 1, values.shape[1]))
    if largest.shape[1] > k:
        tied = (largest[:, k] == largest[:, k - 1]).nonzero()[:, 0]  # topk returns any of the equal ones
        columns = columns[:, :k].clone()
        for line in tied.tolist():
            above = (values[line] > largest[line, k]).nonzero()[:, 0]
            equal = (values[line] == largest[line, k]).nonzero()[: k - len(above), 0]
            columns[line] = torch.cat([above, equal])
    columns = columns.sort(dim=1).values
    largest, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return largest, columns.gather(1, order)
