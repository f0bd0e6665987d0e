"""Text and tables about a study, shared by the HTML page, the Markdown page and the command line."""

import math
from collections.abc import Sequence

from dino_ssl.ablations.results import Spread, Study, StudyRun
from dino_ssl.ablations.table import METRICS, Configuration, Curve, Metric
from dino_ssl.config import format_value
from dino_ssl.formatting import duration
from dino_ssl.report.curves import Line

NONE = "–"
PAPER_SCALE = "At the paper scale, network, epochs and crops are those of the paper."
SMALL_SCALE = (
    "At the small scale, a small network is trained on small crops for minutes: compare the ranking of the "
    "configurations with the paper, not the values."
)
COST_COLUMNS = ("run", "state", "time", "images seen", "images/s", "peak memory")


def introduction(study: Study) -> str:
    """Return a sentence about network, length, dataset, batch size and crops."""
    base, data = study.base, study.data
    crops = " and ".join(str(side) for _, side in base.views.view_shapes)
    return (
        f"Our runs, at scale {study.scale}: {base.backbone.describe()}, {base.optim.epochs} epochs of "
        f"{data['images']:,} images of {data['classes']} classes, batch size {base.optim.batch_size}, "
        f"crops of {crops} pixels."
    )


def results_note(study: Study) -> str:
    """Return how the results were measured and how they compare with the paper."""
    fraction = study.data.get("val_fraction") or 0
    images = f"{fraction:.0%} of the images of every class, held out by the seed" if fraction else "the validation set"
    note = (
        "Ours: the mean over the seeds, with the minimum, the maximum and the number of seeds n; "
        f"measured on {images}. " + (SMALL_SCALE if study.scale == "small" else PAPER_SCALE)
    )
    scores = ", ".join(f"{name} {value:.1f} %" for name, value in reference_scores(study).items())
    return note + (f" Reference scores (20-NN): {scores}." if scores else "")


def warnings(study: Study) -> list[str]:
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


def format_spread(spread: Spread | None, metric: Metric) -> str:
    """Return `43.1 (42.0 to 44.3, n 3)`, or only the mean for one seed."""
    if spread is None:
        return NONE
    mean, low, high = (f"{value:.{metric.digits}f}" for value in (spread.mean, spread.low, spread.high))
    return f"{mean} ({low} to {high}, n {spread.n})" if spread.n > 1 else mean


def format_paper(configuration: Configuration, metric: Metric) -> str:
    """Return the paper's result."""
    value = configuration.paper.get(metric.name)
    if value is None:
        return NONE
    return f"{value:.{metric.digits}f}" if metric.unit == "%" else f"{value:g}"


def result_columns(study: Study) -> list[str]:
    """Return the titles of the columns: for each metric our result and the paper's."""
    metrics = [METRICS[name] for name in study.table.metrics]
    return [text for metric in metrics for text in (f"{metric.title}, {metric.unit}", "paper")]


def result_cells(study: Study, configuration: Configuration) -> list[str]:
    """Return one row of the results: for each metric our result and the paper's."""
    cells = []
    for name in study.table.metrics:
        cells.append(format_spread(study.spread(configuration, name), METRICS[name]))
        cells.append(format_paper(configuration, METRICS[name]))
    return cells


def reference_scores(study: Study) -> dict[str, float]:
    """Return the 20-NN accuracy of raw pixels and of random weights, in percent: the mean over all runs."""
    scores: dict[str, list[float]] = {}
    for result in study.results():
        for name, values in result.references.items():
            if "20-NN" in values:
                scores.setdefault(name.replace("_", " "), []).append(values["20-NN"])
    return {name: sum(values) / len(values) for name, values in scores.items()}


def changes_note(study: Study) -> str:
    """Return a sentence about the base."""
    network = study.base.backbone.describe()
    return f"All configurations share one base ({network}; study.json has all its settings) and change these settings."


def changed_settings(study: Study) -> list[tuple[str, str]]:
    """Return (title, changed settings) of each configuration."""
    rows = []
    for item in study.table.configurations:
        settings = study.differences(item)
        if any(name == "method" for name, _, _ in settings):  # the base's settings belong to another method
            changed = [f"{name} {format_value(new)}" for name, _, new in settings if new is not None]
        else:
            changed = [f"{name} {format_value(new)} (base {format_value(old)})" for name, old, new in settings]
        rows.append((item.title, "; ".join([*(changed or ["none: the base"]), *([item.note] if item.note else [])])))
    return rows


def cost_rows(study: Study) -> list[tuple[StudyRun, list[str]]]:
    """Return state, time, images, images/s and memory of every run that was started."""
    rows = []
    for run in study.runs():
        if (result := run.result) is None:
            rows.append((run, [run.state, *[NONE] * 4]))
        else:
            state = "in another table" if run.is_shared else run.state
            speed, memory = f"{result.images_per_s:,.0f}", f"{result.memory / 2**30:.2f} GB"
            rows.append((run, [state, duration(result.seconds), f"{result.images_seen:,}", speed, memory]))
    return rows


def environment(study: Study) -> list[tuple[str, str]]:
    """Return machine, versions, total time, dataset and precision."""
    results, data = study.results(), study.data
    machines = sorted({f"{result.machine}, threads per run: {result.threads}" for result in results})
    versions = sorted({f"{name} {version}" for result in results for name, version in result.versions.items()})
    return [
        ("machine", "; ".join(machines) or NONE),
        ("versions", ", ".join(versions) or NONE),
        ("total time", f"{duration(sum(result.seconds for result in results))} for {len(results)} runs"),
        ("images", f"{data['images']:,} of {data['classes']} classes, fingerprint {data['fingerprint']}"),
        ("precision", study.base.precision),
    ]


def mean_lines(study: Study, curve: Curve) -> dict[str, Line]:
    """Return the mean over the seeds of each configuration, by its title."""
    lines = {}
    for item in study.table.configurations:
        per_seed = [points for run in study.runs(item) if len((points := run.line(curve.name))[0])]
        if per_seed:
            lines[item.title] = _mean(per_seed)
    return lines


def reference_lines(study: Study, curve: Curve) -> dict[str, float]:
    """Return the horizontal lines of a chart: reference scores, or ln K."""
    if "20-NN" in curve.name:
        return reference_scores(study)
    counts = {result.prototypes for result in study.results() if result.prototypes}
    return {"ln K": math.log(counts.pop())} if curve.show_ln_k and len(counts) == 1 else {}


def _mean(lines: Sequence[Line]) -> Line:
    """Return the mean if all seeds were measured at the same epochs, else the first seed's line."""
    xs = lines[0][0]
    if any(list(x) != list(xs) for x, _ in lines):
        return lines[0]
    return xs, [sum(values) / len(values) for values in zip(*(ys for _, ys in lines), strict=True)]
