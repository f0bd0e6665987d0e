"""Approximate search: faiss's inverted lists of float16 vectors, for indexes of 100,000 images and more.

    approximate.json       the generation that it belongs to, the probed lists, and the measured recall
    approximate-G.faiss    memory-mapped

The rows are grouped by k-means; a query is compared with those of the nearest groups. Cosines are those of exact
search. If the rows of the index have changed, it is out of date and not used until it is built again.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_ssl.config import from_dict, to_dict
from dino_ssl.errors import UserError, import_extra
from dino_ssl.evals.nearest import top_k
from dino_ssl.files import atomic_write, read_json, write_json
from dino_ssl.formatting import visible

INFO = "approximate.json"
FORMAT = 1
"""Version of approximate.json."""
RECALL = 0.99
"""Share of the 10 nearest rows that should be found; decides how many lists are probed."""
MAX_K = 100
"""Longer results are searched exactly: the recall is measured for 10."""
TRAINING_ROWS, ITERATIONS = 40, 6
"""Of k-means: rows per list, and iterations. More of both did not improve the recall, and take longer than the rest."""
TEST_QUERIES = 200
BLOCK_ROWS = 65536


@dataclass(frozen=True, kw_only=True)
class ApproximateInfo:
    """The content of approximate.json."""

    format: int = FORMAT
    generation: int
    lists: int
    probes: int
    """Lists that are compared with a query."""
    recall: float
    """Recall of the 10 nearest rows against exact search, over rows of the index as queries."""


def build_ivf(features: Any) -> tuple[Any, int, float]:
    """Return (faiss index of the rows [N, D], number of lists to probe, measured recall).

    Raises UserError if faiss is not installed.
    """
    faiss, count, width = import_extra("faiss", "search"), len(features), features.shape[1]
    lists = min(max(count, 1), 2 ** round(np.log2(2 * max(count, 1) ** 0.5)))  # 1,024 of 200,000 rows
    ivf = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    sample = np.random.default_rng(0).permutation(count)[: TRAINING_ROWS * lists]
    ivf.cp.niter, ivf.cp.min_points_per_centroid = ITERATIONS, 1  # faiss prints a warning for fewer than 39
    ivf.train(features[np.sort(sample)].astype(np.float32))
    for start in range(0, count, BLOCK_ROWS):
        ivf.add(features[start : start + BLOCK_ROWS].astype(np.float32))
    return ivf, *_choose_probes(ivf, features)


def _choose_probes(ivf: Any, features: Any) -> tuple[int, float]:
    """Return the number of lists to probe for RECALL, at most all, and the recall of the nearest other rows."""
    rows = np.sort(np.random.default_rng(1).permutation(len(features))[:TEST_QUERIES])
    queries = features[rows].astype(np.float32)
    exact = top_k(torch.from_numpy(queries), features, 11, unit=True)[1]
    probes = 1
    while True:
        ivf.nprobe = probes
        found = torch.from_numpy(ivf.search(queries, 11)[1])
        others = exact != torch.from_numpy(rows)[:, None]
        hits = (exact[:, :, None] == found[:, None, :]).any(2) & others
        recall = hits.sum().item() / others.sum().item() if others.any() else 1.0  # a single row has no others
        if recall >= RECALL or probes >= ivf.nlist:
            return probes, recall
        probes = min(math.ceil(1.2 * probes), ivf.nlist)


def write_approximate(folder: Path, features: Any, generation: int) -> ApproximateInfo:
    """Build approximate search for the rows of a generation, and write it to the folder of the index."""
    faiss = import_extra("faiss", "search")
    if os.fsencode(folder).decode(errors="ignore") != str(folder):
        raise UserError(f"faiss cannot write to {visible(str(folder))}: expected a path in UTF-8 for `approximate`.")
    ivf, probes, recall = build_ivf(features)
    atomic_write(_file(folder, generation), lambda part: faiss.write_index(ivf, str(part)))
    info = ApproximateInfo(generation=generation, lists=ivf.nlist, probes=probes, recall=recall)
    write_json(folder / INFO, to_dict(info))
    for path in folder.glob("approximate-*.faiss"):
        if path != _file(folder, generation):
            path.unlink(missing_ok=True)
    return info


def _file(folder: Path, generation: int) -> Path:
    return folder / f"approximate-{generation}.faiss"


def read_approximate(folder: Path) -> ApproximateInfo | None:
    """Return the content of approximate.json; None if there is none, or of another version."""
    content = read_json(folder / INFO)
    known = isinstance(content, dict) and content.get("format") == FORMAT
    return from_dict(ApproximateInfo, content) if known else None


class Approximate:
    """Approximate search in the rows of one generation."""

    def __init__(self, folder: Path, info: ApproximateInfo) -> None:
        """Open the file. Raises UserError if faiss is not installed."""
        faiss = import_extra("faiss", "search")
        self.info, self._ivf = info, faiss.read_index(str(_file(folder, info.generation)), faiss.IO_FLAG_MMAP_IFC)
        self._ivf.nprobe = info.probes

    def top_k(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return cosines and rows as `nearest.top_k` does for unit queries [Q, D]; -1 for rows that are not found."""
        cosines, rows = self._ivf.search(queries.float().cpu().numpy(), k)
        return torch.from_numpy(cosines), torch.from_numpy(rows)


def open_approximate(folder: Path, generation: int) -> Approximate | None:
    """Return the approximate search of a generation; None if there is none, it is out of date, or faiss is missing."""
    if (info := read_approximate(folder)) is None or info.generation != generation:
        return None
    try:
        return Approximate(folder, info)
    except (UserError, RuntimeError, UnicodeError):  # the file is missing or damaged, or its path is not UTF-8
        return None
