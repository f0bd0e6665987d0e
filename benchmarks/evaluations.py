"""Time and memory of the evaluations, compared with their definitions written out.

    python benchmarks/evaluations.py                            all sections
    python benchmarks/evaluations.py label_propagation davis_score --rounds 5 --json F

A section is a function that makes the inputs and returns the candidates, the definition first. Candidates take turns
after a warm-up; `seconds` is the median over the rounds, `times` has every round.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core for all candidates

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import Memory, about, interleave, median_ratio, ratios, save, spread
from dino_ssl.evals.davis_score import sequence_statistics
from dino_ssl.evals.knn import KS, knn_accuracy
from dino_ssl.evals.label_propagation import label_propagation


@dataclass(frozen=True)
class Section:
    """One computation by several implementations."""

    what: str
    """The computation and its sizes in one line."""
    candidates: Mapping[str, Callable[[], object]]
    """The definition first; each call returns its result."""
    error: Callable[[Any, Any], float] | None = None
    """Difference between the results of two candidates."""


# -- video segmentation ----------------------------------------------------------------------------------------


def plain_propagation(
    query: Tensor, keys: Tensor, labels: Tensor, *, radius: int = 12, top_k: int = 5, temperature: float = 0.1
) -> Tensor:
    """Return the result of `label_propagation`, computed from the affinity of all patches of all frames."""
    h, w, _ = query.shape
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    affinity = (keys.flatten(1, 2) @ query.flatten(0, 1).T).div_(temperature).exp_()  # [M, h w, h w]
    affinity = affinity.mul_(near).flatten(0, 1)
    smallest = affinity.topk(top_k, dim=0).values[-1]
    affinity[affinity < smallest] = 0
    affinity /= affinity.sum(dim=0)
    return (affinity.T @ labels.flatten(0, 2)).unflatten(0, (h, w))


def label_propagation_section(h: int = 60, w: int = 104, width: int = 384) -> Section:
    """One frame of DAVIS at 480p (832 x 480) through ViT-S/8: 60 x 104 patches, 7 + 1 frames, 2 objects."""
    rng = torch.Generator().manual_seed(0)
    frames, classes = 8, 3
    scene = torch.randn(h, w, width, generator=rng)
    noisy = [scene + 0.7 * torch.randn(h, w, width, generator=rng) for _ in range(frames + 1)]
    features = F.normalize(torch.stack(noisy), dim=-1)
    labels = torch.rand(frames, h, w, classes, generator=rng).softmax(-1)
    query, keys = features[-1], features[:-1]
    return Section(
        f"one frame at 480p, ViT-S/8: {h} x {w} patches from 8 frames, radius 12, top 5",
        {
            "plain, full affinity": lambda: plain_propagation(query, keys, labels),
            "local windows": lambda: label_propagation(query, keys, labels),
        },
        lambda a, b: float((a - b).abs().max()),
    )


def davis_score_section(count: int = 50) -> Section:
    """50 frames of 854 x 480, 2 moving objects, and predicted masks that are slightly shifted."""
    frames = [(draw_mask(time), draw_mask(time + 0.02)) for time in np.linspace(0, 1, count)]
    return Section(
        f"J&F of {count} frames of 854 x 480, 2 objects",
        {"dino": lambda: sequence_statistics(iter(frames[1:-1]), 2)},
    )


def draw_mask(time: float) -> np.ndarray:
    """Return a label map of two objects with uneven contours."""
    mask = np.zeros((480, 854), np.uint8)
    for label, (x, y, size) in enumerate(((300, 200, 110), (560, 300, 70)), 1):
        angle = np.linspace(0, 2 * np.pi, 200)
        radius = size * (1 + 0.2 * np.sin(7 * angle + 9 * time) + 0.05 * np.sin(31 * angle))
        points = np.stack([x + 150 * time + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)
        cv2.fillPoly(mask, [points.round().astype(np.int32)], label)
    return mask


# -- nearest neighbors -----------------------------------------------------------------------------------------


def plain_knn(memory: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, ks=KS, chunk: int = 500) -> dict:
    """Return the accuracies of Appendix F.1: each chunk of queries against the whole memory at once, one-hot votes."""
    hits, classes = {k: [0, 0] for k in ks}, int(labels.max()) + 1
    for start in range(0, len(queries), chunk):
        target = truth[start : start + chunk, None]
        similarity, rows = (queries[start : start + chunk] @ memory.T).topk(max(ks), dim=1)
        votes = torch.zeros(*rows.shape, classes).scatter_(2, labels[rows][..., None], 1)
        votes *= (similarity / 0.07).exp()[..., None]
        for k in ks:
            correct = votes[:, :k].sum(1).topk(5, dim=1).indices == target
            hits[k][0] += int(correct[:, 0].sum())
            hits[k][1] += int(correct.any(1).sum())
    names = {f"{k}-NN{kind}": (k, i) for k in ks for i, kind in enumerate(("", " top-5"))}
    return {name: 100 * hits[k][i] / len(queries) for name, (k, i) in names.items()}


def knn_section(num_train: int = 1_281_167, num_queries: int = 500, width: int = 384, classes: int = 1000) -> Section:
    """Compare k-NN on as many features as ImageNet has training images: noise around a center per class."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, width, generator=rng)
    labels = torch.randint(classes, (num_train + num_queries,), generator=rng)
    features = torch.empty(num_train + num_queries, width)
    for rows in torch.arange(len(labels)).split(65536):  # without a second copy of all features
        noise = torch.randn(len(rows), width, generator=rng)
        features[rows] = F.normalize(centers[labels[rows]] + 4 * noise, dim=1)
    memory, queries = features[:num_train], features[num_train:]
    half, known, truth = memory.half(), labels[:num_train], labels[num_train:]
    return Section(
        f"{num_queries} queries, {num_train:,} features of {width} dimensions, k = 10, 20, 100, 200",
        {
            "plain, whole chunks": lambda: plain_knn(memory, known, queries, truth),
            "blocks": lambda: knn_accuracy(memory, known, queries, truth),
            "blocks, stored in float16": lambda: knn_accuracy(half, known, queries, truth),
        },
        lambda a, b: max(abs(a[name] - b[name]) for name in a),
    )


SECTIONS: dict[str, Callable[[], Section]] = {
    "knn": knn_section,
    "label_propagation": label_propagation_section,
    "davis_score": davis_score_section,
}


def measure(section: Section, rounds: int) -> dict[str, dict[str, Any]]:
    """Return seconds, ratio to the first candidate, peak memory in GiB and error of each candidate."""
    results, peaks = {}, {}
    for name, run in section.candidates.items():
        memory = Memory(torch.device("cpu"))
        results[name] = run()
        peaks[name] = memory.peak() / 2**30
    times = interleave(section.candidates, rounds)
    first = next(iter(times))
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        ratio = median_ratio(times[first], seconds)
        rows[name] = {"seconds": statistics.median(seconds), "ratio": ratio, "times": seconds, "gib": peaks[name]}
        if section.error is not None:
            rows[name]["error"] = section.error(results[first], results[name])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; expected {', '.join(SECTIONS)}")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    description, sections = about(vars(options)), {}
    print(f"{description['machine']}; medians of {options.rounds} rounds")
    for name in options.sections or SECTIONS:
        section = SECTIONS[name]()
        rows = measure(section, options.rounds)
        sections[name] = {"what": section.what, "results": rows}
        print(f"\n{name}: {section.what}\n{'':28}{'seconds':>10}{'GiB':>8}{'error':>10}  ratio")
        first = next(iter(rows.values()))
        for candidate, row in rows.items():
            error = f"{row['error']:10.1e}" if "error" in row else ""
            ratio = spread(ratios(first["times"], row["times"]))
            print(f"{candidate:28}{row['seconds']:10.3f}{row['gib']:8.2f}{error:>10}  {ratio}", flush=True)
    save(options.json, {"benchmark": "evaluations", **description, "sections": sections})


if __name__ == "__main__":
    main()
