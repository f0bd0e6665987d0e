"""Nearest neighbors of the rows of an index."""

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_ssl.evals.nearest import top_k as top_k
from dino_ssl.progress import Progress, ignore_progress
from dino_ssl.search.approximate import build_ivf

QUERY_ROWS = 1024
"""Rows that are compared at once with all."""
EXACT_ROWS = 50_000
"""Rows of which the neighbors are always exact: 10 s on two cores, and four times as long for twice as many."""


def neighbors(
    rows: Any, k: int, progress: Progress = ignore_progress, *, probes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k nearest other rows of each unit row [N, D]: cosines [N, k], best first, and row numbers [N, k].

    With faiss, those of more than EXACT_ROWS rows are approximate: 99 % of the 10 nearest are found. A neighbor that is
    missing has the row -1 and a cosine below -1. probes: inverted lists that are compared with each row, instead of as
    many as that needs.
    """
    k = min(k, len(rows) - 1)
    ivf = build_ivf(rows)[0] if len(rows) > EXACT_ROWS and importlib.util.find_spec("faiss") else None
    if ivf is not None and probes is not None:
        ivf.nprobe = min(probes, ivf.nlist)
    cosines, nearest = torch.empty(len(rows), k), torch.empty(len(rows), k, dtype=torch.int64)
    for start in range(0, len(rows), QUERY_ROWS):
        part = slice(start, start + QUERY_ROWS)
        if ivf is None:
            values, columns = top_k(rows[part], rows, k + 1, unit=True)
        else:
            values, columns = map(torch.from_numpy, ivf.search(rows[part].astype(np.float32), k + 1))
        own = columns == torch.arange(start, start + len(columns))[:, None]
        own[:, -1] |= ~own.any(1)  # the row itself is not among them if it has more than k copies
        cosines[part], nearest[part] = (each[~own].view(len(own), k) for each in (values, columns))
        progress(start + len(own), len(rows))
    return cosines, nearest
