"""Nearest neighbors of the rows of an index."""

from typing import Any

import torch
from torch import Tensor

from dino_ssl.evals.nearest import top_k as top_k

QUERY_ROWS = 1024
"""Rows that are compared at once with all."""


def neighbors(rows: Any, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest other rows of each row [N, D]: cosines [N, k], best first, and row numbers [N, k]."""
    k = min(k, len(rows) - 1)
    cosines, nearest = torch.empty(len(rows), k), torch.empty(len(rows), k, dtype=torch.int64)
    for start in range(0, len(rows), QUERY_ROWS):
        part = slice(start, start + QUERY_ROWS)
        values, columns = top_k(rows[part], rows, k + 1, unit=True)
        own = columns == torch.arange(start, start + len(columns))[:, None]
        own[:, -1] |= ~own.any(1)  # more than k copies: the row itself is not among them
        cosines[part], nearest[part] = (each[~own].view(len(own), k) for each in (values, columns))
    return cosines, nearest
