"""Fig. 7: the two terms of H(P_t, P_s) = h(P_t) + KL(P_t | P_s) while several runs train, as charts or as a picture."""

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from dino.analysis.curves import History, Line, chart
from dino.files import write_whole

TERMS = {"teacher_entropy": "Entropy of the target", "kl": "KL, target to student"}
"""By the name under which they are logged, in the paper's order."""
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#9c6bd0", "#6cc5b0", "#97bbf5", "#a57955")


def terms(runs: Mapping[str, History]) -> dict[str, dict[str, Line]]:
    """{term: {run: its curve over epochs}}; runs that logged nothing are left out."""
    return {term: {name: found for name, run in runs.items() if (found := run.line(term))[0]} for term in TERMS}


def fig7_charts(runs: Mapping[str, History], prototypes: int | None = None) -> str:
    """Both terms as charts for a page, ln K a dashed line."""
    top = {"ln K": math.log(prototypes)} if prototypes else {}
    return "".join(
        chart(lines, title=TERMS[term], references=top if term == "teacher_entropy" else {}, from_zero=True)
        for term, lines in terms(runs).items()
    )


def draw_fig7(path: Path, runs: Mapping[str, History], prototypes: int | None = None, *, over: str = "epochs") -> Path:
    """Both terms side by side as a picture; the ending of `path` says which kind (.png, .svg, .pdf)."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    for axis, (term, lines) in zip(figure.subplots(1, 2), terms(runs).items(), strict=True):
        for number, (name, (xs, ys)) in enumerate(lines.items()):
            axis.plot(xs, ys, color=COLOURS[number % len(COLOURS)], lw=1.4, label=name)
        if prototypes and term == "teacher_entropy":
            axis.axhline(math.log(prototypes), ls="--", lw=1, color="0.5", label=f"ln {prototypes}")
        axis.set(title=TERMS[term], xlabel=over, ylim=(0, None))
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    kind = path.suffix.removeprefix(".")
    return write_whole(path, lambda aside: figure.savefig(aside, format=kind, dpi=110))
