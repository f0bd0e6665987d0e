"""Decoding of image files to uint8 RGB.

Decoders fill missing parts of truncated files with gray and allocate whatever a forged header requests, so size and
completeness are checked first: in the header of a JPEG, which is read here, or with Pillow's plugin of the format. Then
simplejpeg decodes JPEGs, because it reports what libjpeg only warns of, OpenCV the common kinds of others (8-bit RGB or
grayscale without transparency, and colors of 16 bits) and Pillow the rest (palette, transparency, CMYK, TIFF, GIF).

Transparent images are composited on white, 16 bits are scaled to 8 by the bit depth of the dataset (bit_depth.py),
floats by the range of their values. The first frame of an animation is used. The EXIF orientation is applied.
"""

import contextlib
import ctypes
import importlib.util
import io
import logging
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import PIL
import simplejpeg
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dino_ssl.data.dataset import BadImage, Reduction
from dino_ssl.errors import memory_error

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .heic .heif .hif .bmp .dib .gif .tif .tiff".split()  # noqa: SIM905
)
"""File name suffixes of images."""
MAX_PIXELS = 2**27
"""134 megapixels, 403 MB when decoded and about 1 GB while a transparent image is; larger headers are rejected as
decompression bombs."""
PLUGINS: dict[bytes, Any] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,  # BigTIFF
    b"MM\0+": TiffImageFile,
}
"""Pillow's plugins by the first bytes of a file; `Image.open` would try other parsers, too."""
_AVIF = (b"ftypavif", b"ftypavis")
_HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header, which has precision, height, width and components."""
_PLAIN = {"PNG": ("L", "RGB"), "BMP": ("BGR",)}
"""Pillow's names of the pixel layouts that OpenCV decodes."""
_SMALL = 2**26  # larger files are not read into memory before their header is checked
_STRIP = 256  # rows that are converted at a time
_MAX_SCANS = 100
"""Scans of a progressive JPEG: encoders write about ten, and a small file with thousands takes minutes to decode."""

for library in Path(PIL.__file__).parents[1].glob("pillow.libs/libtiff*"):  # prints errors that Pillow raises anyway
    for handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        getattr(ctypes.CDLL(str(library)), handler)(None)
cv2.setNumThreads(0)  # one thread per image; worker processes are the parallelism
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are raised, not printed
logging.getLogger("PIL").addHandler(logging.NullHandler())  # its errors are raised as well
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata; a local filter would not be safe with threads


class Header(NamedTuple):
    """Properties of a complete image file, before its pixels are decoded."""

    size: tuple[int, int]
    """Width and height, before the orientation is applied."""
    plain: bool
    """8-bit grayscale or RGB without transparency, which OpenCV decodes."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8; from 5 on width and height are swapped."""
    image: ImageFile | None
    """The image of Pillow's plugin, not decoded yet; None for a JPEG."""


def probe(path: str | os.PathLike, data: bytes | None = None) -> tuple[int, int]:
    """Return (width, height) of the decoded image from the file's structure. Raises BadImage."""
    with _open(path, data) as (_, header):
        width, height = header.size
        return (height, width) if header.orientation >= 5 else (width, height)


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
    with _open(path, data, whole=True) as (file, header):
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
    with _open(path, data) as (file, header):
        image: Any = header.image
        if image is None or not (image.mode.startswith("I") or _has_deep_colors(image)):
            raise OSError("not an image with 16 bits per value")
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        stated = tags.get(281, (2 ** tags.get(258, (16,))[0] - 1,))[0]  # MaxSampleValue, else BitsPerSample
        values = _deep_colors(file, image)[:, :, :3] if _has_deep_colors(image) else np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise OSError("not an image with 16 bits per value")
        return values, stated if stated < 65535 else 0


@contextlib.contextmanager
def _open(path: str | os.PathLike, data: bytes | None, *, whole: bool = False) -> Iterator[tuple[BinaryIO, Header]]:
    """Open a file and read its header; all errors become BadImage.

    With `whole`, the file is read into memory completely, which is faster if all of it is needed.
    """
    try:
        if data is None and not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise OSError("not a regular file")
        with io.BytesIO(data) if data is not None else open(path, "rb") as file:
            if data is None and whole and os.fstat(file.fileno()).st_size < _SMALL:
                file = io.BytesIO(file.read())
            yield file, _header(file)
    except Exception as error:  # Pillow's plugins raise errors of any kind for broken files
        if memory_error(error) is not None or getattr(error, "code", None) == cv2.Error.StsNoMem:
            raise MemoryError(str(error)) from error
        reason = getattr(error, "strerror", None) or getattr(error, "err", None) or str(error)
        raise BadImage(path, reason or type(error).__name__) from error


def _header(file: BinaryIO) -> Header:
    """Return the header; raise OSError if the file is no image, incomplete, or too large to decode."""
    start = file.read(16)
    if not start:
        raise OSError("empty file")
    plugin = _plugin(start)
    try:
        if plugin is JpegImageFile:
            header = _jpeg_header(file)
        else:
            file.seek(0)
            image = plugin(file)
            header = Header(image.size, _is_plain(image), _orientation(image.info.get("exif")), image)
    except (SyntaxError, OSError, IndexError, struct.error) as error:  # IndexError: a PNG without pixels
        raise OSError(f"truncated, or its header is broken: {error}") from error
    width, height = header.size
    if not 0 < width * height <= MAX_PIXELS:
        raise OSError(f"{width}x{height} pixels: impossible, or over {MAX_PIXELS} and too large to decode safely")
    if not _is_complete(file, header.image):
        raise OSError("truncated")
    return header


def _plugin(start: bytes) -> Any:
    """Return Pillow's plugin for a file with this beginning; raise OSError if there is none."""
    for magic, plugin in PLUGINS.items():
        if start.startswith(magic):
            return plugin
    if start.startswith(_AVIF, 4):
        return AvifImageFile
    if start.startswith(_HEIC, 4):
        if importlib.util.find_spec("pillow_heif") is None:
            raise OSError("HEIC needs the package pillow-heif")
        return importlib.import_module("pillow_heif").HeifImageFile
    raise OSError("not an image of a known format (JPEG, PNG, WebP, AVIF, HEIC, BMP, GIF, TIFF)")


def _jpeg_header(file: BinaryIO) -> Header:
    """Read a JPEG from marker to marker, up to its first scan: half the time of Pillow's plugin."""
    width = height = 0
    plain, exif = False, None
    file.seek(2)
    while True:
        prefix, marker, length = struct.unpack(">BBH", file.read(4))
        if prefix != 0xFF or marker == 0xD9:
            raise OSError("a marker is missing")
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # fill byte, or a marker without content
            file.seek(-3 if marker == 0xFF else -2, os.SEEK_CUR)
            continue
        if marker == 0xDA:
            break
        content = file.read(length - 2) if marker in _FRAMES or marker == 0xE1 else b""
        if marker in _FRAMES:
            precision, height, width, components = struct.unpack(">BHHB", content[:6])
            plain = precision == 8 and components in (1, 3)
        elif content.startswith(b"Exif\0") and exif is None:
            exif = content
        file.seek(length - 2 - len(content), os.SEEK_CUR)
    return Header((width, height), plain, _orientation(exif), None)


def _is_complete(file: BinaryIO, image: ImageFile | None) -> bool:
    """Return False if a file ends before its image does. Only GIF is decoded for that. image: None for a JPEG."""
    start, size = file.tell(), file.seek(0, os.SEEK_END)
    if image is None or isinstance(image, PngImageFile):
        end = _JPEG_END if image is None else _PNG_END
        file.seek(max(start, size - 4096))
        if end in file.read():
            return True
        file.seek(start)  # some applications append megabytes after the image
        return end in file.read()
    if isinstance(image, WebPImageFile):  # it has no checksum, and zeros are decoded to gray
        file.seek(4)
        file.seek(max(12, int.from_bytes(file.read(4), "little") - 56))
        return any(file.read(64))
    if isinstance(image, TiffImageFile):
        tags: Any = image.tag_v2
        offsets, lengths = ((*tags.get(strips, ()), *tags.get(tiles, ())) for strips, tiles in ((273, 324), (279, 325)))
        return all(offset + length <= size for offset, length in zip(offsets, lengths, strict=False))
    if isinstance(image, BmpImageFile) and (tile := image.tile[0]).codec_name == "raw":
        layout: Any = tile.args  # name, bytes per row, direction
        return tile.offset + layout[1] * image.height <= size
    image.load()
    return True


def _is_plain(image: ImageFile) -> bool:
    """Return True for 8-bit grayscale or RGB without transparency, which OpenCV decodes."""
    if isinstance(image, WebPImageFile):
        return image.mode == "RGB" and image.n_frames == 1
    layouts = _PLAIN.get(image.format or "")
    if layouts is None or "transparency" in image.info:
        return False
    args: Any = image.tile[0].args
    return (args if isinstance(args, str) else args[0]) in layouts


def _orientation(content: bytes | None) -> int:
    """Return the orientation of an EXIF block; 1 (upright) if it is missing or invalid."""
    if content is None:
        return 1
    exif = Image.Exif()
    with contextlib.suppress(SyntaxError):
        exif.load(content)
    orientation = exif.get(274, 1)
    return orientation if orientation in range(1, 9) else 1


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
