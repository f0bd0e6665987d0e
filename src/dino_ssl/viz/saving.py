"""Atomic writes of images and matplotlib figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


def save_image(path: Path, image: np.ndarray, **options: Any) -> Path:
    """Write [H, W, 3] or [H, W] uint8 in the format of the suffix. options: of PIL's `Image.save`."""
    kind = IMAGE_FORMATS[path.suffix.lower()]
    return atomic_write(path, lambda part: Image.fromarray(image).save(part, format=kind, **options))


def save_figure(path: Path, figure: "Figure", **options: Any) -> Path:
    """Write a matplotlib figure in the format of the suffix. options: of `Figure.savefig`."""
    kind = path.suffix.lower().removeprefix(".")
    return atomic_write(path, lambda part: figure.savefig(part, format=kind, **options))


def check_figure_path(path: Path) -> None:
    """Raise UserError if matplotlib figures cannot be written with this suffix."""
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise UserError(f"`out` must end in one of {', '.join(FIGURE_SUFFIXES)}; got {str(path)!r}.")
