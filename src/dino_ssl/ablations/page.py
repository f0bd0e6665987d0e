"""One self-contained page about a table that was run: our figures with their spread beside the paper's."""

import math
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path

from dino_ssl.ablations.results import Cell, Spread, Study
from dino_ssl.ablations.table import Curve, Figure, Row
from dino_ssl.config import format_value
from dino_ssl.files import atomic_write
from dino_ssl.formatting import duration
from dino_ssl.models.backbone import BackboneConfig
from dino_ssl.report import html
from dino_ssl.report.curves import Line, chart

PICTURES = "At scale paper the network, the epochs and the crops are the paper's."
SMALL = (
    "At scale small a small network sees small crops for minutes: what can be compared with the paper is which rows "
    "stand above which, and not the figures."
)


def write_study_page(study: Study) -> Path:
    """Writes FOLDER/report.html from what lies there; rows that are missing say so."""
    body = [
        _header(study),
        *(f'<p class="warning">{escape(said)}</p>' for said in warnings(study)),
        html.section("Figures", escape(figures_note(study)), _figures(study), _shows(study)),
        _curves(study),
        html.section("What the rows change", escape(base_words(study)), html.table(row_settings(study), first="name")),
        html.section("Cost", "One line for each row and seed; its own page is behind the name.", _cost(study)),
        html.section("Environment", "What it ran on.", html.table(environment(study))),
    ]
    text = html.page(f"{study.table.title} · dino", body)
    return atomic_write(study.folder / "report.html", lambda aside: aside.write_text(text, encoding="utf-8"))


# -- what both the page and the markdown say ---------------------------------------------------------------


def lead(study: Study) -> str:
    """What was run here, in a sentence."""
    base, data = study.base, study.data
    dataset = f"{data['images']:,} pictures of {data['classes']} classes"
    return (
        f"Ours, at scale {study.scale}: {network_words(base.backbone)}, {base.optim.epochs} epochs of {dataset}, "
        f"batch {base.optim.batch_size}, crops of {' and '.join(str(side) for _, side in base.views.view_shapes)} pixels."
    )


def network_words(backbone: BackboneConfig) -> str:
    """`resnet18 (channels 32 64 128 256, layers 1 1 1 1)`: the name, and what is not as the name says."""
    overrides = backbone.overrides()
    return f"{backbone.describe()} ({overrides})" if overrides else backbone.describe()


def figures_note(study: Study) -> str:
    held = study.data.get("val_fraction") or 0
    asked = f"{held:.0%} of every class, held back by the seed" if held else "the pictures given for it"
    return (
        "Ours: the mean over the seeds, with the smallest and the largest and the number of seeds n; "
        f"measured on {asked}. " + (SMALL if study.scale == "small" else PICTURES)
    )


def warnings(study: Study) -> list[str]:
    cells = [cell for row in study.table.rows for cell in study.cells(row)]
    found = [f"{_named(cell)} failed: {cell.error}" for cell in cells if cell.state == "failed"]
    begun = [_named(cell) for cell in cells if cell.state == "begun"]
    found += [f"Begun and not finished: {', '.join(begun)}."] if begun else []
    missing = [row.what for row in study.table.rows if not study.cells(row)]
    found += [f"Not run: {'; '.join(missing)}."] if missing else []
    single = [row for row in study.table.rows if len(study.results(row)) == 1]
    if single:
        found.append(f"{len(single)} of the rows have one seed alone: small differences mean nothing.")
    return found


def spread_words(spread: Spread | None, figure: Figure) -> str:
    """`43.1 (42.0 to 44.3, n 3)`"""
    if spread is None:
        return "–"
    mean, low, high = (f"{value:.{figure.digits}f}" for value in (spread.mean, spread.low, spread.high))
    return f"{mean} ({low} to {high}, n {spread.n})" if spread.n > 1 else mean


def paper_words(row: Row, figure: Figure) -> str:
    if figure.name not in row.paper:
        return "–"
    value = row.paper[figure.name]
    return f"{value:.{figure.digits}f}" if figure.unit == "%" else f"{value:g}"


def references(study: Study) -> dict[str, float]:
    """Raw pixels and random weights under the same vote: the mean over rows and seeds."""
    found: dict[str, list[float]] = {}
    for result in study.finished:
        for name, values in result.references.items():
            if "20-NN" in values:
                found.setdefault(name.replace("_", " "), []).append(values["20-NN"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def base_words(study: Study) -> str:
    return (
        f"All rows are the same base ({network_words(study.base.backbone)}; study.json has it whole) "
        "with these settings changed."
    )


def row_settings(study: Study) -> Iterator[tuple[str, str]]:
    for row in study.table.rows:
        settings = study.settings(row)
        changed = [f"{name} {format_value(new)} (base {format_value(old)})" for name, old, new in settings]
        if any(name == "method" for name, _, _ in settings):  # what it lacks of the base's settings tells nothing
            changed = [f"{name} {format_value(new)}" for name, _, new in settings if new is not None]
        note = [row.note] if row.note else []
        yield row.what, "; ".join([*(changed or ["nothing: the base"]), *note])


def cost(study: Study) -> Iterator[tuple[Cell, list[str]]]:
    """state, time, pictures, images/s and memory of every cell."""
    for row in study.table.rows:
        for cell in study.cells(row):
            result = cell.result
            if result is None:
                yield cell, [cell.state, "–", "–", "–", "–"]
                continue
            state = "in another table" if cell.shared else cell.state
            speed, memory = f"{result.images_per_s:,.0f}", f"{result.memory / 2**30:.2f} GB"
            yield cell, [state, duration(result.seconds), f"{result.dataset:,}", speed, memory]


COST = ("row", "state", "time", "pictures seen", "images/s", "peak memory")


def environment(study: Study) -> list[tuple[str, str]]:
    results = study.finished
    machines = sorted({f"{result.machine}, {result.threads} threads a row" for result in results})
    versions = sorted({f"{name} {version}" for result in results for name, version in result.versions.items()})
    seconds, data = sum(result.seconds for result in results), study.data
    return [
        ("machine", "; ".join(machines) or "–"),
        ("versions", ", ".join(versions) or "–"),
        ("time in all", f"{duration(seconds)} over {len(results)} runs"),
        ("images", f"{data['images']:,} of {data['classes']} classes, fingerprint {data['fingerprint']}"),
        ("precision", study.base.precision),
    ]


def lines(study: Study, curve: Curve) -> dict[str, Line]:
    """One line for each row: the mean over its seeds."""
    found = {}
    for row in study.table.rows:
        each = [one for cell in study.cells(row) if len((one := cell.line(curve.name))[0])]
        if each:
            found[row.what] = _mean(each)
    return found


def bibliography(study: Study, curve: Curve) -> dict[str, float]:
    if "20-NN" in curve.name:
        return references(study)
    counts = {result.prototypes for result in study.finished if result.prototypes}
    return {"ln K": math.log(counts.pop())} if curve.of_ln_k and len(counts) == 1 else {}


def _mean(each: list[Line]) -> Line:
    """Over the seeds, where all were measured at the same epochs; else the first seed's."""
    xs = each[0][0]
    if any(list(x) != list(xs) for x, _ in each):
        return each[0]
    return xs, [sum(values) / len(values) for values in zip(*(ys for _, ys in each), strict=True)]


def _named(cell: Cell) -> str:
    return f"{cell.row.what} (seed {cell.seed})"


# -- the page ----------------------------------------------------------------------------------------------


def _header(study: Study) -> str:
    return (
        f'<div class="eyebrow">dino · a table of the paper, run</div><h1>{escape(study.table.title)}</h1>'
        f'<p class="lead">{escape(lead(study))}</p><p>The paper: {escape(study.table.protocol)}</p>\n'
    )


def _shows(study: Study) -> str:
    below = ", ".join(f"{name} {value:.1f} %" for name, value in references(study).items())
    floor = f"<p>Floors under the 20-NN: {escape(below)}.</p>" if below else ""
    said = f"<p>What the paper concludes: {escape(study.table.shows)}</p>" if study.table.shows else ""
    return f'<div style="margin-top:14px">{floor}{said}</div>'


def _figures(study: Study) -> str:
    figures = study.table.figures
    heads = "".join(
        f"<th>{escape(figure.title)}, {escape(figure.unit)}<br>ours</th><th><br>paper</th>" for figure in figures
    )
    rows = []
    for row in study.table.rows:
        cells = []
        for figure in figures:
            spread = study.spread(row, figure.name)
            words = spread_words(spread, figure)
            mean, _, rest = words.partition(" (")
            small = f'<span class="small">{escape(rest.rstrip(")"))}</span>' if rest else ""
            cells.append(f'<td class="ours">{mean}{small}</td><td class="paper">{paper_words(row, figure)}</td>')
        rows.append(f"<tr><td>{escape(row.what)}</td>{''.join(cells)}</tr>")
    body = "".join(rows)
    return f'<div class="scroll"><table class="figures"><thead><tr><th></th>{heads}</tr></thead>{body}</table></div>'


def _curves(study: Study) -> str:
    drawn = [
        chart(
            lines(study, curve),
            title=curve.title,
            unit=curve.unit,
            from_zero=curve.from_zero,
            references=bibliography(study, curve),
        )
        for curve in study.table.curves
    ]
    charts = "".join(drawn)
    return html.section(
        "Curves", "Over epochs; the mean over the seeds.", f'<div class="grid charts">{charts}</div>' if charts else ""
    )


def _cost(study: Study) -> str:
    rows = []
    for cell, words in cost(study):
        name = escape(_named(cell))
        report = cell.home / "report.html"
        if report.is_file():
            link = os.path.relpath(report.resolve(), study.folder.resolve())
            name = f'<a href="{escape(link)}">{name}</a>'
        rows.append(f"<tr><td>{name}</td>{''.join(f'<td>{escape(word)}</td>' for word in words)}</tr>")
    heads = "".join(f"<th>{escape(head)}</th>" for head in COST)
    body = "".join(rows)
    table = f'<div class="scroll"><table class="figures"><thead><tr>{heads}</tr></thead>{body}</table></div>'
    return table if rows else ""
