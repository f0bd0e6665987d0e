"""Segmentation masks as indexed PNG files, with the palette of PASCAL VOC and DAVIS."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dino_ssl.data.dataset import BadImage
from dino_ssl.files import atomic_write

BACKGROUND, VOID = 0, 255
"""Label of pixels without an object, and of pixels that are not scored."""


def _palette() -> list[int]:
    """Return the palette: bit i of R, G, B comes from bits 3 i, 3 i + 1, 3 i + 2 of the label, highest first."""
    colors = []
    for label in range(256):
        bits = [[(label >> (3 * i + channel)) & 1 for i in range(3)] for channel in range(3)]
        colors += [sum(bit << (7 - i) for i, bit in enumerate(channel)) for channel in bits]
    return colors


PALETTE = np.array(_palette(), dtype=np.uint8).reshape(256, 3)
"""[256, 3]: RGB color of each label."""


def read_mask(path: Path) -> np.ndarray:
    """Return the labels of an indexed or grayscale PNG, uint8 [H, W]; the palette is ignored.

    Raises:
        BadImage: The file is missing, is not a PNG, or is an RGB image.
    """
    with _open_png(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise BadImage(path, f"expected a mask as an indexed PNG, got a color image ({image.mode})")
        return np.array(image, dtype=np.uint8)


def read_gray(path: Path) -> np.ndarray:
    """Return the gray levels of any PNG, uint8 [H, W]. Raises BadImage if it is missing or cannot be read."""
    with _open_png(path) as image:
        return np.array(image.convert("L"), dtype=np.uint8)


@contextmanager
def _open_png(path: Path) -> Iterator[Image.Image]:
    """Open a PNG. Errors inside, of which decoding is one, become a BadImage."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            yield image
    except FileNotFoundError:
        raise BadImage(path, "the mask is missing") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(path, f"expected a mask as an indexed PNG, which cannot be read ({error})") from error


def write_mask(path: Path, mask: np.ndarray) -> Path:
    """Write labels, uint8 [H, W], atomically as an indexed PNG."""
    image, file = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8)), io.BytesIO()
    image.putpalette(PALETTE.tobytes())
    image.save(file, format="PNG")
    return atomic_write(path, lambda temporary: temporary.write_bytes(file.getvalue()))
