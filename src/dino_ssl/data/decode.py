"""Decoding of image files to uint8 RGB.

Pillow's plugin of the format reads the header. Decoders fill missing parts of truncated files with gray and allocate
whatever a forged header requests, so size and completeness are checked first. Then OpenCV decodes the common kinds
(8-bit RGB or grayscale without transparency) and Pillow all others (palette, transparency, CMYK, 16 bits, TIFF, GIF).

Transparent images are composited on white, 16 bits are scaled to 8 (x / 257), floats by their own range. The first
frame of an animation is used. The EXIF orientation is applied.
"""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dino_ssl.data.dataset import BadImage, Reduction

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
)
"""File name suffixes of images."""
MAX_PIXELS = 2**27  # 134 megapixels, 403 MB when decoded; larger headers are rejected as decompression bombs
PLUGINS: dict[bytes, Any] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}
"""Pillow's plugins by the first bytes of a file; `Image.open` would try other parsers, too."""
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_PLAIN = {"JPEG": ("L", "RGB"), "PNG": ("L", "RGB"), "BMP": ("BGR",)}
"""Pillow's names of the pixel layouts that OpenCV decodes."""
_SMALL = 2**26  # larger files are not read into memory before their header is checked
_REDUCED = {
    1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8
}  # fmt: skip

cv2.setNumThreads(0)  # one thread per image; worker processes are the parallelism
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are raised, not printed
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata; a local filter would not be safe with threads


def probe(path: str | os.PathLike, data: bytes | None = None) -> tuple[int, int]:
    """Return (width, height) of the decoded image from the file's structure. Raises BadImage."""
    with _open(path, data) as (_, image):
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def decode(path: str | os.PathLike, data: bytes | None = None, *, reduce: Reduction = 1) -> np.ndarray:
    """Return the image as uint8 RGB [height, width, 3]. Raises BadImage.

    Args:
        path: File, also named in errors.
        data: Content of the file, if it has been read already.
        reduce: Factor by which a JPEG is downscaled (sizes are rounded up): its blocks are computed at that size, which
            is faster. Other formats are not downscaled.
    """
    with _open(path, data, whole=True) as (file, image):
        plain, orientation, (width, height) = _is_plain(image), _orientation(image), image.size
        times = reduce if plain and image.format == "JPEG" else 1
        if plain and image.format == "PNG":
            image.verify()  # checksums, which OpenCV's libpng ignores
        pixels = _opencv(file, times) if plain else _pillow(image)
        if pixels.shape[:2] != (-(-height // times), -(-width // times)):
            raise OSError(f"decodes to {pixels.shape[1]}x{pixels.shape[0]}, not {width}x{height} / {times}")
        return _upright(pixels, orientation)


@contextlib.contextmanager
def _open(path: str | os.PathLike, data: bytes | None, *, whole: bool = False) -> Iterator[tuple[BinaryIO, ImageFile]]:
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
        reason = getattr(error, "strerror", None) or getattr(error, "err", None) or str(error)
        raise BadImage(path, reason or type(error).__name__) from error


def _header(file: BinaryIO) -> ImageFile:
    """Return the image, not decoded yet; raise OSError if the file is no image, incomplete, or too large to decode."""
    start = file.read(16)
    if not start:
        raise OSError("empty file")
    plugin = next((plugin for magic, plugin in PLUGINS.items() if start.startswith(magic)), None)
    if plugin is None:
        raise OSError("not an image of a known format (JPEG, PNG, WebP, BMP, GIF, TIFF)")
    file.seek(0)
    try:
        image = plugin(file)
    except (SyntaxError, OSError) as error:
        raise OSError(f"truncated, or its header is broken: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise OSError(f"{image.width}x{image.height} pixels, over {MAX_PIXELS}: too large to decode safely")
    if not _is_complete(image, file):
        raise OSError("truncated")
    return image


def _is_complete(image: ImageFile, file: BinaryIO) -> bool:
    """Return False if a file ends before its image does. Only GIF is decoded for that."""
    start, size = file.tell(), file.seek(0, os.SEEK_END)
    if end := _END.get(image.format or ""):
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


def _orientation(image: ImageFile) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; from 5 on width and height are swapped."""
    if "exif" not in image.info:  # `getexif` would decode a PNG; Pillow itself turns TIFFs
        return 1
    exif = Image.Exif()
    with contextlib.suppress(SyntaxError):  # invalid EXIF
        exif.load(image.info["exif"])
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


def _opencv(file: BinaryIO, times: int) -> np.ndarray:
    file.seek(0)
    data = np.frombuffer(file.read(), np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | _REDUCED[times] | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise OSError("cannot be decoded: broken content")
    return pixels


def _pillow(image: Image.Image) -> np.ndarray:
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
