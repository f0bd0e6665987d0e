"""HTML page of a study: our results with their spread next to the paper's, in one self-contained file."""

import os
from html import escape
from pathlib import Path

from dino_ssl.ablations import summary
from dino_ssl.ablations.results import Study
from dino_ssl.ablations.table import CURVES
from dino_ssl.files import atomic_write
from dino_ssl.report import html
from dino_ssl.report.curves import chart


def write_study_page(study: Study) -> Path:
    """Write FOLDER/report.html from the results on disk; missing runs are listed."""
    table = study.table
    body = [
        f'<div class="eyebrow">dino · reproduction of the paper</div><h1>{escape(table.title)}</h1>'
        f'<p class="lead">{escape(summary.introduction(study))}</p><p>Paper: {escape(table.protocol)}</p>\n',
        *(f'<p class="warning">{escape(message)}</p>' for message in summary.warnings(study)),
        html.section("Results", escape(summary.results_note(study)), _results(study)),
        html.section("Curves", "Over epochs; the mean over the seeds.", _curves(study)),
        html.section(
            "Changed settings",
            escape(summary.changes_note(study)),
            html.table(summary.changed_settings(study), first="name"),
        ),
        html.section("Cost", "One line per run, with a link to the report of that run.", _cost(study)),
        html.section("Environment", "Hardware, versions and data.", html.table(summary.environment(study))),
    ]
    text = html.page(f"{table.title} · dino", body)
    return atomic_write(study.folder / "report.html", lambda path: path.write_text(text, encoding="utf-8"))


def _results(study: Study) -> str:
    columns = "".join(f"<th>{escape(column)}</th>" for column in summary.result_columns(study))
    rows = []
    for item in study.table.configurations:
        cells = [escape(item.title)]
        for number, text in enumerate(summary.result_cells(study, item)):
            mean, _, spread = text.partition(" (")
            small = f'<span class="small">{spread.rstrip(")")}</span>' if spread else ""
            cells.append(f'<td class="{"paper" if number % 2 else "ours"}">{mean}{small}</td>')
        rows.append(f"<tr><td>{cells[0]}</td>{''.join(cells[1:])}</tr>")
    conclusion = f'<p style="margin-top:14px">Conclusion of the paper: {escape(study.table.conclusion)}</p>'
    return _html_table(f"<th></th>{columns}", rows) + conclusion


def _curves(study: Study) -> str:
    charts = "".join(
        chart(
            summary.mean_lines(study, curve),
            title=curve.title,
            unit=curve.unit,
            from_zero=curve.from_zero,
            references=summary.reference_lines(study, curve),
        )
        for curve in (CURVES[name] for name in study.table.curves)
    )
    return f'<div class="grid charts">{charts}</div>' if charts else ""


def _cost(study: Study) -> str:
    rows = []
    for run, cells in summary.cost_rows(study):
        label, report = escape(run.label), run.run_dir / "report.html"
        if report.is_file():
            link = os.path.relpath(report.resolve(), study.folder.resolve())
            label = f'<a href="{escape(link)}">{label}</a>'
        rows.append(f"<tr><td>{label}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return _html_table("".join(f"<th>{escape(name)}</th>" for name in summary.COST_COLUMNS), rows) if rows else ""


def _html_table(columns: str, rows: list[str]) -> str:
    head = f"<thead><tr>{columns}</tr></thead>"
    return f'<div class="scroll"><table class="figures">{head}{"".join(rows)}</table></div>'
