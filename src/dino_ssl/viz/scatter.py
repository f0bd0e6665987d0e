"""Points in the plane as a picture: coloured and named by class, or with the pictures themselves in their places."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write

ENDINGS = (".png", ".pdf", ".svg")
LEGEND = 20
"""More classes than this are named in the plane, at the middle of their points."""
GREY = (0.45, 0.47, 0.5)


def check_ending(path: Path) -> None:
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--out must end in one of {', '.join(ENDINGS)}; got {str(path)!r}.")


def scatter(path: Path, points: np.ndarray, labels: Sequence[str | None], title: str) -> Path:
    """Points [N, 2] as dots, a colour per label; None is grey."""
    names = sorted({label for label in labels if label is not None})
    figure, axes = _empty(title, side=9)
    size = float(np.clip(4000 / max(len(points), 1), 4, 60))
    rows = np.array([-1 if label is None else names.index(label) for label in labels])
    for number, name in enumerate([None, *names], -1):
        mine = points[rows == number]
        if len(mine):
            axes.scatter(*mine.T, s=size, color=_colour(number, len(names)), label=name, linewidths=0)
            if len(names) > LEGEND and name is not None:
                x, y = np.median(mine, axis=0).tolist()
                axes.annotate(_short(name), (x, y), fontsize=6, ha="center", va="center")
    if 1 < len(names) <= LEGEND:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2 * (30 / size) ** 0.5)
    return _save(figure, path)


def named(path: Path, points: np.ndarray, names: Sequence[str], title: str) -> Path:
    """Points [N, 2], a name at each: the classes of Fig. 11. More names make a larger picture."""
    figure, axes = _empty(title, side=float(np.clip(0.7 * len(names) ** 0.5, 8, 26)))
    axes.scatter(*points.T, s=8, color=GREY, linewidths=0)
    for name, (x, y) in zip(names, points.tolist(), strict=True):
        axes.annotate(_short(name), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    return _save(figure, path)


def thumbnails(
    path: Path, points: np.ndarray, read: Callable[[int], np.ndarray], title: str, *, side: int = 56, across: int = 32
) -> Path:
    """Points [N, 2] as small pictures [H, W, 3] uint8 in the cells of a grid; of those that share a cell, the first."""
    low, high = points.min(axis=0), points.max(axis=0)
    cells = np.floor((points - low) / np.maximum(high - low, 1e-9).max() * (across - 1e-6)).astype(int)
    columns, rows = cells.max(axis=0) + 1
    page, taken = np.full((side * rows, side * columns, 3), 255, np.uint8), set()
    for index, (column, row) in enumerate(cells.tolist()):
        if (row, column) not in taken:
            taken.add((row, column))
            y, x = (rows - 1 - row) * side, column * side  # the axis points up
            page[y + 1 : y + side - 1, x + 1 : x + side - 1] = _square(read(index), side - 2)
    figure, axes = _empty(title, side=11)
    axes.imshow(page, interpolation="none")
    return _save(figure, path)


def _empty(title: str, side: float):
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    kind = path.suffix.lower().removeprefix(".")
    return atomic_write(path, lambda aside: figure.savefig(aside, format=kind, dpi=150, bbox_inches="tight"))


def _colour(number: int, count: int) -> tuple[float, ...]:
    if number < 0:
        return GREY
    return colormaps["tab10" if count <= 10 else "tab20"](number) if count <= 20 else colormaps["hsv"](number / count)


def _square(image: np.ndarray, side: int) -> np.ndarray:
    """The middle of a picture, as large as it goes."""
    short = min(image.shape[:2])
    top, left = (image.shape[0] - short) // 2, (image.shape[1] - short) // 2
    middle = np.ascontiguousarray(image[top : top + short, left : left + short])
    return cv2.resize(middle, (side, side), interpolation=cv2.INTER_AREA if short > side else cv2.INTER_CUBIC)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
