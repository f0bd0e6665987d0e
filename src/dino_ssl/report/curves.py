"""Metrics of a run, and line charts of them for the report."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dino_ssl.metrics import read_metrics

MAX_POINTS = 300
"""Longer curves are averaged in groups: a chart is about 450 pixels wide."""
MAX_DOTS = 24
"""Shorter curves also show their points."""
GRAY = "#85858f"
COLORS = ("#5b7cfa", "#e8653a", "#1a9c84")
"""Colors of the lines of a chart, with a contrast of 3.3 or more on the light and on the dark page."""

Line = tuple[Sequence[float], Sequence[float]]  # x and y
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class History:
    """The metrics of a run in order of steps: those of training, and those of each evaluation by name."""

    training: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]

    def line(self, name: str) -> Line:
        """Return a training metric over epochs, without missing and non-finite values."""
        return line(self.training, name)

    @property
    def seconds(self) -> float:
        """Training time; the logged time starts at 0 again after each resume."""
        times = self.line("time")[1]
        return sum(before for before, after in pairwise([*times, 0.0]) if after < before)


def read_history(run_dir: Path) -> History:
    """Read metrics.jsonl of a run; where steps repeat after a resume, the later lines count."""
    training: list[dict[str, Any]] = []
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for row in read_metrics(run_dir):
        rows = evaluations.setdefault(str(row["eval"]), []) if "eval" in row else training
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return History(training, evaluations)


def score_names(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores in a line of an evaluation."""
    return [name for name in row if name not in ("step", "epoch", "eval")]


def line(rows: Rows, name: str) -> Line:
    """Return a value over epochs (over steps, if a row has no epoch)."""
    pairs = [(row.get("epoch", row["step"]), row[name]) for row in rows if _is_finite(row.get(name))]
    return [float(x) for x, _ in pairs], [float(y) for _, y in pairs]


def chart(
    lines: Mapping[str, Line],
    *,
    title: str,
    note: str = "",
    references: Mapping[str, float] | None = None,
    unit: str = "",
    from_zero: bool = False,
) -> str:
    """Return a line chart with a legend as HTML, or an empty string if no line has a point.

    references: labeled horizontal lines. from_zero: start the y axis at 0.
    """
    lines = {name: thin(*points) for name, points in lines.items() if len(points[0])}
    if not lines:
        return ""
    axes, legend = Figure(figsize=(5.2, 2.5)).add_axes((0.1, 0.12, 0.89, 0.84)), ""
    for color, (name, (xs, ys)) in zip(COLORS, lines.items(), strict=False):
        axes.plot(xs, ys, color=color, linewidth=1.5, marker="." if len(xs) <= MAX_DOTS else "", markersize=5)
        value = f"<b>{_number(ys[-1])}{unit}</b>"
        legend += f'<span><i style="background:{color}"></i>{escape(name)} {value}</span>'
    for number, (name, value) in enumerate((references or {}).items()):
        axes.axhline(value, color=GRAY, linewidth=0.9, linestyle="--")
        x, align = ((1, "right"), (0, "left"))[number % 2]  # similar values would overlap
        label, transform = f"{name} {_number(value)}{unit}", axes.get_yaxis_transform()
        axes.text(x, value, label, transform=transform, ha=align, va="bottom", color=GRAY, fontsize=8)
    axes.margins(x=0, y=0.1)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    if from_zero:
        axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: _number(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{_number(value)}{unit}")
    axes.tick_params(colors=GRAY, labelsize=8, length=0, pad=5)
    axes.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.8)
    axes.spines[:].set_visible(False)
    caption = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="card chart"><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<img src="{_data_url(axes.figure)}" alt="{escape(title)}">{caption}</figure>'
    )


def charts(*figures: str) -> str:
    """Return charts as a grid, or an empty string if all are empty."""
    return f'<div class="grid charts">{"".join(figures)}</div>' if any(figures) else ""


def _data_url(figure: Any) -> str:
    """Return a figure as SVG with a transparent background and with text as text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def thin(xs: Sequence[float], ys: Sequence[float], count: int = MAX_POINTS) -> Line:
    """Return at most `count` points: the mean of each group of neighbors, and the last value."""
    if len(xs) <= count:
        return xs, ys
    means = ([float(group.mean()) for group in np.array_split(values, count - 1)] for values in (xs, ys))
    thin_x, thin_y = means
    return [*thin_x, xs[-1]], [*thin_y, ys[-1]]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
