"""Effect of centering on five outputs of different mean and deviation: the figures and numbers of docs/centering.md.

python benchmarks/centering.py [--batches 4000] [--images docs/images]

The teacher's outputs are random, with four images per batch. Targets, center and entropy are computed by `objectives.P`
(Eq. 1), `update_center` (Eq. 4) and `h` (Eq. 5).
"""

import argparse
import json
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino_ssl.objectives import P, h, update_center

MEANS = torch.tensor([0.0, 1.0, -2.0, 6.0, 3.0])
DEVIATIONS = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0])
"""Channel 3 is high for every image; channel 4 is high for some and low for others."""
NAMES = [f"{float(m):g} ± {float(d):g}" for m, d in zip(MEANS, DEVIATIONS, strict=True)]
BATCH = 4
COLORS = ["#4269d0", "#efb118", "#3ca951", "#ff725c", "#9c6bd0"]


def outputs(batches: int, seed: int = 0) -> Tensor:
    """Return random teacher outputs, [batches, B, K]."""
    generator = torch.Generator().manual_seed(seed)
    return MEANS + DEVIATIONS * torch.randn(batches, BATCH, len(MEANS), generator=generator)


def centers(logits: Tensor, momentum: float) -> Tensor:
    """Return the center before each batch [batches, K], initially 0 and updated by Eq. 4."""
    center, history = torch.zeros(logits.shape[-1]), []
    for batch in logits:
        history.append(center)
        center = update_center(center, batch.mean(0), momentum)
    return torch.stack(history)


def prototype_usage(logits: Tensor, temperature: float, center: Tensor | float = 0.0) -> Tensor:
    """Return the mean target, the share of each channel [K]."""
    return P(logits, temperature, center).mean((0, 1))


def iterate_centering(logits: Tensor, temperature: float, times: int) -> list[Tensor]:
    """Return the iterates of x <- softmax((x - mean over the batch of x) / temperature)."""
    iterates = [logits]
    for _ in range(times):
        iterates.append(P(iterates[-1], temperature, iterates[-1].mean(-2, keepdim=True)))
    return iterates


def study(batches: int) -> dict:
    """Return every number of docs/centering.md."""
    logits, settled = outputs(batches), min(100, batches // 2)
    center = centers(logits, 0.9)[settled:, None]
    later = logits[settled:]
    spread = later.std((0, 1))
    versions = {
        "softmax only": prototype_usage(later, 1.0),
        "centered (Eq. 4, m = 0.9)": prototype_usage(later, 1.0, center),
        "centered, temperature 0.1": prototype_usage(later, 0.1, center),
        "centered and divided by the deviation": P((later - center) / spread, 1.0).mean((0, 1)),
    }
    entropies = {}
    for temperature in (2.0, 1.0, 0.5, 0.2, 0.1):
        steps = iterate_centering(logits[: min(batches, 500)], temperature, 60)[1:]
        entropies[temperature] = [h(step).mean().item() for step in steps]
    lag = {}
    for momentum in (0.0, 0.9, 0.99, 0.999):
        history = centers(logits[:400], momentum)
        lag[momentum] = P(logits[:400], 1.0, history[:, None]).mean(1)[:, 3].tolist()
    return {
        "channels": NAMES,
        "shares": {name: values.tolist() for name, values in versions.items()},
        "repeated": entropies,
        "lag": lag,
        "ln 5": math.log(5),
    }


def draw_batch(path: Path, seed: int = 79) -> None:
    """Draw outputs and softmax of one typical batch of four images, without and with the center."""
    batch = outputs(1, seed)[0]
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = [
        ("outputs", batch),
        ("softmax", P(batch, 1.0)),
        ("outputs - center", batch - MEANS),
        ("softmax(outputs - center)", P(batch, 1.0, MEANS)),
    ]
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        for channel in range(len(MEANS)):
            x = torch.arange(BATCH) + 0.16 * (channel - 2)
            axis.bar(x.numpy(), values[:, channel].numpy(), 0.15, color=COLORS[channel], label=NAMES[channel])
        axis.set(title=title, xticks=range(BATCH), xticklabels=[f"image {i + 1}" for i in range(BATCH)])
        _plain(axis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def draw_study(results: dict, path: Path) -> None:
    """Draw the shares of the channels, repeated centering, and a center that lags."""
    figure = Figure(figsize=(11.5, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = results["shares"]
    for row, values in enumerate(rows.values()):
        start = 0.0
        for channel, value in enumerate(values):
            label = NAMES[channel] if not row else None
            left.barh(len(rows) - row, value, 0.6, left=start, color=COLORS[channel], label=label)
            start += value
    left.set(title="share of each channel", yticks=range(len(rows), 0, -1), xlim=(0, 1))
    left.set_yticklabels([name.replace(" (", "\n(").replace(", ", ",\n").replace(" and ", " and\n") for name in rows])
    left.legend(loc="upper center", bbox_to_anchor=(0.3, -0.1), ncols=3, frameon=False, fontsize=8)
    for color, (temperature, values) in zip(COLORS, results["repeated"].items(), strict=True):
        middle.plot(range(1, len(values) + 1), values, color=color, label=f"temperature {temperature:g}")
    middle.axhline(results["ln 5"], ls="--", c="0.5", lw=1)
    middle.set(title="repeated centering and softmax", xlabel="iterations", ylabel="entropy of a target", xscale="log")
    middle.set(xticks=[1, 2, 5, 10, 20, 50], xticklabels=["1", "2", "5", "10", "20", "50"])
    middle.minorticks_off()
    middle.annotate(
        "ln 5: uniform", (9, results["ln 5"]), (0, -11), textcoords="offset points", fontsize=8, color="0.4"
    )
    middle.legend(frameon=False, fontsize=8)
    for color, (momentum, values) in zip(COLORS, results["lag"].items(), strict=False):
        smooth = torch.tensor(values).unfold(0, 20, 20).mean(1)
        right.plot([20 * i + 10 for i in range(len(smooth))], smooth.tolist(), color=color, label=f"m = {momentum:g}")
    right.set(title="share of the high channel, 6 ± 1", xlabel="batches", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        _plain(axis)
    figure.savefig(path, dpi=110)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.title.set_fontsize(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4000)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    results = study(options.batches)
    table = Table("", *NAMES, title="share of each channel")
    for name, values in results["shares"].items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    Console().print(table)
    for temperature, values in results["repeated"].items():
        print(
            f"temperature {temperature:g}: entropy {values[0]:.3f} after 1 time, {values[-1]:.3f} after {len(values)}"
        )
    for momentum, values in results["lag"].items():
        early, late = sum(values[20:40]) / 20, sum(values[300:]) / len(values[300:])
        print(f"center momentum {momentum:g}: share of 6 ± 1 is {early:.2f} in batches 20 to 40, {late:.2f} after 300")
    draw_batch(options.images / "centering-batch.png")
    draw_study(results, options.images / "centering.png")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
