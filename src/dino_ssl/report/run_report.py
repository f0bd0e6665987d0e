"""report.html: one self-contained page about a run, its results and its settings."""

import math
import platform
import re
import time
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dino_ssl.files import atomic_write, read_json, read_lines
from dino_ssl.formatting import duration
from dino_ssl.report import html
from dino_ssl.report.curves import History, chart, charts, line, read_history
from dino_ssl.report.evals_section import ONLINE, REFERENCES, evals_section
from dino_ssl.report.health_section import current_findings, health_section
from dino_ssl.report.images_section import attention_section, neighbors_section
from dino_ssl.report.settings_section import format_setting, plan_section, settings_section
from dino_ssl.run import Run, read_run

MAX_SKIPPED = 300
"""Skipped files that are listed by name."""


def write_report(run_dir: Path | str, run: Run | None = None, *, trust: bool = False) -> Path:
    """Write RUN/report.html from the files of the run folder and return its path. Missing files omit their section.

    Args:
        run_dir: The run folder, of a finished, stopped or active run.
        run: Its settings. Default: those of run.json.
        trust: Import types from outside the package that run.json names, which runs their code.
    """
    run_dir = Path(run_dir)
    run = run or read_run(run_dir, trust=trust)
    info, history, snapshots = read_json(run_dir / "run.json"), read_history(run_dir), run_dir / "snapshots"
    prototypes, data = info.get("prototypes"), info.get("data") or {}
    findings = current_findings(run, data.get("trained_on"), prototypes, history)
    body = [
        _header(run_dir, run, info, history),
        *(f'<p class="warning">{escape(str(finding))}</p>' for finding in findings),
        _headline(info, history),
        _curves(info, history),
        evals_section(history.evaluations),
        attention_section(snapshots),
        neighbors_section(snapshots),
        health_section(run_dir, prototypes, history),
        plan_section(run_dir),
        settings_section(run),
        _skipped(run_dir),
        _environment(info, history),
    ]
    text = html.page(f"{run_dir.resolve().name} · dino", body)
    return atomic_write(run_dir / "report.html", lambda part: part.write_text(text, encoding="utf-8"))


def _header(run_dir: Path, run: Run, info: Mapping[str, Any], history: History) -> str:
    epoch = history.training[-1].get("epoch", 0) if history.training else 0
    data, path = info.get("data") or {}, getattr(run.data, "path", "")
    images = f"{data['trained_on']:,} images" if data.get("trained_on") else "images"
    text = (
        f"{run.backbone.describe()}, trained by {run.method.summary}, on {images}"
        f"{f' of {path}' if path else ''}; epoch {epoch:.4g} of {run.optim.epochs:g}."
    )
    eyebrow = '<div class="eyebrow">dino · training report</div>'
    return f'{eyebrow}<h1>{escape(run_dir.resolve().name)}</h1><p class="lead">{escape(text)}</p>\n'


def _headline(info: Mapping[str, Any], history: History) -> str:
    """Return tiles with the best accuracy next to its reference scores, the last losses, and the speed."""
    prototypes, tiles = info.get("prototypes"), []
    name, rows = _accuracy(history)
    if rows:
        best = max(rows, key=lambda row: row[name])
        values = {"this run": best[name], **_references(info, history, name)}
        note = f"Best, at epoch {best.get('epoch', 0):.3g}; the last is {rows[-1][name]:.1f} %."
        tiles.append(html.bars(f"{name} accuracy on the validation set", values, note))
    log_k = f"ln K = {math.log(prototypes):.2f}" if prototypes else ""
    for key, label, note in (
        ("loss", "Loss", log_k and f"chance level: {log_k}"),
        ("teacher_entropy", "Teacher entropy", log_k and f"maximum: {log_k}"),
        ("kl", "KL, teacher to student", "0: the student equals the teacher"),
    ):
        if values := history.line(key)[1]:
            tiles.append(html.tile(label, f"{values[-1]:.3f}", note))
    speeds, waits = history.line("images_per_s")[1], history.line("wait")[1]
    if speeds:
        note = f"{100 * float(np.median(waits)):.0f} % of the time waiting for data" if waits else ""
        tiles.append(html.tile("Speed", f"{np.median(speeds):,.0f}", note, unit="images/s"))
    return f'<div class="grid tiles">{"".join(tiles)}</div>\n' if tiles else ""


def _curves(info: Mapping[str, Any], history: History) -> str:
    log_k = {"ln K": math.log(info["prototypes"])} if info.get("prototypes") else {}
    name, rows = _accuracy(history)
    accuracy = {name: line(rows, name)}
    references = _references(info, history, name)
    entropies = {"teacher": history.line("teacher_entropy"), "mean over the batch": history.line("marginal_entropy")}
    loss_note = "At ln K the student is at chance." if log_k else ""
    entropy_note = "Teacher at 0: one-hot targets. At ln K: uniform targets. A healthy run stays in between."
    figures = charts(
        chart(accuracy, title="Accuracy", unit=" %", references=references, from_zero=True),
        chart({"loss": history.line("loss")}, title="Loss", references=log_k, note=loss_note),
        chart(entropies, title="Entropy", references=log_k, from_zero=True, note=entropy_note),
        chart({"KL": history.line("kl")}, title="KL, teacher to student", from_zero=True),
        chart({"learning rate": history.line("lr")}, title="Learning rate", from_zero=True),
        chart({"momentum": history.line("momentum")}, title="Teacher momentum"),
        chart({"weight decay": history.line("weight_decay")}, title="Weight decay", from_zero=True),
        chart({"images/s": history.line("images_per_s")}, title="Speed", from_zero=True),
    )
    return html.section("Curves", "Over epochs.", figures)


def _skipped(run_dir: Path) -> str:
    entries = dict.fromkeys((str(row["name"]), str(row["reason"])) for row in read_lines(run_dir / "skipped.jsonl"))
    rows = list(entries)
    counts = Counter(reason for _, reason in rows).most_common(12)
    more = f" (the first {MAX_SKIPPED}; skipped.jsonl has all)" if len(rows) > MAX_SKIPPED else ""
    by_name = html.table(rows[:MAX_SKIPPED], first="name")
    return html.section(
        "Skipped files",
        f"{len(rows):,} file{'s' if len(rows) > 1 else ''} could not be read.",
        html.table((f"{count:,}", reason) for reason, count in counts),
        f"<details{' open' if len(rows) <= 12 else ''}><summary>By name{more}</summary>{by_name}</details>"
        if rows
        else "",
    )


def _environment(info: Mapping[str, Any], history: History) -> str:
    rows = list((info.get("versions") or {}).items())
    if history.seconds:
        rows.append(("training time", duration(history.seconds)))
    data = {name: value for name, value in (info.get("data") or {}).items() if value not in (None, "", [])}
    rows += [(f"data: {name.replace('_', ' ')}", format_setting(value)) for name, value in data.items()]
    host = f"Python {platform.python_version()}, {platform.machine()}"
    rows.append(("report", f"{time.strftime('%Y-%m-%d %H:%M')}, {host}"))
    return html.section("Environment", "Versions, data and time.", html.table(rows))


def _accuracy(history: History) -> tuple[str, list[dict[str, Any]]]:
    """Return the name of the online evaluation's main metric (20-NN if measured), and its rows."""
    rows = next((history.evaluations[name] for name in ONLINE if name in history.evaluations), [])
    names = [name for row in rows for name in row if re.fullmatch(r"\d+-NN|top-1", name)]
    name = "20-NN" if "20-NN" in names else names[0] if names else ""
    return name, [row for row in rows if isinstance(row.get(name), int | float)]


def _references(info: Mapping[str, Any], history: History, name: str) -> dict[str, float]:
    """Return the reference scores of a metric, from run.json or from the metrics."""
    scores = {}
    for key, label in REFERENCES.items():
        row = (info.get("reference_scores") or {}).get(key) or (history.evaluations.get(key) or [{}])[-1]
        if isinstance(row.get(name), int | float):
            scores[label] = float(row[name])
    return scores
