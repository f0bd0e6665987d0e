"""Scatter plots of points in the plane: by class, with class names, or with thumbnails."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dino_ssl.viz.rendering import center_square, shorten
from dino_ssl.viz.saving import save_figure

MAX_LEGEND = 20
"""With more classes, names are drawn at the median of their points instead of in a legend."""
GREY = (0.45, 0.47, 0.5)
SAVE_OPTIONS = dict(dpi=150, bbox_inches="tight")


def scatter(path: Path, points: np.ndarray, labels: Sequence[str | None], title: str) -> Path:
    """Draw points [N, 2] as dots, one color per label. None is gray."""
    names = sorted({label for label in labels if label is not None})
    figure, axes = _empty_figure(title, side=9)
    size = float(np.clip(4000 / max(len(points), 1), 4, 60))
    rows = np.array([-1 if label is None else names.index(label) for label in labels])
    for number, name in enumerate([None, *names], -1):
        members = points[rows == number]
        if len(members):
            axes.scatter(*members.T, s=size, color=_color(number, len(names)), label=name, linewidths=0)
            if len(names) > MAX_LEGEND and name is not None:
                x, y = np.median(members, axis=0).tolist()
                axes.annotate(shorten(name, 24), (x, y), fontsize=6, ha="center", va="center")
    if 1 < len(names) <= MAX_LEGEND:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2 * (30 / size) ** 0.5)
    return save_figure(path, figure, **SAVE_OPTIONS)


def named_scatter(path: Path, points: np.ndarray, names: Sequence[str], title: str) -> Path:
    """Draw points [N, 2] with a name at each (Fig. 11). The figure grows with the number of names."""
    figure, axes = _empty_figure(title, side=float(np.clip(0.7 * len(names) ** 0.5, 8, 26)))
    axes.scatter(*points.T, s=8, color=GREY, linewidths=0)
    for name, (x, y) in zip(names, points.tolist(), strict=True):
        axes.annotate(shorten(name, 24), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    return save_figure(path, figure, **SAVE_OPTIONS)


def thumbnail_scatter(
    path: Path, points: np.ndarray, read: Callable[[int], np.ndarray], title: str, *, side: int = 56, cells: int = 32
) -> Path:
    """Draw thumbnails at points [N, 2], on a grid of cells; the first image of each cell is drawn.

    read: returns uint8 [H, W, 3] of a point's index.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    grid = np.floor((points - low) / np.maximum(high - low, 1e-9).max() * (cells - 1e-6)).astype(int)
    columns, rows = grid.max(axis=0) + 1
    page, taken = np.full((side * rows, side * columns, 3), 255, np.uint8), set()
    for index, (column, row) in enumerate(grid.tolist()):
        if (row, column) not in taken:
            taken.add((row, column))
            y, x = (rows - 1 - row) * side, column * side  # the y axis of the plot points up
            page[y + 1 : y + side - 1, x + 1 : x + side - 1] = center_square(read(index), side - 2)
    figure, axes = _empty_figure(title, side=11)
    axes.imshow(page, interpolation="none")
    return save_figure(path, figure, **SAVE_OPTIONS)


def _empty_figure(title: str, side: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure, axes


def _color(number: int, count: int) -> tuple[float, ...]:
    if number < 0:
        return GREY
    return colormaps["tab10" if count <= 10 else "tab20"](number) if count <= 20 else colormaps["hsv"](number / count)
