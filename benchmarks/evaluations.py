"""The evaluations' own time, each beside its plain version: the same numbers, the definition written out.

    python benchmarks/evaluations.py                            every section
    python benchmarks/evaluations.py label_propagation davis_score --rounds 5 --json evaluations.json

One section is one function: it makes its inputs, and returns the candidates, the plain one first. Candidates run in
turns (interleaved, so that a slow minute hits all alike), after one turn to warm up; medians, and ratios to the first.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, for everybody

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.evals.davis_score import sequence_statistics
from dino_ssl.evals.knn import KS, knn_accuracy
from dino_ssl.evals.label_propagation import label_propagation


@dataclass(frozen=True)
class Section:
    what: str
    """The work, with its sizes: one line."""
    candidates: Mapping[str, Callable[[], object]]
    """The plain version first; each call does all the work once, and returns its result."""
    error: Callable[[Any, Any], float] | None = None
    """How far apart the results of two candidates are."""


# -- video segmentation ----------------------------------------------------------------------------------------


def plain_propagation(
    query: Tensor, keys: Tensor, labels: Tensor, *, radius: int = 12, top_k: int = 5, temperature: float = 0.1
) -> Tensor:
    """What `label_propagation` computes, through the whole affinity of all places of all frames to all places."""
    h, w, _ = query.shape
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    affinity = (keys.flatten(1, 2) @ query.flatten(0, 1).T).div_(temperature).exp_()  # [M, places, places]
    affinity = affinity.mul_(near).flatten(0, 1)
    least = affinity.topk(top_k, dim=0).values[-1]
    affinity[affinity < least] = 0
    affinity /= affinity.sum(dim=0)
    return (affinity.T @ labels.flatten(0, 2)).unflatten(0, (h, w))


def label_propagation_section(h: int = 60, w: int = 104, wide: int = 384) -> Section:
    """One frame of DAVIS at 480p (832 x 480) through ViT-S/8: 60 x 104 places, 384 wide, 7 + 1 frames, 2 objects."""
    rng = torch.Generator().manual_seed(0)
    frames, classes = 8, 3
    scene = torch.randn(h, w, wide, generator=rng)
    seen = [scene + 0.7 * torch.randn(h, w, wide, generator=rng) for _ in range(frames + 1)]
    features = F.normalize(torch.stack(seen), dim=-1)
    labels = torch.rand(frames, h, w, classes, generator=rng).softmax(-1)
    query, keys = features[-1], features[:-1]
    return Section(
        f"one frame at 480p, ViT-S/8: {h} x {w} places from 8 frames, radius 12, top 5",
        {
            "plain, whole affinity": lambda: plain_propagation(query, keys, labels),
            "local windows": lambda: label_propagation(query, keys, labels),
        },
        lambda one, other: float((one - other).abs().max()),
    )


def davis_score_section(count: int = 50) -> Section:
    """50 frames of 854 x 480, 2 objects that drift, and masks of them that lie a little aside."""
    frames = [(drawn(time), drawn(time + 0.02)) for time in np.linspace(0, 1, count)]
    return Section(
        f"J&F of {count} frames of 854 x 480, 2 objects",
        {"dino": lambda: sequence_statistics(iter(frames[1:-1]), 2)},
    )


def drawn(time: float) -> np.ndarray:
    """A label map of two ragged blobs."""
    mask = np.zeros((480, 854), np.uint8)
    for label, (x, y, size) in enumerate(((300, 200, 110), (560, 300, 70)), 1):
        angle = np.linspace(0, 2 * np.pi, 200)
        reach = size * (1 + 0.2 * np.sin(7 * angle + 9 * time) + 0.05 * np.sin(31 * angle))
        points = np.stack([x + 150 * time + reach * np.cos(angle), y + reach * np.sin(angle)], axis=1)
        cv2.fillPoly(mask, [points.round().astype(np.int32)], label)
    return mask


# -- nearest neighbours ----------------------------------------------------------------------------------------


def plain_knn(memory: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, ks=KS, chunk: int = 500) -> dict:
    """Appendix F.1 as it is usually written: a chunk of queries against the whole memory at once, one-hot votes."""
    hits, classes = {k: [0, 0] for k in ks}, int(labels.max()) + 1
    for start in range(0, len(queries), chunk):
        asked = truth[start : start + chunk, None]
        similarity, rows = (queries[start : start + chunk] @ memory.T).topk(max(ks), dim=1)
        votes = torch.zeros(*rows.shape, classes).scatter_(2, labels[rows][..., None], 1)
        votes *= (similarity / 0.07).exp()[..., None]
        for k in ks:
            guesses = votes[:, :k].sum(1).topk(5, dim=1).indices == asked
            hits[k][0] += int(guesses[:, 0].sum())
            hits[k][1] += int(guesses.any(1).sum())
    names = {f"{k}-NN{kind}": (k, i) for k in ks for i, kind in enumerate(("", " top-5"))}
    return {name: 100 * hits[k][i] / len(queries) for name, (k, i) in names.items()}


def knn_section(dataset: int = 1_281_167, asked: int = 500, wide: int = 384, classes: int = 1000) -> Section:
    """As many features as ImageNet has training pictures, noise around a center per class; 500 of 50,000 queries."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, wide, generator=rng)
    labels = torch.randint(classes, (dataset + asked,), generator=rng)
    features = torch.empty(dataset + asked, wide)
    for rows in torch.arange(len(labels)).split(65536):  # no copy of the whole on the way
        noise = torch.randn(len(rows), wide, generator=rng)
        features[rows] = F.normalize(centers[labels[rows]] + 4 * noise, dim=1)
    memory, queries = features[:dataset], features[dataset:]
    half, known, truth = memory.half(), labels[:dataset], labels[dataset:]
    return Section(
        f"{asked} queries among {dataset:,} features, {wide} wide, k = 10, 20, 100, 200 (ImageNet asks 50,000)",
        {
            "plain, whole chunks": lambda: plain_knn(memory, known, queries, truth),
            "blocks": lambda: knn_accuracy(memory, known, queries, truth),
            "blocks, stored in float16": lambda: knn_accuracy(half, known, queries, truth),
        },
        farthest,
    )


def farthest(one: dict, other: dict) -> float:
    return max(abs(one[name] - other[name]) for name in one)


SECTIONS: dict[str, Callable[[], Section]] = {
    "knn": knn_section,
    "label_propagation": label_propagation_section,
    "davis_score": davis_score_section,
}


# -- measuring, the same for every section ---------------------------------------------------------------------


def measure(section: Section, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each candidate, the median of its ratios to the first, and how far its result is off."""
    times: dict[str, list[float]] = {name: [] for name in section.candidates}
    results, memory = {}, {}
    for name, run in section.candidates.items():
        results[name], memory[name] = with_peak(run)
    for _ in range(rounds):
        for name, run in section.candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    first = next(iter(times))
    rows = {}
    for name, each in times.items():
        rows[name] = {
            "seconds": statistics.median(each),
            "ratio": statistics.median(plain / own for plain, own in zip(times[first], each, strict=True)),
            "gib": memory[name],
        }
        if section.error is not None:
            rows[name]["error"] = section.error(results[first], results[name])
    return rows


def with_peak(run: Callable[[], object]) -> tuple[object, float]:
    """The result, and by how many GiB this process was larger in between than before; NaN where Linux does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        result = run()
        return result, (resident("VmHWM") - before) / 2**20
    except OSError:
        return run(), math.nan


def resident(which: str) -> int:
    """KiB of this process's memory, by the name that Linux gives it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1])


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all without it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="where the result is written")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; expected {', '.join(SECTIONS)}")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"{machine()}; medians of {options.rounds} interleaved rounds")
    found = {}
    for name in options.sections or SECTIONS:
        section = SECTIONS[name]()
        rows = measure(section, options.rounds)
        found[name] = {"what": section.what, "results": rows}
        print(f"\n{name}: {section.what}\n{'':28}{'seconds':>10}{'ratio':>8}{'GiB':>8}{'error':>10}")
        for candidate, row in rows.items():
            error = f"{row['error']:10.1e}" if "error" in row else ""
            print(f"{candidate:28}{row['seconds']:10.3f}{row['ratio']:8.1f}{row['gib']:8.2f}{error}", flush=True)
    if options.json:
        about = {"machine": machine(), "rounds": options.rounds, "torch": torch.__version__, "opencv": cv2.__version__}
        Path(options.json).write_text(json.dumps({**about, "sections": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
