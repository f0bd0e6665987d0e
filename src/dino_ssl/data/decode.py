"""Decoding of image files to uint8 RGB.

Decoders fill missing parts of truncated files with gray and allocate whatever a forged header requests. Therefore
formats.py checks the structure first: the size, and that the end of the image exists. Then OpenCV decodes the common
kinds (8-bit RGB or grayscale without transparency) and Pillow's plugin of the format all others (palette, transparency,
CMYK, 16 bits, TIFF, GIF).

Transparent images are composited on white, 16 bits are scaled to 8 (x / 257), floats by their own range. The first
frame of an animation is used. The EXIF orientation is applied.
"""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from dino_ssl.data.dataset import BadImage, Reduction
from dino_ssl.data.formats import Bad, check_png, header_of, open_with

__all__ = ["BadImage", "decode", "probe"]

cv2.setNumThreads(0)  # one thread per image; worker processes are the parallelism
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are raised, not printed

_SMALL = 2**26  # larger files are not read into memory before their header is checked
_REDUCED = {
    1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8
}  # fmt: skip
_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)  # OpenCV >= 4.11


def probe(path: str | os.PathLike, data: bytes | None = None) -> tuple[int, int]:
    """Return (width, height) of the decoded image from the file's structure. Raises BadImage."""
    with _add_path(path), _open(path, data) as file:
        header = header_of(file)
    return (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)


def decode(path: str | os.PathLike, data: bytes | None = None, *, reduce: Reduction = 1) -> np.ndarray:
    """Return the image as uint8 RGB [height, width, 3]. Raises BadImage.

    Args:
        path: File, also named in errors.
        data: Content of the file, if it has been read already.
        reduce: Factor by which a JPEG is downscaled (sizes are rounded up): its blocks are computed at that size, which
            is faster. Other formats are not downscaled.
    """
    with _add_path(path), _open(path, data, whole=True) as file:
        header = header_of(file)
        file.seek(0)
        times = reduce if header.plain and header.plugin is JpegImagePlugin.JpegImageFile else 1
        if header.plain:
            data = file.read()
            if header.plugin is PngImagePlugin.PngImageFile:
                check_png(data)
            image = _opencv(data, times)
        else:
            image = _pillow(file, header.plugin)
        if image.shape[:2] != (-(-header.height // times), -(-header.width // times)):
            raise Bad(f"decodes to {image.shape[1]}x{image.shape[0]}, not {header.width}x{header.height} / {times}")
        return _upright(image, header.orientation)


@contextlib.contextmanager
def _add_path(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except Bad as bad:
        raise BadImage(path, str(bad)) from None
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error
    except MemoryError as error:
        raise BadImage(path, "not enough memory to decode it") from error


@contextlib.contextmanager
def _open(path: str | os.PathLike, data: bytes | None, *, whole: bool = False) -> Iterator[BinaryIO]:
    """Open the file; `whole`: read it into memory completely, which is faster if all of it is needed."""
    if data is not None:
        yield io.BytesIO(data)
        return
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
        raise Bad("not a regular file")
    with open(path, "rb") as file:
        yield io.BytesIO(file.read()) if whole and os.fstat(file.fileno()).st_size < _SMALL else file


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation: 5 to 8 swap the axes, others mirror."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _opencv(data: bytes, times: int = 1) -> np.ndarray:
    flags = (cv2.IMREAD_COLOR if _RGB is None else _RGB) | _REDUCED[times] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise Bad(f"cannot be decoded: {error.err}") from None
    if image is None:
        raise Bad("cannot be decoded: broken content")
    return image if _RGB is not None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _pillow(file: BinaryIO, plugin: type) -> np.ndarray:
    with open_with(file, plugin) as image:
        image.load()
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _scaled(np.asarray(image), image.mode)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.array(image.convert("RGB"))


def _scaled(values: np.ndarray, mode: str) -> np.ndarray:
    """Convert gray values of more than 8 bits; wider integers and floats are scaled by their own range."""
    values = np.nan_to_num(values.astype(np.float32))
    low, high = 0.0, 65535.0
    if mode == "F" or (mode == "I" and (values.min() < 0 or values.max() > high)):
        low, high = float(values.min()), float(values.max())
    gray = np.rint((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)
