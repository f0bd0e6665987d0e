"""Accuracy with few labels, chosen by `dino select` or at random: 1-NN and logistic regression on frozen features.

    python benchmarks/selection.py CHECKPOINT DATASET/train DATASET/val [--labels 10 20 50 100] [--draws 10] [--json F]

Labels are selected among the images of `train` without their classes; the accuracy is that on all images of `val`.
Random and typical selections are drawn 10 times, with other seeds: mean and standard deviation. Coverage and outliers
are deterministic. The regression is that of `dino classify --method linear`. A test set decides nothing here: the
methods have no settings that were tuned.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import about, save
from dino_ssl.api.calls import Embedding, embed
from dino_ssl.api.classify import fit_linear
from dino_ssl.evals.nearest import top_k
from dino_ssl.loading import open_checkpoint
from dino_ssl.search.select import select

METHODS = ("random", "coverage", "typical", "outliers")
SEEDED = ("random", "typical")


def accuracies(train: Tensor, y: Tensor, val: Tensor, truth: Tensor, rows: np.ndarray) -> dict[str, float]:
    """Return the accuracies in percent on `val` with the labels of some rows of `train`."""
    known, labels = train[rows], y[rows]
    nearest = labels[top_k(val, known, 1)[1][:, 0]]
    present, codes = labels.unique(return_inverse=True)  # a class may be missing
    linear = present[fit_linear(known, codes, len(present))(val).argmax(1)] if len(present) > 1 else nearest
    return {
        "1-NN": 100 * float((nearest == truth).double().mean()),
        "logistic": 100 * float((linear == truth).double().mean()),
        "classes": len(present),
    }


def selection(method: str, features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the rows that a method selects."""
    if method == "random":
        return np.random.default_rng(seed).permutation(len(features))[:count]
    return select(features, count, method=method, seed=seed).rows  # pyright: ignore[reportArgumentType]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per number of labels and method."""
    checkpoint = open_checkpoint(options.checkpoint)
    parts: list[Embedding] = [embed(checkpoint, folder) for folder in (options.train, options.val)]
    names = sorted({str(label) for part in parts for label in part.labels})
    x, val = (torch.from_numpy(part.features) for part in parts)
    y, truth = (torch.tensor([names.index(str(label)) for label in part.labels]) for part in parts)
    features = F.normalize(x, dim=1).half().numpy()
    score: Callable[[np.ndarray], dict[str, float]] = functools.partial(accuracies, x, y, val, truth)
    results = []
    for count in options.labels:
        for method in METHODS:
            draws = [
                score(selection(method, features, count, seed))
                for seed in range(options.draws if method in SEEDED else 1)
            ]
            row: dict[str, Any] = {"labels": count, "method": method, "draws": len(draws)}
            for name in ("1-NN", "logistic", "classes"):
                values = [draw[name] for draw in draws]
                row[name] = statistics.mean(values)
                row[f"{name} deviation"] = statistics.stdev(values) if len(values) > 1 else None
            results.append(row)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options)
    table = Table("labels", "method", "1-NN", "logistic", "classes found", title="accuracy in percent")
    for row in results:
        cells = [
            f"{row[name]:.1f}" + (f" ± {row[f'{name} deviation']:.1f}" if row[f"{name} deviation"] is not None else "")
            for name in ("1-NN", "logistic", "classes")
        ]
        table.add_row(str(row["labels"]), row["method"], *cells, end_section=row["method"] == METHODS[-1])
    Console().print(table)
    save(options.json, {**about(vars(options)), "results": results})


if __name__ == "__main__":
    main()
