"""From a file to uint8 RGB: `probe` looks at the header and the end, `decode` gives the pixels, `BadImage`
says why not.

A decoder gives grey blocks for what is missing of a file that is cut short, and allocates what a forged
header asks for. So the structure of every format is walked here first: the size is checked before a pixel is
decoded, and the end of the picture must be there. Then the common kinds (8-bit colour or grey, no
transparency) go through OpenCV, all others (palette, transparency, CMYK, 16 bits, TIFF, GIF) through the one
Pillow plugin that is meant for them.

Transparent pictures are laid on white, 16 bits are scaled to 8 (x / 257), floats from their own range; a GIF
or an animated WebP gives its first frame; EXIF's orientation is applied.
"""

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from dino.data.pictures import BadImage, Reduction

__all__ = ["MAX_PIXELS", "SUFFIXES", "BadImage", "decode", "probe"]

MAX_PIXELS = 2**27  # 134 megapixels, 403 MB once decoded: beyond it a header is taken for a bomb
SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
    ]  # what a folder is searched for
)

cv2.setNumThreads(0)  # a picture is one thread's work; the worker processes are the parallelism
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # reasons are reported, not printed

_SMALL = 2**26  # bytes of a file that is read before its header is looked at
_REDUCED = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4}  # beside the bit for colour
_REDUCED[8] = cv2.IMREAD_REDUCED_GRAYSCALE_8
_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)  # OpenCV >= 4.11


class _Bad(Exception):  # noqa: N818
    """The reason alone; the path is added outside."""


@dataclass(frozen=True)
class _Header:
    plugin: type
    width: int
    height: int
    plain: bool  # 8-bit grey or colour: OpenCV decodes it
    orientation: int = 1  # EXIF's 1 ... 8


def probe(path: str | os.PathLike, data: bytes | None = None) -> tuple[int, int]:
    """(width, height) as `decode` will give them, from the header and the file's structure; raises
    BadImage."""
    with _reasons(path), _open(path, data) as file:
        header = _header(file)
    return (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)


def decode(path: str | os.PathLike, data: bytes | None = None, *, reduce: Reduction = 1) -> np.ndarray:
    """uint8 RGB [height, width, 3]; raises BadImage. `data`: the file's bytes, where they were read already.

    reduce: a JPEG is given so many times smaller in each direction, rounded up: the blocks that it is made of are
    computed at that size, which is faster. Other formats are given whole.
    """
    with _reasons(path), _open(path, data, whole=True) as file:
        header = _header(file)
        file.seek(0)
        times = reduce if header.plain and header.plugin is JpegImagePlugin.JpegImageFile else 1
        if header.plain:
            data = file.read()
            if header.plugin is PngImagePlugin.PngImageFile:
                _check_sums(data)
            image = _opencv(data, times)
        else:
            image = _pillow(file, header.plugin)
        if image.shape[:2] != (-(-header.height // times), -(-header.width // times)):
            raise _Bad(f"decodes to {image.shape[1]}x{image.shape[0]}, not {header.width}x{header.height} / {times}")
        return _upright(image, header.orientation)


@contextlib.contextmanager
def _reasons(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except _Bad as bad:
        raise BadImage(path, str(bad)) from None
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error
    except MemoryError as error:
        raise BadImage(path, "not enough memory to decode it") from error


@contextlib.contextmanager
def _open(path: str | os.PathLike, data: bytes | None, *, whole: bool = False) -> Iterator[BinaryIO]:
    """whole: all of it will be needed, and is read at once; looking around in memory is then faster than in a file."""
    if data is not None:
        yield io.BytesIO(data)
        return
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise _Bad("not a regular file")
    with open(path, "rb") as file:
        yield io.BytesIO(file.read()) if whole and os.fstat(file.fileno()).st_size < _SMALL else file


def _header(file: BinaryIO) -> _Header:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        raise _Bad("empty file")
    start = file.read(16)
    for magic, parse in _FORMATS:
        if start.startswith(magic):
            try:
                header = parse(file, size)
            except (struct.error, IndexError):
                raise _Bad("cut short") from None
            if header.width <= 0 or header.height <= 0:
                raise _Bad(f"impossible size {header.width}x{header.height}")
            if header.width * header.height > MAX_PIXELS:
                raise _Bad(f"{header.width}x{header.height} pixels, over {MAX_PIXELS}: too large to decode safely")
            return header
    if not any(start):
        raise _Bad("starts with zeros: not an image, or its content was lost")
    raise _Bad("not an image of a known format (JPEG, PNG, WebP, BMP, GIF, TIFF)")


# The formats, one function each: seek through the structure, give the header, raise _Bad or struct.error.


def _read(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _jpeg(file: BinaryIO, size: int) -> _Header:
    width = height = orientation = 0
    plain = False
    file.seek(2)
    while True:
        (byte,) = _read(file, "B")
        if byte != 0xFF:
            raise _Bad("broken JPEG: no marker where one must be")
        marker = byte
        while marker == 0xFF:
            (marker,) = _read(file, "B")
        if marker == 0xD9:
            raise _Bad("broken JPEG: ends before the picture")
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue
        (length,) = _read(file, ">H")
        after = file.tell() + length - 2
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = _read(file, ">BHHB")
            plain = precision == 8 and components in (1, 3)
        elif marker == 0xE1 and orientation == 0:
            data = file.read(length - 2)
            orientation = _orientation(data[6:]) if data.startswith(b"Exif\0") else 0
        elif marker == 0xDA:
            break
        if after > size:
            raise _Bad("cut short")
        file.seek(after)
    # In a scan a byte FF is followed by 0 or a restart marker only: FF D9 after it is the end of the picture.
    scan = file.tell()
    file.seek(max(scan, size - 4096))
    if b"\xff\xd9" not in file.read():
        file.seek(scan)  # an app may have put megabytes behind the picture
        if b"\xff\xd9" not in file.read():
            raise _Bad("cut short")
    return _Header(JpegImagePlugin.JpegImageFile, width, height, plain, orientation or 1)


def _png(file: BinaryIO, size: int) -> _Header:
    file.seek(8)
    width = height = depth = color = 0
    kinds: set[bytes] = set()
    orientation = 1
    while b"IEND" not in kinds:
        length, kind = _read(file, ">I4s")
        after = file.tell() + length + 4
        if after > size:
            raise _Bad("cut short")
        if kind == b"IHDR":
            width, height, depth, color = _read(file, ">IIBB")
        elif kind == b"eXIf":
            orientation = _orientation(file.read(length))
        kinds.add(kind)
        file.seek(after)
    if not {b"IHDR", b"IDAT"} <= kinds:
        raise _Bad("broken PNG: no picture in it")
    plain = depth == 8 and color in (0, 2) and b"tRNS" not in kinds
    return _Header(PngImagePlugin.PngImageFile, width, height, plain, orientation)


def _check_sums(png: bytes) -> None:
    """OpenCV's libpng passes over wrong check sums, decodes what it can, and complains on stderr."""
    at, view = 8, memoryview(png)
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        body = view[at + 4 : at + 8 + length]
        if zlib.crc32(body) != struct.unpack_from(">I", png, at + 8 + length)[0]:
            raise _Bad(f"broken PNG: wrong check sum in {bytes(body[:4])!r}")
        if body[:4] == b"IEND":
            return
        at += 12 + length


def _webp(file: BinaryIO, size: int) -> _Header:
    file.seek(4)
    (length, form) = _read(file, "<I4s")
    if form != b"WEBP":
        raise _Bad("not an image of a known format (a RIFF file, but no WebP)")
    if 8 + length > size:
        raise _Bad("cut short")
    file.seek(max(12, 8 + length - 64))
    if not any(file.read(64)):  # WebP has no check sum: zeros decode, to grey
        raise _Bad("ends in zeros: its content was lost")
    file.seek(12)
    width = height = 0
    plain, orientation = True, 1
    while file.tell() + 8 <= 8 + length:
        kind, span = _read(file, "<4sI")
        after = file.tell() + span + span % 2
        if kind == b"VP8X":
            flags, canvas = _read(file, "<B3x6s")
            width, height = (1 + int.from_bytes(canvas[i : i + 3], "little") for i in (0, 3))
            plain = not flags & 0x12  # animation, alpha
        elif kind == b"VP8 " and not width:
            _, width, height = _read(file, "<6sHH")
            width, height = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L" and not width:
            _, bits = _read(file, "<BI")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
            plain = not bits >> 28 & 1
        elif kind == b"EXIF":
            orientation = _orientation(file.read(span).removeprefix(b"Exif\0\0"))
        file.seek(after)
    return _Header(WebPImagePlugin.WebPImageFile, width, height, plain, orientation)


def _bmp(file: BinaryIO, size: int) -> _Header:
    file.seek(10)
    pixels, core = _read(file, "<II")
    if core == 12:
        width, height, _, bits = _read(file, "<HHHH")
        compression = 0
    else:
        width, height, _, bits, compression, packed = _read(file, "<iiHHII")
        pixels += packed if compression else 0
    height = abs(height)  # negative: from top to bottom
    if pixels + (0 if compression else (width * bits + 31) // 32 * 4 * height) > size:
        raise _Bad("cut short")
    return _Header(BmpImagePlugin.BmpImageFile, width, height, bits == 24 and compression == 0)


def _gif(file: BinaryIO, size: int) -> _Header:
    file.seek(6)
    width, height, flags = _read(file, "<HHB2x")
    file.seek(3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0, os.SEEK_CUR)
    while True:  # to the end of the first frame
        (block,) = _read(file, "B")
        if block == 0x2C:
            (flags,) = _read(file, "<8xB")
            file.seek(1 + (3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0), os.SEEK_CUR)
        elif block == 0x21:
            file.seek(1, os.SEEK_CUR)
        else:
            raise _Bad("broken GIF: no picture in it")
        while length := _read(file, "B")[0]:
            file.seek(length, os.SEEK_CUR)
        if block == 0x2C:
            return _Header(GifImagePlugin.GifImageFile, width, height, False)


def _tiff(file: BinaryIO, size: int) -> _Header:
    file.seek(0)
    with _pillow_image(file, TiffImagePlugin.TiffImageFile) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        tags = image.tag_v2
        for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
            for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
                if offset + count > size:
                    raise _Bad("cut short")
        width, height = tags[256], tags[257]
        if 5 <= tags.get(274, 1) <= 8:
            width, height = height, width
    return _Header(TiffImagePlugin.TiffImageFile, width, height, False)  # Pillow turns TIFFs itself


_FORMATS = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"RIFF", _webp),
    (b"BM", _bmp),
    (b"GIF8", _gif),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
)


def _orientation(exif: bytes) -> int:
    """Tag 274 of a TIFF-like block; 1, upright, where it is absent or broken."""
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == 274 and kind == 3 and 1 <= value <= 8:
                return value
    except (KeyError, struct.error):
        pass
    return 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF's orientation: 5 to 8 exchange the axes; then 2, 3, 4 and their likes mirror."""
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
        raise _Bad(f"cannot be decoded: {error.err}") from None
    if image is None:
        raise _Bad("cannot be decoded: broken content")
    return image if _RGB is not None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


_one_at_a_time = threading.Lock()  # Python's warning filters belong to the process, not to the thread


@contextlib.contextmanager
def _pillow_image(file: BinaryIO, plugin: type) -> Iterator[Image.Image]:
    """The plugin itself, not Image.open: no other parser is tried, and the size was checked in the header."""
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield plugin(file)
        except (_Bad, MemoryError):
            raise
        except Exception as error:  # plugins raise whatever the broken bytes made them do
            raise _Bad(f"cannot be decoded: {error or type(error).__name__}") from None


def _pillow(file: BinaryIO, plugin: type) -> np.ndarray:
    with _pillow_image(file, plugin) as image:
        image.load()
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _scaled(np.asarray(image), image.mode)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.array(image.convert("RGB"))


def _scaled(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey of more than 8 bits: 16 bits keep their range, wider integers and floats are stretched to their
    own."""
    values = np.nan_to_num(values.astype(np.float32))
    low, high = 0.0, 65535.0
    if mode == "F" or (mode == "I" and (values.min() < 0 or values.max() > high)):
        low, high = float(values.min()), float(values.max())
    gray = np.rint((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)
