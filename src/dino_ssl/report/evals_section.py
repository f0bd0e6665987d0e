"""Report section: results of the evaluations that ran during training."""

from collections.abc import Mapping
from html import escape
from typing import Any

from dino_ssl.report import html
from dino_ssl.report.curves import Rows, chart, charts, line

MAX_CURVES = 3
"""Metrics of one evaluation in its chart; the table has all."""
REFERENCES = {"raw_pixels": "raw pixels", "random_weights": "random weights", "majority_class": "majority class"}
"""Reference scores of the online evaluation, by their name in metrics.jsonl and run.json."""
ONLINE = ("knn", "accuracy")
"""Names of the online evaluation in metrics.jsonl; its result is at the top of the page."""


def evals_section(evaluations: Mapping[str, Rows]) -> str:
    """Return the curves, first and last values of every evaluation of `Run.evals`."""
    parts = []
    for name, rows in evaluations.items():
        if name in ONLINE or name in REFERENCES:
            continue
        metrics = [key for key in rows[-1] if key not in ("step", "epoch", "eval")]
        ends = [rows[0], rows[-1]] if len(rows) > 1 else rows
        curves = {key: line(rows, key) for key in metrics[:MAX_CURVES]} if len(rows) > 1 else {}
        head = ["", *(f"epoch {row.get('epoch', 0):.4g}" for row in ends)]
        table = html.table([head, *([key, *(_number(row.get(key)) for row in ends)] for key in metrics)], first="name")
        parts += [f"<h3>{escape(name)}</h3>", charts(chart(curves, title="Over epochs", from_zero=True)), table]
    return html.section("Evaluations", "Run during training. In percent unless the name states a unit.", *parts)


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"
