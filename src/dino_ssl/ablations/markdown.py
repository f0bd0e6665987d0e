"""Markdown page of a study with an image of its curves, for docs/ablations/."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dino_ssl.ablations import summary
from dino_ssl.ablations.results import Study
from dino_ssl.ablations.table import CURVES
from dino_ssl.files import atomic_write

OPEN, CLOSE = "<!-- discussion: written by hand, kept when this page is generated again -->", "<!-- end -->"
NO_DISCUSSION = "Discussion of these results: not written yet."


def write_study_markdown(study: Study, folder: Path) -> list[Path]:
    """Write FOLDER/TABLE.md and, if there are curves, FOLDER/TABLE.png; return their paths.

    The hand-written discussion of an existing page is kept.
    """
    path, image = folder / f"{study.table.name}.md", folder / f"{study.table.name}.png"
    has_image = _draw_curves(study, image)
    text = _page(study, _discussion(path), image.name if has_image else "")
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))
    return [path, image] if has_image else [path]


def _page(study: Study, discussion: str, image: str) -> str:
    table = study.table
    results = ([item.title, *summary.result_cells(study, item)] for item in table.configurations)
    cost = ([run.label, *cells] for run, cells in summary.cost_rows(study))
    parts = [
        f"# {table.title}",
        f"Paper: {table.protocol}",
        summary.introduction(study),
        _table(["", *summary.result_columns(study)], results),
        summary.results_note(study),
        "\n".join(f"- {message}" for message in summary.warnings(study)),
        f"Conclusion of the paper: {table.conclusion}",
        f"{OPEN}\n\n{discussion}\n\n{CLOSE}",
        f"## Curves\n\n![curves]({image})" if image else "",
        f"## Changed settings\n\n{summary.changes_note(study)}",
        _table(["configuration", "changes"], summary.changed_settings(study)),
        "## Cost",
        _table(summary.COST_COLUMNS, cost),
        "## Environment",
        _table(["", ""], summary.environment(study)),
        f"Run again: `dino ablate {table.name} --scale {study.scale} --data ...`, then "
        f"`dino report {table.name} --markdown docs/ablations`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _discussion(path: Path) -> str:
    """Return the hand-written part of an existing page."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if OPEN not in text or CLOSE not in text:
        return NO_DISCUSSION
    return text.split(OPEN, 1)[1].split(CLOSE, 1)[0].strip()


def _draw_curves(study: Study, path: Path) -> bool:
    """Draw the curves side by side as a PNG; return False if there are none."""
    drawn = (CURVES[name] for name in study.table.curves)
    curves = [(curve, lines) for curve in drawn if (lines := summary.mean_lines(study, curve))]
    if not curves:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.6), dpi=110, layout="constrained")
    for axes, (curve, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for number, (name, (xs, ys)) in enumerate(lines.items()):
            axes.plot(xs, ys, color=f"C{number % 10}", linewidth=1.4, label=name, marker="." if len(xs) < 25 else None)
        for name, value in summary.reference_lines(study, curve).items():
            axes.axhline(value, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        axes.set(title=f"{curve.title}{',' if curve.unit else ''}{curve.unit}", xlabel="epoch")
        axes.title.set_fontsize(10)
        if curve.from_zero:
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=7, frameon=False)
    atomic_write(path, lambda part: figure.savefig(part, format="png"))
    return True
