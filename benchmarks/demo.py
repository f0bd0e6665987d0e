"""The demo over several seeds of the initial weights and the order: 20-NN accuracy, attention masks, time.

    python benchmarks/demo.py --json docs/benchmarks/demo.json

Each seed is one `dino train --preset demo` in a process of its own. All scores are of the validation parts of the
synthetic images; only the number of epochs was chosen with a look at their attention masks (LOG.md). Attention masks
hold 60 % of the mean attention over the heads, and are compared with those of random weights and with the centered
square of the best side. `seconds` is the time of training with its evaluations and the report, next to whatever else
runs on the machine; `cpu_seconds` is the processor time of all its processes. Seeds that the JSON file has are skipped,
so that an interrupted benchmark resumes.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dino_ssl
from common import about, save
from dino_ssl.data.sources import open_dataset
from dino_ssl.data.synthetic.scenes import SyntheticDataset
from dino_ssl.evals.attention_masks import AttentionMasks
from dino_ssl.evals.knn import KNN
from dino_ssl.models.backbone import Backbone
from dino_ssl.run import read_run

TRAIN_AND_VAL = ("simple-scenes", "simple-scenes")
OBJECTS = "small-objects"
"""Images for the attention masks: the objects are smaller than in training, and at any position."""
LEAD = 25
"""Points by which the 20-NN accuracy of every seed exceeds raw pixels and random weights."""
MEDIAN = 80
"""Least median of the 20-NN accuracy in percent."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    console = Console()
    rows = json.loads(options.json.read_text())["seeds"] if options.json and options.json.exists() else []
    for seed in options.seeds:
        if seed in [row["seed"] for row in rows]:
            continue
        folder = options.out / f"seed-{seed}"
        times = train(seed, folder)
        rows.append({"seed": seed, **evaluate(folder, seed), **times})
        save(options.json, {"benchmark": "demo", **about(vars(options)), "seeds": rows})
        console.print(rows[-1])
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for claim, holds in claims(rows).items():
        console.print(f"{'holds' if holds else 'FAILS'}: {claim}")


def train(seed: int, folder: Path) -> dict[str, float]:
    """Train the demo, and return its wall-clock and processor time in seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "dino_ssl", "train", "--preset", "demo", "--seed", str(seed), "--out", str(folder)]
    start, cpu_start = time.monotonic(), children_cpu_seconds()
    subprocess.run(command, check=True)
    return {"seconds": time.monotonic() - start, "cpu_seconds": children_cpu_seconds() - cpu_start}


def children_cpu_seconds() -> float:
    """Return the processor time of all finished child processes in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Return the scores of a run in percent, next to raw pixels, random weights of this seed, and a centered square."""
    torch.manual_seed(seed)
    random_weights = read_run(folder).backbone.build(drop_path=0.0)
    networks: tuple[Path | Backbone, ...] = (folder, random_weights)
    knn, random_knn = (dino_ssl.evaluate(network, KNN(k=(20,)), *TRAIN_AND_VAL) for network in networks)
    attention, random_attention = (
        dino_ssl.evaluate(network, AttentionMasks(mass=(0.6,)), OBJECTS, references=False)["values"]
        for network in networks
    )
    return {
        "knn": knn["values"]["20-NN"],
        "raw_pixels": knn["references"]["raw_pixels"]["20-NN"],
        "random_weights": random_knn["values"]["20-NN"],
        "attention_jaccard": attention["mean of heads 60%"],
        "random_jaccard": random_attention["mean of heads 60%"],
        "best_head_jaccard": attention["jaccard 60%"],
        "random_best_head_jaccard": random_attention["jaccard 60%"],
        "centered_box_jaccard": centered_box_jaccard(),
    }


def centered_box_jaccard() -> float:
    """Return the mean Jaccard similarity in percent of the objects with the centered square of the best side."""
    dataset = open_dataset(OBJECTS, part="val")
    assert isinstance(dataset, SyntheticDataset)
    objects = np.stack([dataset.mask(i) > 0 for i in range(len(dataset))])
    position = np.abs(np.arange(objects.shape[1]) - (objects.shape[1] - 1) / 2)
    distance = np.maximum(position, position[:, None])  # of each pixel from the center
    boxes = (distance < radius for radius in np.unique(position) + 0.5)
    return max(100 * float(((objects & box).sum((1, 2)) / (objects | box).sum((1, 2))).mean()) for box in boxes)


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return the claims about the demo, and whether the seeds support them."""

    def lead(score: str, *others: str) -> float:
        return min(row[score] - row[other] for row in rows for other in others)

    return {
        f"20-NN at least {LEAD} points above raw pixels and random weights in every seed": lead(
            "knn", "raw_pixels", "random_weights"
        )
        >= LEAD,
        f"median of 20-NN at least {MEDIAN} %": statistics.median(row["knn"] for row in rows) >= MEDIAN,
        "attention masks above random weights in every seed": lead("attention_jaccard", "random_jaccard") > 0,
        "attention masks above a centered square in every seed": lead("attention_jaccard", "centered_box_jaccard") > 0,
    }


if __name__ == "__main__":
    main()
