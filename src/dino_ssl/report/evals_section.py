"""The report's section on the evaluations that a run asked of its network on the way."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dino_ssl.report import html
from dino_ssl.report.curves import chart, line

CURVES = 3
"""Figures of one evaluation that are drawn; the table below them has all."""
OTHERS = {"knn", "accuracy", "raw_pixels", "random_weights", "majority_class"}
"""What else has lines of its own in metrics.jsonl: the accuracy that every run with labels measures, and its floors."""


def asked_section(evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each evaluation by its name: curves where it was asked more than once, and the first and the last answer."""
    parts = []
    for name, rows in evaluations.items():
        if name in OTHERS or not rows:
            continue
        figures = [key for key in rows[-1] if key not in ("step", "epoch", "eval")]
        drawn = ""
        if len(rows) > 1:
            drawn = chart({key: line(rows, key) for key in figures[:CURVES]}, title=name, from_zero=True)
            drawn = f'<div class="grid charts">{drawn}</div>' if drawn else ""
        shown = [rows[0], rows[-1]] if len(rows) > 1 else [rows[-1]]
        head = ["", *(f"epoch {row.get('epoch', 0):.4g}" for row in shown)]
        table = html.table([head, *([key, *(_number(row.get(key)) for row in shown)] for key in figures)], first="name")
        parts.append(f"<h3>{escape(name)}</h3>{drawn}{table}")
    return html.section("Evaluations", "Asked while training; in percent, unless a name says otherwise.", *parts)


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"
