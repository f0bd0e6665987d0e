"""Metrics of a run, and line charts of them as inline SVG in the colors of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dino_ssl.metrics import read_metrics

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 34
MAX_POINTS = 300
"""Longer curves are averaged in groups: a chart is about 450 pixels wide."""
MAX_DOTS = 24
"""Shorter curves also show their points."""

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
    """Return a line chart as inline SVG with a legend, or an empty string if no line has a point.

    references: labeled horizontal lines. from_zero: start the y axis at 0.
    """
    lines = {name: _thin(*points) for name, points in lines.items() if len(points[0])}
    if not lines:
        return ""
    references = references or {}
    xs = [x for points in lines.values() for x in points[0]]
    ys = [*(y for points in lines.values() for y in points[1]), *references.values()]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(0.0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(0.0, *xs), max(max(xs), 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def to_x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - x_low) / (x_high - x_low)

    def to_y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (y_high - value) / (y_high - y_low)

    def horizontal(kind: str, y: float) -> str:
        return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'

    parts = []
    for value in y_ticks:
        label = f'<text x="{LEFT - 8}" y="{to_y(value) + 4:.1f}" text-anchor="end">{_number(value)}{unit}</text>'
        parts += [horizontal("grid", to_y(value)), label]
    for value in (tick for tick in x_ticks if x_low <= tick <= x_high):
        parts.append(f'<text x="{to_x(value):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{_number(value)}</text>')
    for name, value in references.items():
        y = to_y(value)
        text_y = y - 5 if y > TOP + 14 else y + 13
        label = f"{escape(name)} {_number(value)}{unit}"
        text = f'<text class="note" x="{WIDTH - RIGHT}" y="{text_y:.1f}" text-anchor="end">{label}</text>'
        parts += [horizontal("reference", y), text]
    legend = ""
    for number, (name, points) in enumerate(lines.items()):
        parts.append(_curve([(to_x(x), to_y(y)) for x, y in zip(*points, strict=True)], number))
        legend += f'<span><i class="c{number}"></i>{escape(name)} <b>{_number(points[1][-1])}{unit}</b></span>'
    caption = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{caption}</figure>"
    )


def charts(*figures: str) -> str:
    """Return charts as a grid, or an empty string if all are empty."""
    return f'<div class="grid charts">{"".join(figures)}</div>' if any(figures) else ""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` + 1 multiples of 1, 2, 2.5 or 5 times a power of ten that span low .. high."""
    if not high > low:
        high = low + (abs(low) * 0.1 or 1.0)
        low = low - (abs(low) * 0.1 or 0.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _curve(points: list[tuple[float, float]], number: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = (f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points)
    return f'<polyline class="c{number}" points="{path}"/>{"".join(dots) if len(points) <= MAX_DOTS else ""}'


def _thin(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Return at most MAX_POINTS points: the mean of each group of neighbors, and the last value."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    edges = np.linspace(0, len(xs), MAX_POINTS).round().astype(int)
    groups = [slice(a, b) for a, b in pairwise(edges.tolist())]
    thin_x, thin_y = ([float(np.mean(values[group])) for group in groups] for values in (xs, ys))
    return [*thin_x, xs[-1]], [*thin_y, ys[-1]]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
