"""Report section: metrics that show a collapse, and the findings of the monitor."""

import math
from pathlib import Path
from typing import Any

from dino_ssl.collapse.checks import Finding
from dino_ssl.collapse.monitor import diagnose
from dino_ssl.files import read_lines
from dino_ssl.report import html
from dino_ssl.report.curves import History, Line, chart, charts
from dino_ssl.run import Run

INFORMATION_NOTE = (
    "Information of a target about its image within a batch, and the part that the student predicts. Below 0 the "
    "student is worse than a constant prediction."
)
USED_NOTE = "Exponential of the entropy of the mean target. 1: all images get one prototype."
RANK_NOTE = "(trace C)^2 / |C|^2 of a batch's covariance C; at most twice the batch size minus 1."
CHARTS: list[tuple[str, dict[str, str], str]] = [
    ("Prototypes in use", {"used": "prototypes_used"}, USED_NOTE),
    ("Effective rank of the features", {"rank": "feature_rank"}, RANK_NOTE),
    ("Spread of the features", {"spread": "feature_spread"}, "0: all images have the same feature."),
    ("Norms", {"features": "feature_norm", "center": "center_norm"}, ""),
    ("Gradient norm before clipping", {"gradient": "grad_norm"}, ""),
    (
        "Distance of teacher and student",
        {"distance": "teacher_distance"},
        "Relative to the norm of the student's weights.",
    ),
]
"""Title, metrics by their name in the legend, and note."""


def current_findings(run: Run, num_images: int | None, prototypes: int | None, history: History) -> list[Finding]:
    """Return what is wrong at the end of the metrics. num_images: of the training set."""
    steps_per_epoch = max(1, num_images // run.optim.batch_size) if num_images else None
    return diagnose(history.training, prototypes, run, steps_per_epoch)


def health_section(run_dir: Path, prototypes: int | None, history: History) -> str:
    """Return charts of the collapse metrics, and the findings logged during training."""
    line = history.line
    information = {"of the targets": _difference(line("marginal_entropy"), line("teacher_entropy"))}
    if line("kl")[0]:
        information["predicted by the student"] = _difference(line("marginal_entropy"), line("loss"))
    references = {"prototypes_used": {"K": prototypes} if prototypes else {}, "feature_spread": {"all different": 1.0}}
    figures = [chart(information, title="Mutual information, nats", note=INFORMATION_NOTE)]
    for title, metrics, note in CHARTS:
        lines = {name: line(metric) for name, metric in metrics.items()}
        reference = references.get(next(iter(metrics.values())))
        figures.append(chart(lines, title=title, references=reference, from_zero=True, note=note))
    log = [(_step(row), str(row.get("name", "")), str(row.get("message", ""))) for row in read_health_log(run_dir)]
    return html.section("Health", "Metrics and findings that reveal a collapse.", charts(*figures), html.table(log))


def read_health_log(run_dir: Path) -> list[dict[str, Any]]:
    """Read the findings logged during training, in order."""
    return read_lines(run_dir / "health.jsonl")


def _step(row: dict[str, Any]) -> str:
    return f"step {row['step']:,}" if row.get("step") else "before training"


def _difference(minuend: Line, subtrahend: Line) -> Line:
    """Return the difference of two curves at their common points."""
    values = dict(zip(*subtrahend, strict=True))
    pairs = [(x, y - values[x]) for x, y in zip(*minuend, strict=True) if x in values and math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]
