"""Headers of image files: size and completeness without decoding pixels.

One function per format walks from block to block and reads no more than it needs.
"""

import contextlib
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
)
"""File name suffixes of images."""
MAX_PIXELS = 2**27  # 134 megapixels, 403 MB when decoded; larger headers are rejected as decompression bombs


class Bad(Exception):  # noqa: N818
    """Reason why a file is unusable; `decode` adds the path."""


@dataclass(frozen=True)
class Header:
    """Properties of an image file before decoding."""

    plugin: type
    """Pillow's plugin of the format."""
    width: int
    height: int
    plain: bool
    """8-bit grayscale or RGB without transparency, which OpenCV decodes."""
    orientation: int = 1
    """EXIF orientation, 1 (upright) to 8; from 5 on width and height are swapped."""


def header_of(file: BinaryIO) -> Header:
    """Return the header. Raises Bad if the file is not an image, is truncated, or is too large to decode."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        raise Bad("empty file")
    start = file.read(16)
    for magic, parse in _FORMATS:
        if start.startswith(magic):
            try:
                header = parse(file, size)
            except (struct.error, IndexError):
                raise Bad("truncated") from None
            if header.width <= 0 or header.height <= 0:
                raise Bad(f"impossible size {header.width}x{header.height}")
            if header.width * header.height > MAX_PIXELS:
                raise Bad(f"{header.width}x{header.height} pixels, over {MAX_PIXELS}: too large to decode safely")
            return header
    if not any(start):
        raise Bad("starts with zeros: not an image, or its content was lost")
    raise Bad("not an image of a known format (JPEG, PNG, WebP, BMP, GIF, TIFF)")


# One function per format: walk through the structure, return the header, raise Bad or struct.error.


def _read(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _jpeg(file: BinaryIO, size: int) -> Header:
    width = height = orientation = 0
    plain = False
    file.seek(2)
    while True:
        (byte,) = _read(file, "B")
        if byte != 0xFF:
            raise Bad("broken JPEG: marker expected")
        marker = byte
        while marker == 0xFF:
            (marker,) = _read(file, "B")
        if marker == 0xD9:
            raise Bad("broken JPEG: ends before the image")
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
            raise Bad("truncated")
        file.seek(after)
    # In a scan, byte FF is followed by 0 or a restart marker only, so FF D9 is the end of the image.
    scan = file.tell()
    file.seek(max(scan, size - 4096))
    if b"\xff\xd9" not in file.read():
        file.seek(scan)  # some applications append megabytes after the image
        if b"\xff\xd9" not in file.read():
            raise Bad("truncated")
    return Header(JpegImagePlugin.JpegImageFile, width, height, plain, orientation or 1)


def _png(file: BinaryIO, size: int) -> Header:
    file.seek(8)
    width = height = depth = color = 0
    kinds: set[bytes] = set()
    orientation = 1
    while b"IEND" not in kinds:
        length, kind = _read(file, ">I4s")
        after = file.tell() + length + 4
        if after > size:
            raise Bad("truncated")
        if kind == b"IHDR":
            width, height, depth, color = _read(file, ">IIBB")
        elif kind == b"eXIf":
            orientation = _orientation(file.read(length))
        kinds.add(kind)
        file.seek(after)
    if not {b"IHDR", b"IDAT"} <= kinds:
        raise Bad("broken PNG: no image in it")
    plain = depth == 8 and color in (0, 2) and b"tRNS" not in kinds
    return Header(PngImagePlugin.PngImageFile, width, height, plain, orientation)


def check_png(png: bytes) -> None:
    """Raise Bad for a wrong checksum, which OpenCV's libpng ignores."""
    at, view = 8, memoryview(png)
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        body = view[at + 4 : at + 8 + length]
        if zlib.crc32(body) != struct.unpack_from(">I", png, at + 8 + length)[0]:
            raise Bad(f"broken PNG: wrong checksum in {bytes(body[:4])!r}")
        if body[:4] == b"IEND":
            return
        at += 12 + length


def _webp(file: BinaryIO, size: int) -> Header:
    file.seek(4)
    (length, form) = _read(file, "<I4s")
    if form != b"WEBP":
        raise Bad("not an image of a known format (a RIFF file, but no WebP)")
    if 8 + length > size:
        raise Bad("truncated")
    file.seek(max(12, 8 + length - 64))
    if not any(file.read(64)):  # WebP has no checksum: zeros are decoded to gray
        raise Bad("ends in zeros: its content was lost")
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
    return Header(WebPImagePlugin.WebPImageFile, width, height, plain, orientation)


def _bmp(file: BinaryIO, size: int) -> Header:
    file.seek(10)
    pixels, core = _read(file, "<II")
    if core == 12:
        width, height, _, bits = _read(file, "<HHHH")
        compression = 0
    else:
        width, height, _, bits, compression, packed = _read(file, "<iiHHII")
        pixels += packed if compression else 0
    height = abs(height)  # negative if stored from top to bottom
    if pixels + (0 if compression else (width * bits + 31) // 32 * 4 * height) > size:
        raise Bad("truncated")
    return Header(BmpImagePlugin.BmpImageFile, width, height, bits == 24 and compression == 0)


def _gif(file: BinaryIO, size: int) -> Header:
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
            raise Bad("broken GIF: no image in it")
        while length := _read(file, "B")[0]:
            file.seek(length, os.SEEK_CUR)
        if block == 0x2C:
            return Header(GifImagePlugin.GifImageFile, width, height, False)


def _tiff(file: BinaryIO, size: int) -> Header:
    file.seek(0)
    with open_with(file, TiffImagePlugin.TiffImageFile) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        tags = image.tag_v2
        for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
            for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
                if offset + count > size:
                    raise Bad("truncated")
        width, height = tags[256], tags[257]
        if 5 <= tags.get(274, 1) <= 8:
            width, height = height, width
    return Header(TiffImagePlugin.TiffImageFile, width, height, False)  # Pillow applies the orientation of TIFFs


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
    """Return tag 274 of an EXIF block; 1 (upright) if it is missing or invalid."""
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


_warnings_lock = threading.Lock()  # warning filters are global to the process


@contextlib.contextmanager
def open_with(file: BinaryIO, plugin: type) -> Iterator[Image.Image]:
    """Open the file with one Pillow plugin; Image.open would try other parsers, too."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield plugin(file)
        except (Bad, MemoryError):
            raise
        except Exception as error:  # plugins raise any error for broken files
            raise Bad(f"cannot be decoded: {error or type(error).__name__}") from None
