"""The report's part on health: what is wrong, how the vitals went, and what the monitor said on the way."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_ssl.collapse.checks import Finding
from dino_ssl.collapse.monitor import diagnose
from dino_ssl.errors import UserError
from dino_ssl.files import read_lines
from dino_ssl.report import html
from dino_ssl.report.curves import History, Line, chart
from dino_ssl.run import read_run


def findings(run_dir: Path, described: Mapping[str, Any], history: History) -> list[Finding]:
    """What is wrong with a run as its curves end."""
    prototypes = described.get("prototypes")
    try:
        run = read_run(run_dir)
    except (UserError, TypeError, ValueError):  # of another version: the advice then names no settings
        return diagnose(history.training, prototypes)
    trained_on = (described.get("data") or {}).get("trained_on")
    steps = None if not trained_on else max(1, trained_on // run.optim.batch_size)
    return diagnose(history.training, prototypes, run, steps)


def health_section(run_dir: Path, described: Mapping[str, Any], history: History) -> str:
    """Curves of the vitals, and what was said while it trained."""
    prototypes = described.get("prototypes")
    message = _less(history.line("marginal_entropy"), history.line("teacher_entropy"))
    grasped = _less(history.line("marginal_entropy"), history.line("loss")) if history.line("kl")[0] else ([], [])
    drawn = [
        chart(
            {"in the targets": message, "of it predicted": grasped},
            title="Message, nats",
            note="How much a target tells of its picture within a batch, and how much of that the student predicts. "
            "Below 0 it does worse than one answer for all.",
        ),
        chart(
            {"used": history.line("prototypes_used")},
            title="Prototypes in use",
            references={"K": prototypes} if prototypes else {},
            from_zero=True,
            note="Exp of the entropy of the mean target. 1: one takes every picture.",
        ),
        chart(
            {"rank": history.line("feature_rank")},
            title="Effective rank of the features",
            from_zero=True,
            note="Directions that a batch's features fill, (trace C)^2 / |C|^2; at most twice the batch less 1.",
        ),
        chart(
            {"spread": history.line("feature_spread")},
            title="Spread of the features",
            references={"all different": 1.0},
            from_zero=True,
            note="0: every picture has the same feature.",
        ),
        chart(
            {"features": history.line("feature_norm"), "center": history.line("center_norm")},
            title="Norms",
            from_zero=True,
        ),
        chart({"gradient": history.line("grad_norm")}, title="Norm of the gradient, before clipping", from_zero=True),
        chart(
            {"distance": history.line("teacher_distance")},
            title="Teacher to student",
            from_zero=True,
            note="Distance of their weights, as a share of the student's length.",
        ),
    ]
    charts = "".join(drawn)
    said = [(_where(row), str(row.get("name", "")), str(row.get("message", ""))) for row in read_said(run_dir)]
    shown = f'<div class="grid charts">{charts}</div>' if charts else ""
    return html.section("Health", "Of what the loss does not show.", shown, html.table(said))


def read_said(run_dir: Path) -> list[dict[str, Any]]:
    """What the monitor of a session said, in order: step, name, message."""
    return read_lines(run_dir / "health.jsonl")


def _where(row: Mapping[str, Any]) -> str:
    return f"step {row['step']:,}" if row.get("step") else "before the first step"


def _less(one: Line, other: Line) -> Line:
    """The difference of two curves where both have a point."""
    there = dict(zip(*other, strict=True))
    pairs = [(x, y - there[x]) for x, y in zip(*one, strict=True) if x in there and math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]
