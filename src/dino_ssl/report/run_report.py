"""report.html: one self-contained page about a run, its results and its settings."""

import math
import platform
import time
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dino_ssl import html
from dino_ssl.files import read_lines
from dino_ssl.formatting import duration, plural
from dino_ssl.report.curves import History, chart, charts, line
from dino_ssl.report.sections import (
    attention_section,
    evals_section,
    health_section,
    neighbors_section,
    plan_section,
    settings_section,
    shorten,
)
from dino_ssl.report.verdict import EFFECTIVE_RANK, Results, read_results, references_of
from dino_ssl.run import Run, read_run

FOOTER = (
    "This page has thumbnails of the dataset and paths of files. "
    "<code>dino report RUN --no-thumbnails</code> writes it without both."
)
PRIVATE_FOOTER = "This page has no images of the dataset and no paths of files."
MAX_SKIPPED = 100
"""Skipped files that are listed by name."""


def write_report(run_dir: Path | str, run: Run | None = None, *, thumbnails: bool = True, trust: bool = False) -> Path:
    """Write RUN/report.html from the files of the run folder and return its path. Missing files omit their section.

    Args:
        run_dir: The run folder, of a finished, stopped or active run.
        run: Its settings. Default: those of run.json.
        thumbnails: Show images of the dataset and paths of files, unless the run omits them.
        trust: Import types from outside the package that run.json names, which runs their code.
    """
    run_dir = Path(run_dir)
    run = run or read_run(run_dir, trust=trust)
    results, snapshots, prototypes = read_results(run_dir, run), run_dir / "snapshots", run.method.num_prototypes
    info, history, verdict = results.info, results.history, results.verdict
    trained_on = info["data"]["trained_on"]
    epoch = history.training[-1]["epoch"] if history.training else 0
    so_far = f"At epoch {epoch:.4g} of {run.optim.epochs:g}: " if epoch < run.optim.epochs else ""
    of_folder = f" of {run.data.folder}" if run.data.folder else ""
    lead = (
        f"{run.backbone.describe()}, trained by {run.method.summary}, on {trained_on:,} images{of_folder}; "
        f"epoch {epoch:.4g} of {run.optim.epochs:g}."
    )
    private = not (thumbnails and run.thumbnails)
    if private:
        lead = lead.replace(of_folder, "")
    body = [
        '<div class="eyebrow">dino · training report</div>',
        f'<h1>{escape(run_dir.resolve().name)}</h1><p class="lead">{escape(lead)}</p>\n',
        f'<p class="verdict {verdict.kind}">{html.message(so_far + verdict.sentence)}</p>\n',
        *(
            f'<p class="warning">{html.message(str(finding))}</p>'
            for finding in results.findings
            if not verdict.learned
        ),
        _headline(results, run),
        _curves(results, prototypes),
        evals_section(history.evaluations, private=private),
        *(() if private else (attention_section(snapshots), neighbors_section(snapshots))),
        health_section(run_dir, prototypes, history),
        plan_section(run_dir, private=private),
        settings_section(run, private=private),
        _skipped(run_dir, private=private),
        _environment(info, history),
        f"<footer>{PRIVATE_FOOTER if private else FOOTER}</footer>",
    ]
    return html.write_page(run_dir / "report.html", f"{run_dir.resolve().name} · dino", body)


def _headline(results: Results, run: Run) -> str:
    """Return tiles with the last and best score next to the reference scores, the last losses, and the speed."""
    tiles, history, prototypes = [], results.history, run.method.num_prototypes
    epochs, values = results.scores
    if values:
        best, epoch = max(zip(values, epochs, strict=True), key=lambda pair: pair[0])
        bars = {"last": values[-1], "best": best, **results.references}
        note = f"Best: at epoch {epoch:.3g}, selected on the validation set. Size: {run.eval_size} px."
        tiles.append(html.bars(f"{results.label} on the validation set", bars, note))
    log_k = f"ln K = {math.log(prototypes):.2f}" if prototypes else ""
    for key, title, note in (
        ("loss", "Loss", log_k and f"chance level: {log_k}"),
        ("teacher_entropy", "Teacher entropy", log_k and f"maximum: {log_k}"),
        ("kl", "KL, teacher to student", "0: the student equals the teacher"),
    ):
        if values := history.line(key)[1]:
            tiles.append(html.tile(title, f"{values[-1]:.3f}", note))
    if speeds := history.line("images_per_s")[1]:
        note = f"{100 * np.median(history.line('wait')[1]):.0f} % of the time waiting for data"
        tiles.append(html.tile("Speed", f"{np.median(speeds):,.0f}", note, unit="images/s"))
    return f'<div class="grid tiles">{"".join(tiles)}</div>\n' if tiles else ""


def _curves(results: Results, prototypes: int | None) -> str:
    history, scores = results.history, {results.metric: results.scores}
    rank, ranks = {"rank": line(results.rows, EFFECTIVE_RANK)}, references_of(results.info, EFFECTIVE_RANK)
    log_k = {"ln K": math.log(prototypes)} if prototypes else {}
    entropies = {"teacher": history.line("teacher_entropy"), "mean over the batch": history.line("marginal_entropy")}
    loss_note = "At ln K the student is at chance." if log_k else ""
    entropy_note = "Teacher at 0: one-hot targets. At ln K: uniform targets. A healthy run stays in between."
    figures = charts(
        chart(scores, title=results.label, unit=" %", references=results.references, from_zero=True),
        chart(rank, title="Effective rank of the validation set", references=ranks, from_zero=True),
        chart({"loss": history.line("loss")}, title="Loss", references=log_k, note=loss_note),
        chart(entropies, title="Entropy", references=log_k, from_zero=True, note=entropy_note),
        chart({"KL": history.line("kl")}, title="KL, teacher to student", from_zero=True),
        chart({"learning rate": history.line("lr")}, title="Learning rate", from_zero=True),
        chart({"momentum": history.line("momentum")}, title="Teacher momentum"),
        chart({"weight decay": history.line("weight_decay")}, title="Weight decay", from_zero=True),
        chart({"images/s": history.line("images_per_s")}, title="Speed", from_zero=True),
    )
    return html.section("Curves", "Over epochs.", figures)


def _skipped(run_dir: Path, *, private: bool) -> str:
    rows = list(
        dict.fromkeys((str(row.get("name")), str(row.get("reason"))) for row in read_lines(run_dir / "skipped.jsonl"))
    )
    counts = Counter(reason for _, reason in rows)
    shown = [(f"{count:,}", reason) for reason, count in counts.most_common()] if private else rows[:MAX_SKIPPED]
    more = f" The first {MAX_SKIPPED}; skipped.jsonl has all." if len(shown) < len(rows) and not private else ""
    text = f"{plural(len(rows), 'file')} could not be read, or are damaged.{more}"
    return html.section("Skipped files", text, html.table(shown, wrap=True))


def _environment(info: Mapping[str, Any], history: History) -> str:
    data = {f"data: {name.replace('_', ' ')}": value for name, value in info["data"].items()}
    rows = info["versions"] | {"training time": duration(history.seconds)} | data
    rows["report"] = f"{time.strftime('%Y-%m-%d %H:%M')}, Python {platform.python_version()}, {platform.machine()}"
    texts = ((name, shorten(value)) for name, value in rows.items())
    return html.section("Environment", "Versions, data and time.", html.table(texts))
