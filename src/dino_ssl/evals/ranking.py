"""Search, scored: the place of what is sought in a ranking, average precision, precision at k.

Legend of the shapes: Q queries, N database rows, D width. Places count from 0, the best.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

QUERIES, ROWS = 256, 4096  # a block of similarities: 8 MB in float64, whatever the database


def average_precision(places: Sequence[int] | np.ndarray, positives: int) -> float:
    """Area under precision over recall by trapezoids: each positive adds the mean of the precisions before and at it.

    places: of the positives that were found, ascending; positives: how many there are. As the benchmarks of
    Oxford, Paris, Holidays and Copydays score; a lone positive at place r > 0 gives 1 / (2 (r + 1)).
    """
    area, step = 0.0, 1 / positives
    for found, place in enumerate(map(int, places)):
        before = found / place if place else 1.0
        area += (before + (found + 1) / (place + 1)) * step / 2
    return area


def precision_at(places: Sequence[int] | np.ndarray, k: int) -> float:
    """Share of positives among the first k, or up to the last positive where that comes sooner.

    places: of all positives, at least one, ascending. Not to count what comes after the last positive is the
    revisited benchmarks' rule: a query with 3 positives on top has mP@10 = 1.
    """
    seen = np.asarray(places) + 1
    first = min(int(seen[-1]), k)
    return int((seen <= first).sum()) / first


def without(places: np.ndarray, junk: np.ndarray) -> np.ndarray:
    """The places of a ranking from which the rows at `junk` are taken out; both ascending."""
    return places - np.searchsorted(junk, places)


def ranked_places(ranking: np.ndarray, sought: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where in a whole ranking (database rows, best first) the sought rows stand, ascending."""
    return np.flatnonzero(np.isin(ranking, np.asarray(sought, dtype=np.int64)))


def mean(values: Sequence[float]) -> float:
    """In order, one after the other: pairwise sums would differ from the official scorers in the last digit."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def places_of(
    queries: Tensor,  # [Q, D]
    database: Tensor,  # [N, D]
    sought: Sequence[np.ndarray],  # Q times row numbers of the database
    *,
    block: tuple[int, int] = (QUERIES, ROWS),
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """For every query the places of its sought rows when all rows are ranked by cosine; in the order of `sought`.

    No ranking and no matrix [Q, N] is ever made: what lies before a sought row is counted, block by block. Ties
    count against the sought: an equal row that is not sought stands before it, so that a network that gives one
    vector to everything finds nothing. A row of zeros (a picture that could not be read) stands last.

    Cosines are taken in float64 and compared in float32: then they do not depend on the blocks, and copies of one
    picture are equal.
    """
    if not (queries.isfinite().all() and database.isfinite().all()):
        raise UserError("The descriptors are not all finite numbers: has the network's training diverged?")
    with torch.inference_mode():
        out: list[np.ndarray] = []
        for start in range(0, len(queries), block[0]):
            part = slice(start, start + block[0])
            out += _places(queries[part], database, [torch.as_tensor(s) for s in sought[part]], block[1])
            if progress is not None:
                progress(min(start + block[0], len(queries)), len(queries))
    return out


def _places(queries: Tensor, database: Tensor, sought: list[Tensor], rows: int) -> list[np.ndarray]:
    width = max((len(s) for s in sought), default=0)
    own = torch.full((len(queries), width), torch.inf)  # nothing comes before what is only padding
    for q, wanted in enumerate(sought):
        own[q, : len(wanted)] = cosines(queries[q : q + 1], database[wanted])[0]
    before = torch.zeros(len(queries), width, dtype=torch.int64)
    owner = torch.cat([torch.full((len(s),), q) for q, s in enumerate(sought)])
    wanted = torch.cat(sought)
    for start in range(0, len(database), rows):
        similarity = cosines(queries, database[start : start + rows])
        inside = (wanted >= start) & (wanted < start + rows)
        similarity[owner[inside], wanted[inside] - start] = -torch.inf  # the sought are not before each other here
        ordered = similarity.sort(dim=1).values
        before += ordered.shape[1] - torch.searchsorted(ordered, own)  # as many are at least as near
    return [_among(own[q, : len(s)], before[q, : len(s)]) for q, s in enumerate(sought)]


def _among(own: Tensor, before: Tensor) -> np.ndarray:
    """Places, from how many others come before each sought row: better sought rows come before it too."""
    order = own.sort(descending=True, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return (before + place).numpy()


def cosines(queries: Tensor, rows: Tensor) -> Tensor:
    """[Q, D], [n, D] -> [Q, n] float32; -2, below any cosine, for a row of zeros."""
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    return similarity.float().masked_fill((rows == 0).all(1), -2.0)
