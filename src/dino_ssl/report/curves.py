"""Curves of a run as small SVG charts: no library, no network, colours from the page so that dark and light
both read.
"""

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
POINTS = 300
"""More points than this are averaged in groups: a chart is about 450 pixels wide."""

Line = tuple[Sequence[float], Sequence[float]]  # x and y


@dataclass(frozen=True)
class History:
    """A run's metrics, in order of steps: what was logged while training, and each evaluation by its name."""

    training: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]

    def line(self, name: str) -> Line:
        """A training metric over epochs, values that are missing or not finite left out."""
        return line(self.training, name)

    @property
    def seconds(self) -> float:
        """Time spent training: a run that went on began to count anew."""
        times = self.line("time")[1]
        return sum(before for before, after in pairwise([*times, 0.0]) if after < before)


def read_history(run_dir: Path) -> History:
    """metrics.jsonl of a run: a torn last line is left out, and where steps repeat (a resume) the later lines
    hold.
    """
    training: list[dict[str, Any]] = []
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for row in read_metrics(run_dir):
        rows = evaluations.setdefault(str(row["eval"]), []) if "eval" in row else training
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return History(training, evaluations)


def line(rows: Sequence[Mapping[str, Any]], name: str) -> Line:
    """One value over epochs (over steps where a row has no epoch)."""
    pairs = [(row.get("epoch", row["step"]), row[name]) for row in rows if _is_number(row.get(name))]
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
    """An inline SVG with its legend, or the empty string without any point. references: dashed horizontal
    lines.
    """
    lines = {name: _thin(*points) for name, points in lines.items() if len(points[0])}
    if not lines:
        return ""
    references = dict(references or {})
    xs = [x for points in lines.values() for x in points[0]]
    ys = [y for points in lines.values() for y in points[1]] + list(references.values())
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(0.0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(0.0, *xs), max(max(xs), 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + across * (x - x_low) / (x_high - x_low), TOP + down * (y_high - y) / (y_high - y_low)

    parts = []
    for value in y_ticks:
        y = place(x_low, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}{unit}</text>')
    for value in (v for v in x_ticks if x_low <= v <= x_high):
        x = place(value, y_low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{_number(value)}</text>')
    for name, value in references.items():
        y = place(x_low, value)[1]
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        above = y - 5 if y > TOP + 14 else y + 13
        label = f"{escape(name)} {_number(value)}{unit}"
        parts.append(f'<text class="note" x="{WIDTH - RIGHT}" y="{above:.1f}" text-anchor="end">{label}</text>')
    for number, points in enumerate(lines.values()):
        placed = [place(x, y) for x, y in zip(*points, strict=True)]
        parts.append(_curve(placed, number))
    legend = "".join(
        f'<span><i class="c{number}"></i>{escape(name)} <b>{_number(points[1][-1])}{unit}</b></span>'
        for number, (name, points) in enumerate(lines.items())
    )
    caption = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{caption}</figure>"
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that span low .. high, about `count` steps."""
    if not high > low:
        high = low + (abs(low) * 0.1 or 1.0)
        low = low - (abs(low) * 0.1 or 0.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _curve(placed: list[tuple[float, float]], number: int) -> str:
    if len(placed) == 1 or len(placed) <= 24:
        dots = "".join(f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in placed)
    else:
        dots = ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    return f'<polyline class="c{number}" points="{path}"/>{dots}'


def _thin(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """At most POINTS points: the mean of each group of neighbours, the last value kept as it is."""
    if len(xs) <= POINTS:
        return list(xs), list(ys)
    edges = np.linspace(0, len(xs), POINTS).round().astype(int)
    groups = [slice(a, b) for a, b in pairwise(edges.tolist())]
    thin_x, thin_y = ([float(np.mean(values[group])) for group in groups] for values in (xs, ys))
    return [*thin_x, xs[-1]], [*thin_y, ys[-1]]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
