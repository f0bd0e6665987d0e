"""Decoding of image files to uint8 RGB, after their header was checked (image_header.py).

simplejpeg decodes JPEGs, because it reports what libjpeg only warns of, OpenCV the common kinds of others (8-bit RGB or
grayscale without transparency, and colors of 16 bits) and Pillow the rest (palette, transparency, CMYK, TIFF, GIF).

Transparent images are composited on white, 16 bits are scaled to 8 by the bit depth of the dataset (bit_depth.py),
floats by the range of their values. The first frame of an animation is used. The EXIF orientation is applied.
"""

import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from dino_ssl.data.dataset import Reduction
from dino_ssl.data.image_header import open_image

_STRIP = 256  # rows that are converted at a time
_MAX_SCANS = 100
"""Scans of a progressive JPEG: encoders write about ten, and a small file with thousands takes minutes to decode."""


def decode(
    path: str | os.PathLike,
    data: bytes | None = None,
    *,
    reduce: Reduction = 1,
    bit_depth: int | None = None,
    on_damage: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Return the image as uint8 RGB [height, width, 3]. Raises BadImage.

    Args:
        path: File, also named in errors.
        data: Content of the file, if it has been read already.
        reduce: Factor by which a JPEG is downscaled (sizes are rounded up): its blocks are computed at that size, which
            is faster. Other formats are not downscaled.
        bit_depth: Of images with 16 bits per value: 2^bit_depth - 1 becomes white. Default: 16.
        on_damage: Called with the warning of libjpeg about a damaged JPEG, which is then returned. Default: BadImage.
    """
    with open_image(path, data, whole=True) as (file, header):
        (width, height), image = header.size, header.image
        times = reduce if header.plain and image is None else 1
        shape = (-(-height // times), -(-width // times))
        file.seek(0)
        if image is None:
            pixels = _jpeg(file.read(), shape, header.plain, on_damage)
        elif header.plain:
            pixels = _opencv(file, image, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        else:
            pixels = _pillow(file, image, bit_depth or 16)
        if pixels.shape[:2] != shape:
            raise OSError(f"decodes to {pixels.shape[1]}x{pixels.shape[0]}, not {width}x{height} / {times}")
        return _upright(pixels, header.orientation)


def values_of_16_bits(path: str | os.PathLike, data: bytes | None = None) -> tuple[np.ndarray, int]:
    """Return (values, the largest value that a TIFF states or 0) of an image with 16 bits per value, without alpha.

    Raises BadImage for all others.
    """
    with open_image(path, data) as (file, header):
        image: Any = header.image
        if image is None or not (image.mode.startswith("I") or _has_deep_colors(image)):
            raise OSError("not an image with 16 bits per value")
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        stated = tags.get(281, (2 ** tags.get(258, (16,))[0] - 1,))[0]  # MaxSampleValue, else BitsPerSample
        values = _deep_colors(file, image)[:, :, :3] if _has_deep_colors(image) else np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise OSError("not an image with 16 bits per value")
        return values, stated if stated < 65535 else 0


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation: 5 to 8 swap the axes, others mirror."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _jpeg(
    data: bytes, shape: tuple[int, int], plain: bool, on_damage: Callable[[str], None] | None = None
) -> np.ndarray:
    """Decode a JPEG to this height and width; raise ValueError, or call `on_damage`, if libjpeg warns."""
    if (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        raise OSError(f"{scans} scans: more than {_MAX_SCANS} take too long to decode")
    height, width = shape
    decode = partial(simplejpeg.decode_jpeg, data, "RGB" if plain else "CMYK", min_height=height, min_width=width)
    try:
        pixels = decode(strict=True)
    except ValueError as error:
        if on_damage is None:
            raise
        pixels = decode(strict=False)
        on_damage(str(error))
    return pixels if plain else _pillow(io.BytesIO(data), JpegImageFile(io.BytesIO(data)), 16)


def _opencv(file: BinaryIO, image: ImageFile, flags: int) -> np.ndarray:
    if isinstance(image, PngImageFile):
        image.verify()  # checksums, which OpenCV's libpng ignores
    file.seek(0)
    pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), flags)
    if pixels is None:
        raise OSError("cannot be decoded: broken content")
    return pixels


def _has_deep_colors(image: ImageFile) -> bool:
    """Return True for colors, or gray with alpha, of 16 bits per value, of which Pillow would keep the upper 8 bits."""
    args: Any = image.tile[0].args if image.tile else ""
    return image.mode in ("RGB", "RGBA") and ";16" in (args if isinstance(args, str) else args[0])


def _deep_colors(file: BinaryIO, image: ImageFile) -> np.ndarray:
    """Return colors of 16 bits per value: uint16 [H, W, 3 or 4], RGB or RGBA."""
    has_alpha = _has_alpha(image)
    values = _opencv(file, image, cv2.IMREAD_UNCHANGED)
    if values.dtype != np.uint16 or values.ndim != 3:
        raise OSError("cannot be decoded: not 16 bits per value")
    return values[:, :, [2, 1, 0, 3][: 3 + has_alpha]]


def _pillow(file: BinaryIO, image: Any, bit_depth: int) -> np.ndarray:
    """Decode and convert to RGB, in strips: a copy of all pixels in each step would take 20 bytes per pixel."""
    if _has_deep_colors(image):
        values = _deep_colors(file, image)
        scaled = np.rint(np.arange(2.0**16) * (255 / (2**bit_depth - 1))).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(np.dstack([scaled[values[:, :, :3]], (values[:, :, 3:] >> 8).astype(np.uint8)]))
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        convert = _to_8_bits(image, bit_depth)
    else:
        convert = _on_white if _has_alpha(image) else lambda strip: strip.convert("RGB")
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        pixels[top : top + _STRIP] = np.asarray(convert(strip))
    return pixels


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    """Return True for transparency; a fourth band of a TIFF is alpha only if the tag ExtraSamples says so."""
    if isinstance(image, TiffImageFile) and image.mode == "RGBA" and image.tag_v2.get(338) not in ((1,), (2,)):
        return False
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _no_data(image: Image.Image) -> float | None:
    """Return the value of pixels without data, the tag GDAL_NODATA of a TIFF; None if there is none."""
    try:
        return float(image.tag_v2[42113]) if isinstance(image, TiffImageFile) else None
    except (KeyError, ValueError):
        return None


def _to_8_bits(image: Image.Image, bit_depth: int) -> Callable[[Image.Image], np.ndarray]:
    """Return the conversion of a gray image of more than 8 bits, float or integer, to RGB; missing pixels are black.

    Integers of more than 16 bits and floats are scaled by the range of the values, without outliers: if the range is
    ten times that of 99 % of the values, by the latter.
    """
    no_data, low, high = _no_data(image), 0.0, 2.0**bit_depth - 1
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        known = values[np.isfinite(values) & (values != no_data)]
        if known.size and (image.mode == "F" or known.min() < 0 or known.max() > 65535):
            low, *inner, high = (float(v) for v in np.quantile(known, (0, 0.005, 0.995, 1), method="nearest"))
            if high - low > 10 * (inner[1] - inner[0]) > 0:
                low, high = inner

    def convert(strip: Image.Image) -> np.ndarray:
        values = np.asarray(strip).astype(np.float32)
        with np.errstate(over="ignore"):
            gray = np.rint((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255)
        gray[np.isnan(values) | (values == no_data)] = 0
        return gray.astype(np.uint8)[:, :, None]

    return convert
