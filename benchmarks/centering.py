"""The effect of centering in a batch of 4 with 5 channels: tables and figure of docs/centering.md.

    python benchmarks/centering.py --json docs/benchmarks/centering.json

The samples are random, of seed 0. One channel has an extreme mean, one a deviation of 1000. Targets, center and
entropy are computed by `objectives.P` (Eq. 1), `update_center` (Eq. 4) and `h` (Eq. 5).
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import about, save
from dino_ssl.objectives import P, h, update_center

MEANS = torch.tensor([0.0, 1.0, -2.0, 1000.0, 0.0])
DEVIATIONS = torch.tensor([1.0, 1.0, 2.0, 1.0, 1000.0])
"""Channel 3 has an extreme mean, channel 4 an extreme deviation."""
NAMES = [f"{float(m):g} ± {float(d):g}" for m, d in zip(MEANS, DEVIATIONS, strict=True)]
BATCH = 4
COLORS = ["#4269d0", "#efb118", "#3ca951", "#ff725c", "#9c6bd0"]
TEMPERATURES = (2.0, 1.0, 0.5, 0.2, 0.1)
MOMENTA = (0.9, 0.99, 0.999)
TIMES = 60


def samples(batches: int, seed: int = 0) -> Tensor:
    """Return random teacher outputs, [batches, B, K]."""
    generator = torch.Generator().manual_seed(seed)
    return MEANS + DEVIATIONS * torch.randn(batches, BATCH, len(MEANS), generator=generator)


class Step(NamedTuple):
    """One step of centering of a batch [B, K]: the tables of the page."""

    samples: Tensor
    center: Tensor  # [K]: the mean of the batch, Eq. 4 with momentum 0
    centered: Tensor
    softmax_of_samples: Tensor
    softmax_of_centered: Tensor


def one_step(batch: Tensor) -> Step:
    """Return the samples, their center, and the targets without and with it."""
    center = update_center(torch.zeros(batch.shape[-1]), batch.mean(0), 0.0)
    return Step(batch, center, batch - center, P(batch, 1.0), P(batch, 1.0, center))


def repeat(batches: Tensor, temperature: float, times: int = TIMES) -> list[float]:
    """Return the mean entropy of x <- softmax((x - mean over the batch of x) / temperature) after 1, 2, ... times."""
    x, entropies = batches, []
    for _ in range(times):
        x = P(x, temperature, x.mean(-2, keepdim=True))
        entropies.append(h(x).mean().item())
    return entropies


def batches_to_adapt(momentum: float, mean: float = 1000.0) -> int:
    """Return the batches after which the center, from 0, differs from a mean by less than 1 (Eq. 4)."""
    return math.ceil(math.log(1 / mean, momentum))


def study(batches: int) -> dict:
    """Return every number of the page that is a mean over batches."""
    many = samples(batches)
    center = many.mean(-2, keepdim=True)
    versions = {
        "softmax only": P(many, 1.0),
        "centered": P(many, 1.0, center),
        "centered and divided by the deviation": P((many - center) / DEVIATIONS, 1.0),
    }
    return {
        "channels": NAMES,
        "shares": {name: targets.mean((0, 1)).tolist() for name, targets in versions.items()},
        "entropy": {name: h(targets).mean().item() for name, targets in versions.items()},
        "repeated": {temperature: repeat(many[: min(batches, 500)], temperature) for temperature in TEMPERATURES},
        "ln 5": math.log(5),
        "batches until less than 1 of 1000 is missing": {momentum: batches_to_adapt(momentum) for momentum in MOMENTA},
    }


def draw(step: Step, results: dict, path: Path) -> None:
    """Draw the tables of one batch as bars, and the entropy of repeated centering."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    panels = [
        ("samples", step.samples),
        ("softmax(samples)", step.softmax_of_samples),
        ("samples - center", step.centered),
        ("softmax(samples - center)", step.softmax_of_centered),
    ]
    for number, (title, values) in enumerate(panels):
        axis = figure.add_subplot(grid[number // 2, number % 2])
        for channel, (name, color) in enumerate(zip(NAMES, COLORS, strict=True)):
            x = torch.arange(BATCH) + 0.16 * (channel - 2)
            axis.bar(x.numpy(), values[:, channel].numpy(), 0.15, color=color, label=name)
        axis.set(title=title, xticks=range(BATCH), xticklabels=[f"image {i + 1}" for i in range(BATCH)])
        if number % 2 == 0:
            axis.set(yscale="symlog", yticks=[-1000, -10, 0, 10, 1000])
        _plain(axis)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    axis = figure.add_subplot(grid[:, 2])
    for color, (temperature, values) in zip(COLORS, results["repeated"].items(), strict=True):
        axis.plot(range(1, len(values) + 1), values, color=color, label=f"temperature {temperature:g}")
    axis.axhline(results["ln 5"], ls="--", c="0.5", lw=1)
    axis.annotate("ln 5: uniform", (7, results["ln 5"]), (0, -11), textcoords="offset points", fontsize=8, color="0.4")
    axis.set(title="repeated centering and softmax", xlabel="times", ylabel="mean entropy", xscale="log")
    axis.set(xticks=[1, 2, 5, 10, 20, 50], xticklabels=["1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.7))
    _plain(axis)
    figure.savefig(path, dpi=110)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.title.set_fontsize(10)


def table(title: str, rows: Tensor, digits: int) -> Table:
    """Return a 4 x 5 table, or one row for the center."""
    result = Table("", *NAMES, title=title)
    for number, row in enumerate(torch.atleast_2d(rows).tolist(), 1):
        result.add_row(f"image {number}" if rows.ndim > 1 else "", *(f"{value:.{digits}f}" for value in row))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4000)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    step, results = one_step(samples(1)[0]), study(options.batches)
    console = Console()
    for name, values in step._asdict().items():
        console.print(table(name.replace("_", " "), values, 3 if "softmax" in name else 2))
    shares = Table("", *NAMES, "entropy", title=f"mean share of each channel over {options.batches} batches")
    for name, values in results["shares"].items():
        shares.add_row(name, *(f"{value:.3f}" for value in values), f"{results['entropy'][name]:.3f}")
    console.print(shares)
    for temperature, entropies in results["repeated"].items():
        after = ", ".join(f"{entropies[times - 1]:.3f} after {times}" for times in (1, 2, 5, 10, TIMES))
        console.print(f"temperature {temperature:g}: mean entropy {after}")
    for momentum in MOMENTA:
        console.print(f"m = {momentum}: less than 1 of 1000 is missing after {batches_to_adapt(momentum):,} batches")
    draw(step, results, options.images / "centering.png")
    tables = {name: values.tolist() for name, values in step._asdict().items()}
    save(options.json, {"benchmark": "centering", **about(vars(options)), "one batch": tables, **results})


if __name__ == "__main__":
    main()
