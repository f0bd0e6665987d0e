"""Scatter plot of points in the plane, colored and named by class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dino_ssl.files import atomic_write
from dino_ssl.viz.rendering import shorten

MAX_LEGEND = 20
"""With more classes, names are drawn at the median of their points instead of in a legend."""
GRAY = (0.45, 0.47, 0.5)


def scatter(path: Path, points: np.ndarray, labels: Sequence[str | None], title: str) -> Path:
    """Draw points [N, 2] as dots in the color of their label, gray for None, in the format of the path's suffix.

    Names are in a legend, or drawn at the points if there are many, or one point for each (Fig. 11).
    """
    names = sorted({label for label in labels if label is not None})
    named = len(names) > MAX_LEGEND or len(names) == len(points)
    side = float(np.clip(0.7 * len(names) ** 0.5, 9, 26))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    table = colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "hsv"]
    size = float(np.clip(4000 / len(points), 8, 60))
    for number, name in enumerate([None, *names], -1):
        members = points[[label == name for label in labels]]
        color = GRAY if name is None else table(number if len(names) <= 20 else number / len(names))
        axes.scatter(*members.T, s=size, color=color, label=name, linewidths=0)
        if named and name is not None:
            x, y = np.median(members, axis=0).tolist()
            axes.annotate(shorten(name, 24), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if len(names) > 1 and not named:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2 * (30 / size) ** 0.5)
    kind = path.suffix.lower().removeprefix(".")
    return atomic_write(path, lambda part: figure.savefig(part, format=kind, dpi=150, bbox_inches="tight"))
