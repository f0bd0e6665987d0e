"""Sections of the report: evaluations, health, attention maps, nearest neighbors, and settings."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path
from typing import Any

from dino_ssl import html
from dino_ssl.config import format_value, type_name
from dino_ssl.data.dataset import spaced_indices
from dino_ssl.files import check_format, read_json, read_lines
from dino_ssl.presets.plan import FORMAT
from dino_ssl.report.curves import History, Line, Rows, chart, charts, line, score_names
from dino_ssl.report.snapshots import read_index, read_neighbors
from dino_ssl.report.verdict import ONLINE, below_initial
from dino_ssl.run import Run

MAX_CURVES = 3
"""Metrics of one evaluation in its chart; the table has all."""
MAX_EPOCHS = 6
"""Epochs of which the attention maps are shown."""
PATH_FIELDS = ("data", "val", "init", "evals", "out")
"""Fields of a Run that have paths, which a private report omits."""
MAX_TEXT = 120
"""Characters of a setting."""
HEALTH_CHARTS: list[tuple[str, dict[str, str], str]] = [
    ("Prototypes in use", {"used": "prototypes_used"}, "Exp of the entropy of the mean target; 1: all images get one."),
    ("Effective rank of the features", {"rank": "feature_rank"}, "At most twice the batch size minus 1."),
    ("Spread of the features", {"spread": "feature_spread"}, "0: all images have the same feature."),
    ("Norms", {"features": "feature_norm", "center": "center_norm"}, ""),
    ("Gradient norm before clipping", {"gradient": "grad_norm"}, ""),
    ("Distance of teacher and student", {"distance": "teacher_distance"}, "Relative to the norm of the student."),
]
"""Title, metrics by their name in the legend, and note."""
INFORMATION_NOTE = (
    "Information of a target about its image within a batch, and the part that the student predicts. Below 0 the "
    "student is worse than a constant prediction."
)


# -- metrics -----------------------------------------------------------------------------------------------


def evals_section(evaluations: Mapping[str, Rows], *, private: bool = False) -> str:
    """Return the curves, first and last values of every evaluation of `Run.evals`. private: omit folders."""
    parts = []
    for name, rows in evaluations.items():
        if name in ONLINE:  # at the top of the page
            continue
        metrics = score_names(rows[-1])
        ends = [rows[0], rows[-1]] if len(rows) > 1 else rows
        curves = {key: line(rows, key) for key in metrics[:MAX_CURVES]} if len(rows) > 1 else {}
        cells = [[key, *(f"{row[key]:.1f}" if row.get(key) is not None else "–" for row in ends)] for key in metrics]
        head = ["", *(f"epoch {row.get('epoch', 0):.4g}" for row in ends)]
        figure = charts(chart(curves, title="Over epochs", from_zero=True))
        name = " ".join(Path(word).name for word in name.split()) if private else name
        warning = f'<p class="warning">{escape(below)}</p>' if (below := below_initial(rows)) else ""
        parts += [f"<h3>{escape(name)}</h3>", warning, figure, html.table([head, *cells], wrap=True)]
    return html.section("Evaluations", "Run during training. In percent unless the name states a unit.", *parts)


def health_section(run_dir: Path, prototypes: int | None, history: History) -> str:
    """Return charts of the collapse metrics, and the findings logged during training."""
    line = history.line
    information = {"of the targets": _difference(line("marginal_entropy"), line("teacher_entropy"))}
    if line("kl")[0]:
        information["predicted by the student"] = _difference(line("marginal_entropy"), line("loss"))
    references = {"Prototypes in use": {"K": prototypes or math.nan}, "Spread of the features": {"all different": 1.0}}
    figures = [chart(information, title="Mutual information, nats", note=INFORMATION_NOTE)]
    for title, metrics, note in HEALTH_CHARTS:
        lines = {name: line(metric) for name, metric in metrics.items()}
        figures.append(chart(lines, title=title, references=references.get(title), from_zero=True, note=note))
    findings = [
        (f"step {row['step']:,}" if row.get("step") else "before training", row["name"], row["message"])
        for row in read_lines(run_dir / "health.jsonl")
    ]
    text = "Metrics and findings that reveal a collapse."
    return html.section("Health", text, charts(*figures), html.table(findings))


def _difference(minuend: Line, subtrahend: Line) -> Line:
    """Return the difference of two curves at their common points."""
    values = dict(zip(*subtrahend, strict=True))
    pairs = [(x, y - values[x]) for x, y in zip(*minuend, strict=True) if x in values]
    return [x for x, _ in pairs], [y for _, y in pairs]


# -- images ------------------------------------------------------------------------------------------------


def attention_section(folder: Path) -> str:
    """Return the attention or similarity maps of RUN/snapshots: over epochs, then the panels of the latest snapshot."""
    index = read_index(folder)
    if not index["images"]:
        return ""
    epochs, panels = index["epochs"], index["panels"]
    epochs = [epochs[i] for i in spaced_indices(len(epochs), MAX_EPOCHS)]
    over_epochs, latest = [], []
    for number, image in index["images"].items():
        sample = html.image_cell(folder / f"images/{number}.jpg", _caption(image), alt=image["name"])
        maps = (html.image_cell(folder / f"epoch_{epoch:04d}/{number}.jpg") for epoch in epochs)
        details = (html.image_cell(folder / f"latest/{number}-{panel}.jpg") for panel in range(len(panels)))
        over_epochs.append(sample + "".join(maps))
        latest.append(sample + "".join(details))
    text = "Attention of the [CLS] token in the last block, mean over heads."
    if index["kind"] == "similarity":
        text = "Cosine similarity of each patch to the pooled feature."
    return html.section(
        f"{index['kind'].capitalize()} maps",
        text,
        html.image_table(["", *(f"epoch {epoch:.4g}" for epoch in epochs)], over_epochs),
        f'<p class="between">Epoch {index["latest"]:.4g}. The mask: the fewest patches that hold 60 % of the map.</p>',
        html.image_table(["", *panels], latest),
    )


def neighbors_section(folder: Path) -> str:
    """Return the nearest images of each sample image; those of the same class are marked."""
    content, rows = read_neighbors(folder), []
    for query in content.get("queries", []):
        cells = html.image_cell(_thumbnail(folder, query), _caption(query), alt=query["name"])
        for image in query["neighbors"]:
            kind = "same" if query["label"] and image["label"] == query["label"] else ""
            caption = f"{image['similarity']:.2f}  {image['label'] or ''}".strip()
            cells += html.image_cell(_thumbnail(folder, image), caption, alt=image["name"], kind=kind)
        rows.append(cells)
    text = f"Among {content.get('images', 0):,} images, by cosine similarity of their features."
    text += " Green: the same class." * any(query["label"] for query in content.get("queries", []))
    return html.section("Nearest neighbors", text, html.image_table(["image", "nearest"], rows))


def _thumbnail(folder: Path, image: Mapping[str, Any]) -> Path:
    return folder / f"thumbs/{image['index']}.jpg"


def _caption(image: Mapping[str, Any]) -> str:
    return image["label"] or Path(image["name"]).name


# -- settings ----------------------------------------------------------------------------------------------


def plan_section(run_dir: Path, *, private: bool) -> str:
    """Return the settings that the plan chose, with its reasons."""
    content = read_json(path := run_dir / "plan.json") or {"format": FORMAT, "plan": []}
    check_format(path, content.get("format"), FORMAT)
    reasons = [row for row in content["plan"] if not (private and row["name"].split(".")[0] in PATH_FIELDS)]
    rows = [[reason[key] for key in ("name", "value", "reason")] for reason in reasons]
    if corrected := (read_json(run_dir / "run.json") or {}).get("corrected"):
        (_, epochs), minutes, step = corrected["epochs"], corrected["minutes"], corrected["step"]
        rows.append(["epochs, corrected", f"{epochs}", f"fit into {minutes:g} minutes at the speed until step {step}"])
    return html.section("Plan", "Settings chosen for this dataset and machine, with reasons.", html.table(rows))


def settings_section(run: Run, *, private: bool) -> str:
    """Return a card for the run's own settings, and one for each nested value. private: omit PATH_FIELDS."""
    omitted = PATH_FIELDS if private else ()
    nested = {n: value for n, value in vars(run).items() if dataclasses.is_dataclass(value) and n not in omitted}
    cards = [
        _card("Run", "", run, omitted),
        *(_card(name, type_name(type(value)), value) for name, value in nested.items()),
    ]
    grid = f'<div class="grid settings">{"".join(cards)}</div>'
    extent = "Settings of run.json without paths" if private else "All settings of run.json"
    return html.section("Settings", f"{extent}; defaults are gray.", grid)


def _card(title: str, kind: str, settings: Any, omitted: Collection[str] = ()) -> str:
    """Return the settings as a card; defaults last and gray."""
    rows = []
    for field in dataclasses.fields(settings):
        value, factory = getattr(settings, field.name), field.default_factory
        if not dataclasses.is_dataclass(value) and field.name not in omitted:
            default = field.default if factory is dataclasses.MISSING else factory()
            css = ' class="default"' if value == default else ""
            name, text = escape(field.name.replace("_", " ")), escape(shorten(value))
            rows.append((bool(css), f"<dt{css}>{name}</dt><dd{css}>{text}</dd>"))
    items = "".join(item for _, item in sorted(rows, key=lambda row: row[0]))
    title = title.replace("_", " ").capitalize()
    return f'<div class="card"><h3>{escape(title)} <span>{escape(kind)}</span></h3><dl>{items}</dl></div>'


def shorten(value: Any) -> str:
    """Return a setting as text of at most MAX_TEXT characters."""
    text = format_value(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
