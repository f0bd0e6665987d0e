"""report.html: one self-contained page that tells what a run was, how it went, and what its network sees."""

import math
import platform
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, read_json, read_lines
from dino_ssl.formatting import duration
from dino_ssl.report import html
from dino_ssl.report.curves import History, chart, line, read_history
from dino_ssl.report.evals_section import asked_section
from dino_ssl.report.health_section import findings, health_section
from dino_ssl.report.images_section import attention_section, neighbours_section
from dino_ssl.report.settings_section import plan_section, settings_section, shown

SHOWN_SKIPPED = 300
FLOORS = {"raw_pixels": "raw pixels", "random_weights": "random weights", "majority_class": "majority class"}


def write_report(run_dir: Path | str) -> Path:
    """Writes RUN/report.html from what lies in the run's folder, and returns it.

    Whatever is missing is left out: a run that has just begun, has no labels, or was stopped gets its report
    too.
    """
    run_dir = Path(run_dir)
    described = read_json(run_dir / "run.json")
    if not isinstance(described, dict):
        raise UserError(f"No run in {run_dir}: expected its run.json. Give the folder that `dino train` wrote to.")
    run, history = described.get("run", described), read_history(run_dir)
    body = [
        _header(run_dir, described, run, history),
        *(f'<p class="warning">{html.escape(str(said))}</p>' for said in findings(run_dir, described, history)),
        _headline(described, history),
        _curves(described, history),
        health_section(run_dir, described, history),
        asked_section(history.evaluations),
        attention_section(run_dir / "snapshots"),
        neighbours_section(run_dir / "snapshots"),
        plan_section(run_dir),
        settings_section(run_dir, run),
        _skipped(run_dir),
        _environment(described, history),
    ]
    text = html.page(f"{run_dir.resolve().name} · dino", body)
    return atomic_write(run_dir / "report.html", lambda aside: aside.write_text(text, encoding="utf-8"))


def _header(run_dir: Path, described: Mapping, run: Mapping, history: History) -> str:
    epochs = _at(run, "optim", "epochs")
    reached = history.training[-1].get("epoch") if history.training else None
    if reached is None:
        state = "has not logged a step yet"
    elif epochs is not None and reached < epochs - 1e-6:
        state = f"stands at epoch {reached:.3g} of {epochs:g}"
    else:
        state = f"trained for {reached:.4g} epochs"
    dataset = _at(described, "data", "trained_on") or _at(described, "data", "images")
    where = _at(run, "data", "path")
    source = (f" on {dataset:,} pictures" if dataset else "") + (f" of {where}" if where else "")
    text = f"{_network(run)}, {described.get('learning', 'self-distilled with no labels')}{source}; it {state}."
    name = run_dir.resolve().name
    eyebrow = '<div class="eyebrow">dino · training report</div>'
    return f'{eyebrow}<h1>{html.escape(name)}</h1><p class="lead">{html.escape(text)}</p>\n'


def _headline(described: Mapping, history: History) -> str:
    prototypes = described.get("prototypes")
    top = math.log(prototypes) if prototypes else None
    tiles = []
    name, rows = _quality(history)
    if rows:
        best = max(rows, key=lambda row: row[name])
        values = {"this run": best[name], **_floors(described, history, name)}
        note = f"best, at epoch {best.get('epoch', 0):.3g}; the last is {rows[-1][name]:.1f} %"
        tiles.append(html.bars(f"{name} accuracy on val-fraction pictures", values, note))
    for key, label in (("loss", "Loss"), ("teacher_entropy", "Teacher entropy"), ("kl", "KL to the student")):
        values = history.line(key)[1]
        if values:
            limit = (
                f"of ln K = {top:.2f}" if top and key != "kl" else "0 is nothing left to learn" if key == "kl" else ""
            )
            tiles.append(html.tile(label, f"{values[-1]:.3f}", limit))
    speeds, waits = history.line("images_per_s")[1], history.line("wait")[1]
    if speeds:
        note = f"{100 * float(np.median(waits)):.0f} % of the time spent waiting for data" if waits else ""
        tiles.append(html.tile("Speed", f"{np.median(speeds):,.0f}", note, unit="images/s"))
    return f'<div class="grid tiles">{"".join(tiles)}</div>\n' if tiles else ""


def _curves(described: Mapping, history: History) -> str:
    prototypes = described.get("prototypes")
    top = {"ln K": math.log(prototypes)} if prototypes else {}
    entropies = {
        "teacher": "teacher_entropy",
        "over the batch": "marginal_entropy",
    }
    name, rows = _quality(history)
    references = _floors(described, history, name)
    drawn = [
        chart({name or "k-NN": line(rows, name)}, title="Quality", unit=" %", references=references, from_zero=True),
        chart(
            {"loss": history.line("loss")},
            title="Loss",
            references=top,
            note="At ln K the student only guesses." if top else "",
        ),
        chart(
            {label: history.line(key) for label, key in entropies.items()},
            title="Entropy",
            references=top,
            from_zero=True,
            note="Teacher at 0: one prototype for all. Teacher at ln K: uniform. Healthy is in between.",
        ),
        chart({"KL": history.line("kl")}, title="KL, teacher to student", from_zero=True),
        chart({"learning rate": history.line("lr")}, title="Learning rate", from_zero=True),
        chart({"momentum": history.line("momentum")}, title="Teacher momentum"),
        chart({"weight decay": history.line("weight_decay")}, title="Weight decay", from_zero=True),
        chart({"images/s": history.line("images_per_s")}, title="Speed", from_zero=True),
    ]
    charts = "".join(drawn)
    return html.section("Curves", "Over epochs.", f'<div class="grid charts">{charts}</div>' if charts else "")


def _skipped(run_dir: Path) -> str:
    found = read_lines(run_dir / "skipped.jsonl")
    rows = [(str(row["name"]), str(row["reason"])) for row in found if {"name", "reason"} <= row.keys()]
    rows = list(dict.fromkeys(rows))
    if not rows:
        return ""
    counts = Counter(reason for _, reason in rows).most_common(12)
    more = f" (the first {SHOWN_SKIPPED}; skipped.jsonl has all)" if len(rows) > SHOWN_SKIPPED else ""
    listed = html.table(rows[:SHOWN_SKIPPED], first="name")
    return html.section(
        "Left out",
        f"{len(rows):,} file{'s' if len(rows) > 1 else ''} could not be used; nothing stands in their place.",
        html.table((f"{count:,}", reason) for reason, count in counts),
        f"<details{' open' if len(rows) <= 12 else ''}><summary>By name{more}</summary>{listed}</details>",
    )


def _environment(described: Mapping, history: History) -> str:
    rows = [(name, str(value)) for name, value in (described.get("versions") or {}).items()]
    if history.seconds:
        rows.append(("time training", duration(history.seconds)))
    data = described.get("data") or {}
    rows += [
        (f"data: {name.replace('_', ' ')}", shown(value)) for name, value in data.items() if value not in (None, "", [])
    ]
    rows.append(
        (
            "report",
            f"{time.strftime('%Y-%m-%d %H:%M')}, Python {platform.python_version()}, {platform.machine()}",
        )
    )
    return html.section("Environment", "What it ran on.", html.table(rows))


def _quality(history: History) -> tuple[str, list[dict[str, Any]]]:
    """The name of the figure measured while training ("20-NN" where it is there) and the evaluations that have it."""
    rows = history.evaluations.get("knn") or history.evaluations.get("accuracy") or []
    names = [name for row in rows for name in row if re.fullmatch(r"\d+-NN|top-1", name)]
    if not names:
        return "", []
    name = "20-NN" if "20-NN" in names else names[0]
    return name, [row for row in rows if isinstance(row.get(name), int | float)]


def _floors(described: Mapping, history: History, name: str) -> dict[str, float]:
    """Raw pixels and random weights under the same vote, from run.json or from the metrics."""
    found = {}
    for key, label in FLOORS.items():
        row = (described.get("reference_scores") or {}).get(key) or (history.evaluations.get(key) or [{}])[-1]
        if isinstance(row.get(name), int | float):
            found[label] = float(row[name])
    return found


def _network(run: Mapping) -> str:
    backbone = run.get("backbone") or {}
    if backbone.get("type") == "ViT":
        return f"ViT-{backbone.get('size', '?')}/{backbone.get('patch', '?')}"
    return str(backbone.get("name") or backbone.get("type") or "A network")


def _at(data: Mapping, *names: str) -> Any:
    for name in names:
        data = data.get(name) if isinstance(data, Mapping) else None  # type: ignore[assignment]
    return data
