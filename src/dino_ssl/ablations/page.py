"""Page of a study: our results with their spread next to the paper's, as Markdown with an image of the curves."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from dino_ssl.ablations.results import EVALS, Spread, Study
from dino_ssl.ablations.table import CURVES, METRICS, Configuration
from dino_ssl.config import format_value
from dino_ssl.files import atomic_write
from dino_ssl.formatting import duration
from dino_ssl.report.curves import Line
from dino_ssl.run import Run

NONE = "–"
OPEN, CLOSE = "<!-- discussion: written by hand, kept when this page is generated again -->", "<!-- end -->"
NO_DISCUSSION = "Discussion of these results: not written yet."
SCALE_NOTES = {
    "paper": "At the paper scale, network, epochs and crops are those of the paper.",
    "small": "At the small scale, a small network is trained on small crops for minutes: compare the ranking of the "
    "configurations with the paper, not the values.",
}


def write_page(study: Study, folder: Path | None = None) -> list[Path]:
    """Write FOLDER/TABLE.md and, if there are curves, FOLDER/TABLE.png; return their paths.

    folder: of the study by default. The hand-written discussion of an existing page is kept.
    """
    folder = folder or study.folder
    path, image = folder / f"{study.table.name}.md", folder / f"{study.table.name}.png"
    has_image = _draw_curves(study, image)
    text = _page(study, _discussion(path), image.name if has_image else "")
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))
    return [path, image] if has_image else [path]


def result_columns(study: Study) -> list[str]:
    """Return the titles of the columns: for each metric our result and the paper's."""
    return [text for name in study.table.metrics for text in (METRICS[name][0], "paper")]


def result_cells(study: Study, configuration: Configuration) -> list[str]:
    """Return one row of the results: for each metric our result, as `43.1 (42.0 to 44.3, n 3)`, and the paper's."""
    cells, paper = [], study.table.paper_results(configuration)
    for name in study.table.metrics:
        title, digits = METRICS[name]
        cells.append(_format_spread(study.spread(configuration, name), digits))
        paper_format = f".{digits}f" if title.endswith("%") else "g"
        cells.append(f"{paper[name]:{paper_format}}" if name in paper else NONE)
    return cells


def _format_spread(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return NONE
    mean, low, high = (f"{value:.{digits}f}" for value in spread[:3])
    return f"{mean} ({low} to {high}, n {spread.n})" if spread.n > 1 else mean


def _page(study: Study, discussion: str, image: str) -> str:
    table, network = study.table, study.base.backbone.describe()
    results = ([item.title, *result_cells(study, item)] for item in table.configurations)
    parts = [
        f"# {table.title}",
        f"Paper: {_length(table.base('paper'))} of ImageNet. {table.note}",
        f"Our runs, at scale {study.scale}: {_length(study.base)} of {study.data['images']:,} images of "
        f"{study.data['classes']} classes.",
        _markdown_table(["", *result_columns(study)], results),
        _results_note(study),
        "\n".join(f"- {message}" for message in _warnings(study)),
        f"Conclusion of the paper: {table.conclusion}",
        f"{OPEN}\n\n{discussion}\n\n{CLOSE}",
        f"## Curves\n\n![curves]({image})" if image else "",
        f"## Changed settings\n\nAll configurations share one base ({network}; study.json has all its settings) and "
        "change these settings.",
        _markdown_table(["configuration", "changes"], _changed_settings(study)),
        "## Cost",
        _markdown_table(["run", "state", "time", "images seen", "images/s", "peak memory"], _cost(study)),
        "## Environment",
        _markdown_table(["", ""], _environment(study)),
        f"Run again: `dino ablate {table.name} --scale {study.scale} --data ...`, then "
        f"`dino report {table.name} --markdown docs/ablations`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _length(run: Run) -> str:
    """Return network, crops, batch size and epochs."""
    crops = " + ".join(f"{count}x{side}" for count, side in run.views.view_shapes)
    return f"{run.backbone.describe()}, crops {crops}, batch size {run.optim.batch_size}, {run.optim.epochs} epochs"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _discussion(path: Path) -> str:
    """Return the hand-written part of an existing page."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if OPEN not in text or CLOSE not in text:
        return NO_DISCUSSION
    return text.split(OPEN, 1)[1].split(CLOSE, 1)[0].strip()


def _results_note(study: Study) -> str:
    """Return how the results were measured and how they compare with the paper."""
    fraction = study.data.get("val_fraction") or 0
    images = f"{fraction:.0%} of the images of every class, held out by the seed" if fraction else "the validation set"
    scores = ", ".join(f"{name} {value:.1f} %" for name, value in _reference_scores(study).items())
    return (
        "Ours: the mean over the seeds, with the minimum, the maximum and the number of seeds n; "
        f"measured on {images}. {SCALE_NOTES[study.scale]}"
        + (f" Reference scores (20-NN): {scores}." if scores else "")
    )


def _reference_scores(study: Study) -> dict[str, float]:
    """Return the 20-NN accuracy of raw pixels and of random weights, in percent: the mean over all runs."""
    scores: dict[str, list[float]] = {}
    for result in study.results():
        for name, values in result.references.items():
            if "20-NN" in values:
                scores.setdefault(name.replace("_", " "), []).append(values["20-NN"])
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _warnings(study: Study) -> list[str]:
    """Return a sentence about each kind of missing or uncertain result."""
    runs = study.runs()
    messages = [f"{run.label} failed: {run.error}" for run in runs if run.state == "failed"]
    if incomplete := [run.label for run in runs if run.state == "incomplete"]:
        messages.append(f"Incomplete: {'; '.join(incomplete)}.")
    if missing := [item.title for item in study.table.configurations if not study.runs(item)]:
        messages.append(f"Not run: {'; '.join(missing)}.")
    if single := sum(len(study.results(item)) == 1 for item in study.table.configurations):
        messages.append(f"{single} of the configurations have one seed only: small differences are not significant.")
    return messages


def _changed_settings(study: Study) -> list[tuple[str, str]]:
    """Return (title, changed settings) of each configuration."""
    rows = []
    for item in study.table.configurations:
        changes = study.differences(item)
        if any(name == "method" for name, _, _ in changes):  # the base's settings belong to another method
            changed = [f"{name} {format_value(new)}" for name, _, new in changes if new is not None]
        else:
            changed = [f"{name} {format_value(new)} (base {format_value(old)})" for name, old, new in changes]
        rows.append((item.title, "; ".join(changed) or "none: the base"))
    return rows


def _cost(study: Study) -> list[list[str]]:
    """Return state, time, images, images/s and memory of every run that was started."""
    rows = []
    for run in study.runs():
        cells = [run.state, *[NONE] * 4]
        if (result := run.result) is not None:
            state = "in another table" if run.folder.is_symlink() else run.state
            speed, memory = f"{result.images_per_s:,.0f}", f"{result.values['memory']:.2f} GB"
            cells = [state, duration(3600 * result.values["hours"]), f"{result.images_seen:,}", speed, memory]
        rows.append([run.label, *cells])
    return rows


def _environment(study: Study) -> list[tuple[str, str]]:
    results, data = study.results(), study.data
    versions = sorted({f"{name} {version}" for result in results for name, version in result.versions.items()})
    seconds = sum(3600 * result.values["hours"] for result in results)
    return [
        ("machine", "; ".join(sorted({result.machine for result in results})) or NONE),
        ("versions", ", ".join(versions) or NONE),
        ("total time", f"{duration(seconds)} for {len(results)} runs"),
        ("images", f"{data['images']:,} of {data['classes']} classes, fingerprint {data['fingerprint']}"),
        ("precision", study.base.precision),
    ]


def _draw_curves(study: Study, path: Path) -> bool:
    """Draw the curves side by side as a PNG; return False if there are none."""
    curves = {name: lines for name in study.table.curves if (lines := _mean_lines(study, name))}
    if not curves:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.6), dpi=110, layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for title, (xs, ys) in lines.items():
            axes.plot(xs, ys, linewidth=1.4, label=title, marker="." if len(xs) < 25 else None)
        for label, value in _reference_lines(study, name).items():
            axes.axhline(value, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        axes.set_title(CURVES[name], fontsize=10)
        axes.set_xlabel("epoch")
        if name != "loss":
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=7, frameon=False)
    atomic_write(path, lambda part: figure.savefig(part, format="png"))
    return True


def _mean_lines(study: Study, name: str) -> dict[str, Line]:
    """Return the mean over the seeds of each configuration, by its title; seeds at other epochs are skipped."""
    means = {}
    for item in study.table.configurations:
        lines = [points for run in study.runs(item) if len((points := run.line(name))[0])]
        lines = [points for points in lines if list(points[0]) == list(lines[0][0])]
        if lines:
            means[item.title] = lines[0][0], [sum(ys) / len(ys) for ys in zip(*(ys for _, ys in lines), strict=True)]
    return means


def _reference_lines(study: Study, name: str) -> dict[str, float]:
    """Return the horizontal lines of a chart: reference scores, or ln K."""
    if name in EVALS:
        return _reference_scores(study)
    prototypes = study.base.method.num_prototypes
    return {"ln K": math.log(prototypes)} if name == "teacher_entropy" and prototypes else {}
