"""Page of a study: our results with their spread next to the paper's, as Markdown with an image of the curves."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from dino_ssl.ablations.study import EVALS, Study
from dino_ssl.ablations.table import CURVES, METRICS, Configuration
from dino_ssl.config import differences, format_value
from dino_ssl.files import atomic_write
from dino_ssl.formatting import duration
from dino_ssl.run import Run

NONE = "–"
OPEN, CLOSE = "<!-- discussion: written by hand, kept when this page is generated again -->", "<!-- end -->"
NO_DISCUSSION = "Discussion of these results: not written yet."
SCALE_SMALL = (
    "A small network is trained on small crops for minutes: compare the ranking of the configurations with the paper, "
    "not the values."
)


def write_page(study: Study, folder: Path | None = None) -> Path:
    """Write FOLDER/TABLE.md and FOLDER/TABLE.png; return the path of the page.

    folder: of the study by default. The hand-written discussion of an existing page is kept.
    """
    path = (folder or study.folder) / f"{study.table.name}.md"
    _draw_curves(study, path.with_suffix(".png"))
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    is_discussed = OPEN in before and CLOSE in before
    discussion = before.split(OPEN, 1)[1].split(CLOSE, 1)[0].strip() if is_discussed else NO_DISCUSSION
    return atomic_write(path, lambda part: part.write_text(_page(study, discussion), encoding="utf-8"))


def _page(study: Study, discussion: str) -> str:
    table, data, results = study.table, study.data, study.results()
    fraction = data["val_fraction"]
    val_set = f"{fraction:.0%} of the images of every class, held out by the seed" if fraction else "the validation set"
    references = ", ".join(f"{name} {value:.1f} %" for name, value in _reference_scores(study).items()) or NONE
    versions = {f"{name} {version}" for result in results for name, version in result.versions.items()}
    total = duration(3600 * sum(result.values["hours"] for result in results))
    machines = "; ".join(sorted({result.machine for result in results})) or NONE
    days = {result.date for result in results} - {""}
    trained = f"; trained on {', '.join(sorted(days))}" if days else ""
    parts = [
        f"# {table.title}",
        f"Paper: {_describe(table.base('paper'))} of ImageNet. {table.note}".strip(),
        f"Our runs, at scale {study.scale}: {_describe(study.base)} of {data['images']:,} images of {data['classes']} "
        "classes.",
        _table(["", *result_columns(study)], ([i.title, *result_cells(study, i)] for i in table.configurations)),
        "Ours: the mean over the seeds, with the minimum, the maximum and the number of seeds n; 20-NN and linear "
        f"on {val_set}. Reference scores (20-NN), the mean over the runs: {references}. Random weights are drawn once "
        "for each network, not for each seed.",
        SCALE_SMALL if study.scale == "small" else "",
        _agreement(study),
        "\n".join(f"- {message}" for message in _warnings(study)),
        f"Conclusion of the paper: {table.conclusion}",
        f"{OPEN}\n\n{discussion}\n\n{CLOSE}",
        f"## Curves\n\n![curves of every seed]({table.name}.png)",
        "## Settings\n\nAll configurations share one base (in study.json) and change these settings.",
        _table(["configuration", "changes"], _changed_settings(study)),
        "## Cost and environment",
        _table(["run", "state", "time", "images seen", "images/s", "peak memory"], _cost(study)),
        f"Total: {total} for {len(results)} runs on {machines}, {study.base.precision}; "
        f"{', '.join(sorted(versions))}{trained}. "
        f"Fingerprint of the dataset: {data['fingerprint']}.",
        "Run again:\n\n" + "\n".join(f"    {command}" for command in study.commands) if study.commands else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def result_columns(study: Study) -> list[str]:
    """Return the titles of the columns: for each metric our result and the paper's."""
    return [text for name in study.table.metrics for text in (METRICS[name][0], "paper")]


def result_cells(study: Study, configuration: Configuration) -> list[str]:
    """Return one row of the results: for each metric our result, as `43.1 (42.0 to 44.3, n 3)`, and the paper's."""
    cells, paper = [], study.table.paper_results(configuration)
    for name in study.table.metrics:
        title, digits = METRICS[name]
        spread, ours = study.spread(configuration, name), NONE
        if spread is not None:
            mean, low, high = (f"{value:.{digits}f}" for value in spread[:3])
            ours = f"{mean} ({low} to {high}, n {spread.n})" if spread.n > 1 else mean
        paper_format = f".{digits}f" if title.endswith("%") else "g"
        cells += [ours, f"{paper[name]:{paper_format}}" if name in paper else NONE]
    return cells


def _describe(run: Run) -> str:
    """Return network, crops, batch size and epochs."""
    crops = " + ".join(f"{count}x{side}" for count, side in run.views.view_shapes)
    return f"{run.backbone.describe()}, crops {crops}, batch size {run.optim.batch_size}, {run.optim.epochs} epochs"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return Spearman's rank correlation, with mean ranks for equal values; nan if all values of one are equal."""
    ranks = [[(sum(v < x for v in values) + sum(v <= x for v in values)) / 2 for x in values] for values in (xs, ys)]
    return math.nan if any(len(set(line)) == 1 for line in ranks) else statistics.correlation(*ranks)


def _agreement(study: Study) -> str:
    """Return the rank correlation with the paper of each metric that both have for three configurations or more."""
    parts = []
    for name in study.table.metrics:
        pairs = [
            (spread.mean, paper)
            for item in study.table.configurations
            if (spread := study.spread(item, name)) and (paper := study.table.paper_results(item).get(name)) is not None
        ]
        if len(pairs) > 2 and math.isfinite(correlation := rank_correlation(*zip(*pairs, strict=True))):
            parts.append(f"{name} {correlation:.2f}, {len(pairs)} configurations")
    return f"Rank correlation (Spearman) of our means with the paper: {'; '.join(parts)}." if parts else ""


def _reference_scores(study: Study) -> dict[str, float]:
    """Return the 20-NN accuracy of raw pixels and of random weights, in percent: the mean over all runs."""
    scores: dict[str, list[float]] = {}
    for result in study.results():
        for name, values in result.references.items():
            if "20-NN" in values:
                scores.setdefault(name.replace("_", " "), []).append(values["20-NN"])
    return {name: statistics.fmean(values) for name, values in scores.items()}


def _warnings(study: Study) -> list[str]:
    """Return a sentence about each kind of missing or uncertain result."""
    messages = [f"{run.label} failed: {run.error}" for run in study.runs() if run.state == "failed"]
    if incomplete := [run.label for run in study.runs() if run.state == "incomplete"]:
        messages.append(f"Incomplete: {'; '.join(incomplete)}.")
    if missing := [item.title for item in study.table.configurations if not study.runs(item)]:
        messages.append(f"Not run: {'; '.join(missing)}.")
    if single := sum(len(study.results(item)) == 1 for item in study.table.configurations):
        messages.append(f"{single} of the configurations have one seed only: small differences are not significant.")
    return messages


def _changed_settings(study: Study) -> list[tuple[str, str]]:
    """Return (title, changed settings) of each configuration; None: a setting that the other method does not have."""
    rows = []
    for item in study.table.configurations:
        changed = differences(study.base, study.table.run(item, study.scale, study.base))
        changes = [f"{name} {format_value(new)}" for name, _, new in changed if new is not None]
        rows.append((item.title, "; ".join(changes) or "none: the base"))
    return rows


def _cost(study: Study) -> list[list[str]]:
    """Return label, state, time, images, images/s and memory of every run that was started."""
    rows = []
    for run in study.runs():
        cells = [run.state, *[NONE] * 4]
        if (result := run.result) is not None:
            values, state = result.values, "in another table" if run.folder.is_symlink() else "done"
            speed, memory = f"{values['images/s']:,.0f}", f"{values['memory']:.2f} GiB"
            cells = [state, duration(3600 * values["hours"]), f"{values['images']:,.0f}", speed, memory]
        rows.append([run.label, *cells])
    return rows


def _draw_curves(study: Study, path: Path) -> None:
    """Draw the curves side by side as a PNG: a line for every seed, in the color of its configuration."""
    from matplotlib.figure import Figure

    names = [name for name in CURVES if name == "loss" or name in ("20-NN", *study.table.metrics)]
    figure = Figure(figsize=(4.6 * len(names), 3.6), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, item in enumerate(study.table.configurations):
            for i, run in enumerate(study.runs(item)):
                xs, ys = run.line(name)
                label, marker = None if i else item.title, "." if len(xs) < 25 else None
                axes.plot(xs, ys, color=f"C{number}", linewidth=1.4, label=label, marker=marker)
        references = _reference_scores(study) if name in EVALS else {}
        for label, value in references.items():
            axes.axhline(value, color="0.6", linestyle="--", linewidth=1)
            side = "top" if value == min(references.values()) else "bottom"  # labels of near lines do not overlap
            axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va=side, fontsize=7)
        axes.set_title(METRICS[name][0], fontsize=10)
        axes.set_xlabel("epoch")
        if name not in ("loss", *EVALS):
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    atomic_write(path, lambda part: figure.savefig(part, format="png"))
