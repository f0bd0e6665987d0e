"""What the header and the structure of a picture's file say, before a pixel of it is decoded: its size, and that its
end is there.

One function for each format, which walks from block to block and reads no more than it needs.
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
"""What a folder is searched for."""
MAX_PIXELS = 2**27  # 134 megapixels, 403 MB once decoded: beyond it a header is taken for a bomb


class Bad(Exception):  # noqa: N818
    """The reason alone; the path is added outside."""


@dataclass(frozen=True)
class Header:
    """What is known of a picture before it is decoded."""

    plugin: type
    """Pillow's, of this format."""
    width: int
    height: int
    plain: bool
    """8-bit grey or colour without transparency: OpenCV decodes it."""
    orientation: int = 1
    """EXIF's, 1 to 8; 1 is upright, and from 5 on width and height change places."""


def header_of(file: BinaryIO) -> Header:
    """Raises Bad where the file is no picture, is cut short or is too large to decode."""
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
                raise Bad("cut short") from None
            if header.width <= 0 or header.height <= 0:
                raise Bad(f"impossible size {header.width}x{header.height}")
            if header.width * header.height > MAX_PIXELS:
                raise Bad(f"{header.width}x{header.height} pixels, over {MAX_PIXELS}: too large to decode safely")
            return header
    if not any(start):
        raise Bad("starts with zeros: not an image, or its content was lost")
    raise Bad("not an image of a known format (JPEG, PNG, WebP, BMP, GIF, TIFF)")


# The formats, one function each: seek through the structure, give the header, raise Bad or struct.error.


def _read(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _jpeg(file: BinaryIO, size: int) -> Header:
    width = height = orientation = 0
    plain = False
    file.seek(2)
    while True:
        (byte,) = _read(file, "B")
        if byte != 0xFF:
            raise Bad("broken JPEG: no marker where one must be")
        marker = byte
        while marker == 0xFF:
            (marker,) = _read(file, "B")
        if marker == 0xD9:
            raise Bad("broken JPEG: ends before the picture")
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
            raise Bad("cut short")
        file.seek(after)
    # In a scan a byte FF is followed by 0 or a restart marker only: FF D9 after it is the end of the picture.
    scan = file.tell()
    file.seek(max(scan, size - 4096))
    if b"\xff\xd9" not in file.read():
        file.seek(scan)  # an app may have put megabytes behind the picture
        if b"\xff\xd9" not in file.read():
            raise Bad("cut short")
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
            raise Bad("cut short")
        if kind == b"IHDR":
            width, height, depth, color = _read(file, ">IIBB")
        elif kind == b"eXIf":
            orientation = _orientation(file.read(length))
        kinds.add(kind)
        file.seek(after)
    if not {b"IHDR", b"IDAT"} <= kinds:
        raise Bad("broken PNG: no picture in it")
    plain = depth == 8 and color in (0, 2) and b"tRNS" not in kinds
    return Header(PngImagePlugin.PngImageFile, width, height, plain, orientation)


def check_sums(png: bytes) -> None:
    """OpenCV's libpng passes over wrong check sums, decodes what it can, and complains on stderr."""
    at, view = 8, memoryview(png)
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        body = view[at + 4 : at + 8 + length]
        if zlib.crc32(body) != struct.unpack_from(">I", png, at + 8 + length)[0]:
            raise Bad(f"broken PNG: wrong check sum in {bytes(body[:4])!r}")
        if body[:4] == b"IEND":
            return
        at += 12 + length


def _webp(file: BinaryIO, size: int) -> Header:
    file.seek(4)
    (length, form) = _read(file, "<I4s")
    if form != b"WEBP":
        raise Bad("not an image of a known format (a RIFF file, but no WebP)")
    if 8 + length > size:
        raise Bad("cut short")
    file.seek(max(12, 8 + length - 64))
    if not any(file.read(64)):  # WebP has no check sum: zeros decode, to grey
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
    height = abs(height)  # negative: from top to bottom
    if pixels + (0 if compression else (width * bits + 31) // 32 * 4 * height) > size:
        raise Bad("cut short")
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
            raise Bad("broken GIF: no picture in it")
        while length := _read(file, "B")[0]:
            file.seek(length, os.SEEK_CUR)
        if block == 0x2C:
            return Header(GifImagePlugin.GifImageFile, width, height, False)


def _tiff(file: BinaryIO, size: int) -> Header:
    file.seek(0)
    with opened(file, TiffImagePlugin.TiffImageFile) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        tags = image.tag_v2
        for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
            for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
                if offset + count > size:
                    raise Bad("cut short")
        width, height = tags[256], tags[257]
        if 5 <= tags.get(274, 1) <= 8:
            width, height = height, width
    return Header(TiffImagePlugin.TiffImageFile, width, height, False)  # Pillow turns TIFFs itself


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


_one_at_a_time = threading.Lock()  # Python's warning filters belong to the process, not to the thread


@contextlib.contextmanager
def opened(file: BinaryIO, plugin: type) -> Iterator[Image.Image]:
    """The plugin itself, not Image.open: no other parser is tried, and the size was checked in the header."""
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield plugin(file)
        except (Bad, MemoryError):
            raise
        except Exception as error:  # plugins raise whatever the broken bytes made them do
            raise Bad(f"cannot be decoded: {error or type(error).__name__}") from None
