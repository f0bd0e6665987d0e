"""Atomic writes of images."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_ssl.files import atomic_write


def save_image(path: Path, image: np.ndarray, **options: Any) -> Path:
    """Write [H, W, 3] or [H, W] uint8 in the format of the suffix. options: of PIL's `Image.save`."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    return atomic_write(path, lambda part: Image.fromarray(image).save(part, format=kind, **options))
