"""The same table as a page of Markdown and a picture of its curves, for docs/ablations/."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dino_ssl.ablations.page import (
    COST,
    base_words,
    bibliography,
    cost,
    environment,
    figures_note,
    lead,
    lines,
    paper_words,
    references,
    row_settings,
    spread_words,
    warnings,
)
from dino_ssl.ablations.results import Study
from dino_ssl.files import atomic_write

OPEN, CLOSE = "<!-- said by a person: kept when this page is written again -->", "<!-- end -->"
NOTHING = "What these runs show, and what they do not show at this scale: not written yet."


def write_study_text(study: Study, folder: Path) -> list[Path]:
    """Writes FOLDER/TABLE.md and, where there are curves, FOLDER/TABLE.png. What a person wrote between the two marks
    of an older page stays."""
    path, image = folder / f"{study.table.name}.md", folder / f"{study.table.name}.png"
    drawn = _draw(study, image)
    text = _text(study, _said(path), image.name if drawn else "")
    written = [atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))]
    return [*written, image] if drawn else written


def _text(study: Study, said: str, image: str) -> str:
    table = study.table
    heads = ["", *(text for f in table.figures for text in (f"{f.title}, {f.unit}", "the paper's"))]
    rows = [
        [
            row.what,
            *(t for f in table.figures for t in (spread_words(study.spread(row, f.name), f), paper_words(row, f))),
        ]
        for row in table.rows
    ]
    below = ", ".join(f"{name} {value:.1f} %" for name, value in references(study).items())
    parts = [
        f"# {table.title}",
        f"The paper: {table.protocol}",
        lead(study),
        _table(heads, rows),
        figures_note(study) + (f" Floors under the 20-NN: {below}." if below else ""),
        "\n".join(f"- {text}" for text in warnings(study)),
        f"What the paper concludes: {table.shows}" if table.shows else "",
        f"{OPEN}\n\n{said}\n\n{CLOSE}",
        f"## Curves\n\n![curves]({image})" if image else "",
        f"## What the rows change\n\n{base_words(study)}\n\n" + _table(["row", "changes"], row_settings(study)),
        "## Cost\n\n" + _table(COST, ([f"{cell.row.what}, seed {cell.seed}", *words] for cell, words in cost(study))),
        "## Environment\n\n" + _table(["", ""], environment(study)),
        f"Run again: `dino ablate {table.name} --scale {study.scale} --data ...`, then "
        f"`dino report {table.name} --markdown docs/ablations`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _said(path: Path) -> str:
    """What a person wrote into the page that is there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if OPEN not in text or CLOSE not in text:
        return NOTHING
    return text.split(OPEN, 1)[1].split(CLOSE, 1)[0].strip()


def _draw(study: Study, path: Path) -> bool:
    """The curves side by side, as a PNG; False where there is none."""
    curves = [(curve, found) for curve in study.table.curves if (found := lines(study, curve))]
    if not curves:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.6), dpi=110, layout="constrained")
    for axes, (curve, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for number, (name, (xs, ys)) in enumerate(found.items()):
            axes.plot(xs, ys, color=f"C{number % 10}", linewidth=1.4, label=name, marker="." if len(xs) < 25 else None)
        for name, value in bibliography(study, curve).items():
            axes.axhline(value, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        axes.set(title=f"{curve.title}{',' if curve.unit else ''}{curve.unit}", xlabel="epoch")
        axes.title.set_fontsize(10)
        if curve.from_zero:
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=7, frameon=False)
    atomic_write(path, lambda aside: figure.savefig(aside, format="png"))
    return True
