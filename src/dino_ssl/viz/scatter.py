"""Scatter plot of classes in the plane."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dino_ssl.files import atomic_write
from dino_ssl.viz.rendering import shorten


def scatter(path: Path, points: np.ndarray, names: Sequence[str], title: str) -> Path:
    """Draw points [N, 2] as dots with their names (Fig. 11), in the format of the path's suffix."""
    side = float(np.clip(0.7 * len(names) ** 0.5, 9, 26))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    numbers = np.arange(len(names))
    hues = colormaps["tab20"](numbers) if len(names) <= 20 else colormaps["hsv"](numbers / len(names))
    size = float(np.clip(4000 / len(points), 8, 60))
    axes.scatter(*points.T, s=size, color=hues, linewidths=0)
    for name, (x, y) in zip(names, points.tolist(), strict=True):
        axes.annotate(shorten(name, 24), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    kind = path.suffix.lower().removeprefix(".")
    return atomic_write(path, lambda part: figure.savefig(part, format=kind, dpi=150, bbox_inches="tight"))
