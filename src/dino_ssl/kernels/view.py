"""One view of an image by compiled code: crop, resize, color jitter, blur and solarization; see `transforms.pixel_ops`.

Planes [3, size, size] hold float32 gray levels, transposed to `planes[channel, x, y]`, so that the inner loops of both
passes of the resize run over contiguous memory and become vector instructions. Everything is in one file, because numba
compiles again only if the file of the cached function has changed. Importing it raises ImportError without numba.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types

from dino_ssl.data.transforms import pixel_ops
from dino_ssl.data.transforms.multi_crop import JITTER_OPS

f32 = np.float32
u64 = np.uint64  # for indices: numba checks every signed index for a negative value

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "nnan", "ninf"},  # sums in any order; all values are finite
}
compiled = njit(**OPTIONS)

ROWS = 64
"""Output rows that are resized together: their inputs stay in the CPU's cache."""
BLOCK = 8
"""Side of the blocks that are transposed together: the width of a vector instruction."""
TRUNCATE = -0.499
"""Added before rounding if Pillow truncates; slightly above -0.5, so that integers stay the same."""
BRIGHTNESS, CONTRAST, SATURATION = map(
    JITTER_OPS.index, (pixel_ops.adjust_brightness, pixel_ops.adjust_contrast, pixel_ops.adjust_saturation)
)
NO_SOLARIZE = 256
"""A solarization threshold above all values."""

_bytes, _image = types.Array(types.uint8, 2, "C"), types.Array(types.uint8, 2, "C", readonly=True)
_floats, _ints = (types.Array(t, 1, "C", readonly=True) for t in (types.float32, types.int64))
_int, _float, _bool = types.int64, types.float64, types.boolean


def compiled_to_disk(signature: Any) -> Callable[[Callable], Any]:
    """Return a decorator that compiles a function eagerly and caches the machine code in `__pycache__`."""

    def decorator(function: Callable) -> Any:
        try:
            return njit(signature, cache=True, **OPTIONS)(function)
        except Exception:  # no writable folder, a full disk, a damaged file: numba raises many types
            for damaged in Path(__file__).parent.glob(f"__pycache__/view.{function.__name__}-*.nb*"):
                with suppress(OSError):
                    damaged.unlink()
            return njit(signature, **OPTIONS)(function)

    return decorator


# -- crop and resize: Pillow's antialiased bicubic, first along columns, then along rows ------------------


@compiled
def filter_weights(length, size):
    """Return (first [size], count [size], weights [size, K]) of the input pixels of each output pixel, K >= 4.

    The cubic filter with a = -0.5, stretched by length / size if that is above 1.
    """
    scale = length / size
    wide, narrow = max(scale, 1.0), min(1 / scale, 1.0)
    first, count = np.empty(size, np.uint64), np.empty(size, np.uint64)
    weights = np.zeros((size, int(4 * wide) + 4), np.float32)
    for x in range(size):
        center = (x + 0.5) * scale
        low, high = max(0, int(center - 2 * wide + 0.5)), min(length, int(center + 2 * wide + 0.5))
        total = 0.0
        for i in range(low, high):
            d, weight = abs(i - center + 0.5) * narrow, 0.0
            if d < 1:
                weight = (1.5 * d - 2.5) * d * d + 1
            elif d < 2:
                weight = ((2.5 - 0.5 * d) * d - 4) * d + 2
            weights[x, i - low] = weight
            total += weight
        for k in range(high - low):
            weights[x, k] /= f32(total)
        first[x], count[x] = low, high - low
    return first, count, weights


@compiled
def resize_vertically(image, left, width, first, count, weights, row):
    """Write one output row that is not resized horizontally: row[j] = sum_k weights[k] image[first + k, left + j]."""
    a, u = image[first, left : left + width], weights[0]
    for j in range(width):
        row[j] = u * f32(a[j])
    k = u64(1)
    while k + u64(2) < count:  # three at a time: one pass over the output row for three input rows
        a, u = image[first + k, left : left + width], weights[k]
        b, v = image[first + k + u64(1), left : left + width], weights[k + u64(1)]
        c, w = image[first + k + u64(2), left : left + width], weights[k + u64(2)]
        for j in range(width):
            row[j] += u * f32(a[j]) + v * f32(b[j]) + w * f32(c[j])
        k += u64(3)
    while k < count:
        a, u = image[first + k, left : left + width], weights[k]
        for j in range(width):
            row[j] += u * f32(a[j])
        k += u64(1)


@compiled
def transpose(rows, columns, width):
    """Write the transpose of rows [ROWS, width] to columns [width, ROWS]; width is a multiple of BLOCK."""
    for j in range(0, width, BLOCK):
        for y in range(0, ROWS, BLOCK):
            for k in range(BLOCK):
                for i in range(BLOCK):
                    columns[u64(j + k), u64(y + i)] = rows[u64(y + i), u64(j + k)]


@compiled
def resize_horizontally(columns, first, count, weights, out):
    """Write one output column of a channel, rounded, from columns [3 pixels, ROWS] that begin with this channel."""
    three = u64(3)
    begin = three * first
    a, u = columns[begin], weights[0]
    b, v = columns[begin + three], weights[1]
    c, w = columns[begin + u64(6)], weights[2]
    d, x = columns[begin + u64(9)], weights[3]
    for y in range(out.size):
        out[y] = u * a[y] + v * b[y] + w * c[y] + x * d[y]
    for k in range(4, np.int64(count)):
        a, u = columns[begin + three * u64(k)], weights[k]
        for y in range(out.size):
            out[y] += u * a[y]
    for y in range(out.size):
        out[y] = round_to_byte(out[y])


@compiled
def round_to_byte(value):
    """Return the nearest gray level from 0 to 255."""
    return min(max(np.rint(value), f32(0)), f32(255))


@compiled
def crop_and_resize(image, top, left, height, width, size, flip, planes):
    """Write a crop of image [H, 3 W] to planes [3, size, size], resized and transposed, mirrored if `flip`."""
    first_y, count_y, weights_y = filter_weights(height, size)
    first_x, count_x, weights_x = filter_weights(width, size)
    padded = -(-3 * width // BLOCK) * BLOCK
    rows = np.zeros((ROWS, padded), np.float32)
    columns = np.zeros((padded + 12, ROWS), np.float32)  # of fewer than 4 pixels, the others have weight 0
    for start in range(0, size, ROWS):
        number = min(ROWS, size - start)
        for y in range(number):
            i = u64(start + y)
            resize_vertically(image, 3 * left, 3 * width, u64(top) + first_y[i], count_y[i], weights_y[i], rows[y])
        transpose(rows, columns, padded)
        for x in range(size):
            to = size - 1 - x if flip else x
            for channel in range(3):
                out = planes[channel, to, start : start + number]
                resize_horizontally(columns[channel:], first_x[x], count_x[x], weights_x[x], out)


@compiled
def write_bytes(planes, out):
    """Write transposed planes [3, size, size] to out [size, 3 size] uint8, channels interleaved."""
    size = planes.shape[1]
    for left in range(0, size, BLOCK):  # in blocks of columns, whose lines stay in the cache
        for y in range(size):
            for x in range(left, min(left + BLOCK, size)):
                for channel in range(3):
                    out[u64(y), u64(3 * x + channel)] = np.uint8(planes[u64(channel), u64(x), u64(y)])


# -- colors: every function leaves integers from 0 to 255 in the pixels [3, n] ----------------------------


@compiled
def scale(values, factor, shift):
    """Multiply by a factor and add a shift: brightness and contrast."""
    for j in range(values.size):
        values[j] = round_to_byte(values[j] * factor + shift)


@compiled
def mean_gray(pixels):
    """Return the rounded mean of the view's gray levels; sums in float64 are exact."""
    red, green, blue = 0.0, 0.0, 0.0
    for j in range(pixels.shape[1]):
        red += pixels[0, j]
        green += pixels[1, j]
        blue += pixels[2, j]
    return int((0.299 * red + 0.587 * green + 0.114 * blue) / pixels.shape[1] + 0.5)


@compiled
def adjust_saturation(pixels, factor):
    """Interpolate between gray (0) and the color (1) of each pixel, or extrapolate."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    u, v, w = f32(0.299 * (1 - factor)), f32(0.587 * (1 - factor)), f32(0.114 * (1 - factor))
    weight = f32(factor)
    for j in range(red.size):
        gray = u * red[j] + v * green[j] + w * blue[j] + f32(TRUNCATE)
        red[j] = round_to_byte(gray + weight * red[j])
        green[j] = round_to_byte(gray + weight * green[j])
        blue[j] = round_to_byte(gray + weight * blue[j])


@compiled
def shift_hue(pixels, step):
    """Convert to OpenCV's 8-bit HSV with 256 hues, add `step` (0 to 255), and convert back.

    The conversion to HSV is bit-exact: quotients are in 4096ths, whose products with integers are exact in float32.
    """
    red, green, blue = pixels[0], pixels[1], pixels[2]
    step, half = f32(step), f32(0.5)
    for j in range(red.size):
        r, g, b = red[j], green[j], blue[j]
        value = max(r, max(g, b))
        spread = value - min(r, min(g, b))
        sixths = g - b if value == r else (b - r + f32(2) * spread if value == g else r - g + f32(4) * spread)
        saturation = np.floor(spread * np.rint(f32(255 * 4096) / max(value, f32(1))) * f32(1 / 4096) + half)
        hue = np.floor(sixths * np.rint(f32(256 * 4096 / 6) / max(spread, f32(1))) * f32(1 / 4096) + half) + step
        hue = hue + f32(256) if hue < f32(0) else hue
        hue = hue - f32(256) if hue >= f32(256) else hue
        hue = hue * f32(6 / 255)  # OpenCV converts back with 255 hues
        depth = value * saturation * f32(1 / 255)
        red[j] = np.rint(value - depth * _absorption(hue + f32(5)))
        green[j] = np.rint(value - depth * _absorption(hue + f32(3)))
        blue[j] = np.rint(value - depth * _absorption(hue + f32(1)))


@compiled
def _absorption(hue):
    """Return the share of the depth by which a channel is below the value, 0 to 1; hue from 0 to 12 in sixths."""
    hue = hue - f32(6) if hue >= f32(6) else hue
    return max(f32(0), min(min(hue, f32(4) - hue), f32(1)))


@compiled
def to_gray(pixels):
    """Replace all channels by ITU-R 601 luma with the 15 bits of OpenCV."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    for j in range(red.size):
        gray = np.floor((f32(9798) * red[j] + f32(19235) * green[j] + f32(3735) * blue[j]) * f32(2**-15) + f32(0.5))
        red[j], green[j], blue[j] = gray, gray, gray


@compiled
def blur(plane, kernel, buffer, padded):
    """Convolve a plane [size, size] with the kernel along both axes; in 256ths all sums are exact, rounded once.

    buffer [size, size] and padded [size + kernel size] are working memory.
    """
    size, radius = plane.shape[0], kernel.size // 2
    middle = kernel[radius]
    for x in range(size):
        out, row = buffer[x], plane[x]
        for y in range(size):
            out[y] = middle * row[y]
        for k in range(1, radius + 1):
            before, after, w = plane[max(0, x - k)], plane[min(size - 1, x + k)], kernel[radius - k]
            for y in range(size):
                out[y] += w * (before[y] + after[y])
    for x in range(size):
        out, row = plane[x], buffer[x]
        for k in range(radius):  # replicate the border
            padded[k], padded[radius + size + k] = row[0], row[size - 1]
        for y in range(size):
            padded[radius + y] = row[y]
            out[y] = middle * row[y]
        for k in range(1, radius + 1):
            left, right = radius - k, radius + k
            before, after, w = padded[left : left + size], padded[right : right + size], kernel[left]
            for y in range(size):
                out[y] += w * (before[y] + after[y])
        for y in range(size):
            out[y] = np.floor(out[y] + f32(0.5))


@compiled
def solarize(values, threshold):
    """Invert all values of at least the threshold."""
    for j in range(values.size):
        bright = f32(values[j] >= threshold)
        values[j] += bright * (f32(255) - f32(2) * values[j])


# -- the view ----------------------------------------------------------------------------------------------


@compiled_to_disk(
    types.void(
        *(_image, _int, _int, _int, _int, _bool),  # image and crop
        *(_ints, _float, _float, _float, _int, _bool),  # colors
        *(_floats, _int, _bytes),
    )
)
def make_view(
    image, top, left, height, width, flip, order, brightness, contrast, saturation, hue, gray, kernel, threshold, out
):
    """Write one view of image [H, 3 W] to out [size, 3 size]; the parameters are those of ViewParams."""
    size = out.shape[0]
    planes = np.empty((3, size, size), np.float32)
    crop_and_resize(image, top, left, height, width, size, flip, planes)
    pixels, values = planes.reshape(3, size * size), planes.reshape(3 * size * size)
    for op in order:
        if op == BRIGHTNESS:
            scale(values, f32(brightness), f32(TRUNCATE))
        elif op == CONTRAST:
            scale(values, f32(contrast), f32(mean_gray(pixels) * (1 - contrast) + TRUNCATE))
        elif op == SATURATION:
            adjust_saturation(pixels, saturation)
        else:
            shift_hue(pixels, hue)
    if gray:
        to_gray(pixels)
    if kernel.size > 1:
        buffer, padded = np.empty((size, size), np.float32), np.empty(size + kernel.size, np.float32)
        for channel in range(3):
            blur(planes[channel], kernel, buffer, padded)
    if threshold < NO_SOLARIZE:
        solarize(values, f32(threshold))
    write_bytes(planes, out)
