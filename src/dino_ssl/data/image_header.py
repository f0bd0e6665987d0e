"""The header of an image file: its format, size, orientation, and whether it is complete.

Decoders fill missing parts of truncated files with gray and allocate whatever a forged header requests, so size and
completeness are checked before pixels are decoded: in the header of a JPEG, which is read here, or with Pillow's plugin
of the format.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import PIL
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dino_ssl.data.dataset import BadImage
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
NEEDS_HEIF = "HEIC needs the package pillow-heif"
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header, which has precision, height, width and components."""
_PLAIN = {"PNG": ("L", "RGB"), "BMP": ("BGR",)}
"""Pillow's names of the pixel layouts that OpenCV decodes."""
_SMALL = 2**26  # larger files are not read into memory before their header is checked

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
    with open_image(path, data) as (_, header):
        width, height = header.size
        return (height, width) if header.orientation >= 5 else (width, height)


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike, data: bytes | None, *, whole: bool = False
) -> Iterator[tuple[BinaryIO, Header]]:
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
            raise OSError(NEEDS_HEIF)
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
