"""The compiled twin of MultiCrop: a view of a picture by one call of compiled code, on one processor core.

It makes the views of the same draws by the same steps, so that each equals the plain one to a grey level or two; what
is left is rounding, which a turn of the hue enlarges where there is hardly any colour. It is fast because every inner
loop runs over numbers that lie side by side, of which the compiler makes vector instructions. So a view is resized down
first, and lies on its side from there on (`planes[colour, x, y]`) until its bytes are written.

To import this compiles it, for ten seconds or so; what comes out is kept for the next time. Raises ImportError where
numba is not installed.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types

from dino_ssl.data.dataset import Reduction
from dino_ssl.data.transforms.multi_crop import JITTER_OPS, MultiCrop, ViewParams
from dino_ssl.data.transforms.pixel_ops import adjust_brightness, adjust_contrast, adjust_saturation, gaussian

f32 = np.float32
at = np.uint64  # places: numba looks at every signed one, whether it is negative and counts from the end
BRIGHTNESS, CONTRAST, SATURATION = map(JITTER_OPS.index, (adjust_brightness, adjust_contrast, adjust_saturation))
CUT = -0.499  # Pillow cuts where this rounds; a little above -0.5, so that whole numbers stay what they are
ROWS = 64
"""Rows of a view that are resized together: what they are made of stays in the nearest caches."""
BLOCK = 8
"""Rows and columns that are turned over together: as many numbers as a vector instruction takes."""
NOTHING_BRIGHT = 256
"""A threshold of solarisation that no value reaches."""


OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "nnan", "ninf"},  # sums in any order; all numbers are finite
}
compiled = njit(**OPTIONS)


def compiled_once(signature: Any) -> Callable[[Callable], Any]:
    """numba's compiler, at once, which keeps the machine code for the next time."""

    def compiled_for(function: Callable) -> Any:
        try:
            return njit(signature, cache=True, **OPTIONS)(function)
        except Exception:  # nowhere to keep it, no room for it, or it is damaged there: numba raises what it meets
            for damaged in Path(__file__).parent.glob(f"__pycache__/{Path(__file__).stem}.{function.__name__}*.nb*"):
                with suppress(OSError):
                    damaged.unlink()
            return njit(signature, **OPTIONS)(function)

    return compiled_for


# -- the crop, resized: Pillow's antialiased bicubic -------------------------------------------------------


@compiled
def taps(length, size):
    """(first [size], count [size], weights [size, K]): which of `length` pixels each of `size` is made of, and how.

    The cubic of a = -0.5, as many times wider as there are more pixels than are asked for. K is 4 or more.
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
def down(image, left, width, first, count, weights, row):
    """row[j] = the sum over k of weights[k] image[first + k, left + j]: a row of the view, not yet resized across."""
    a, u = image[first, left : left + width], weights[0]
    for j in range(width):
        row[j] = u * f32(a[j])
    k = at(1)
    while k + at(2) < count:  # three at a time: each reads and writes the row once
        a, u = image[first + k, left : left + width], weights[k]
        b, v = image[first + k + at(1), left : left + width], weights[k + at(1)]
        c, w = image[first + k + at(2), left : left + width], weights[k + at(2)]
        for j in range(width):
            row[j] += u * f32(a[j]) + v * f32(b[j]) + w * f32(c[j])
        k += at(3)
    while k < count:
        a, u = image[first + k, left : left + width], weights[k]
        for j in range(width):
            row[j] += u * f32(a[j])
        k += at(1)


@compiled
def turned_over(rows, columns, width):
    """columns [width, ROWS] = rows [ROWS, width] turned over; the width is a multiple of a block's."""
    for j in range(0, width, BLOCK):
        for y in range(0, ROWS, BLOCK):
            for k in range(BLOCK):
                for i in range(BLOCK):
                    columns[at(j + k), at(y + i)] = rows[at(y + i), at(j + k)]


@compiled
def across(columns, first, count, weights, out):
    """out [n] = a column of the view in one colour, in grey levels. columns [3 pixels, ROWS], from that colour on."""
    three = at(3)
    begin = three * first
    a, u = columns[begin], weights[0]
    b, v = columns[begin + three], weights[1]
    c, w = columns[begin + at(6)], weights[2]
    d, x = columns[begin + at(9)], weights[3]
    for y in range(out.size):
        out[y] = u * a[y] + v * b[y] + w * c[y] + x * d[y]
    for k in range(4, np.int64(count)):
        a, u = columns[begin + three * at(k)], weights[k]
        for y in range(out.size):
            out[y] += u * a[y]
    for y in range(out.size):
        out[y] = whole(out[y])


@compiled
def whole(value):
    """The nearest grey level."""
    return min(max(np.rint(value), f32(0)), f32(255))


@compiled
def resized(image, top, left, height, width, size, flip, planes):
    """planes [3, size, size] on their side = the crop of image [H, 3 W], resized, and mirrored where `flip` says so."""
    first_y, count_y, weights_y = taps(height, size)
    first_x, count_x, weights_x = taps(width, size)
    padded = -(-3 * width // BLOCK) * BLOCK
    rows = np.zeros((ROWS, padded), np.float32)
    columns = np.zeros((padded + 12, ROWS), np.float32)  # of fewer than 4 pixels the others have no weight
    for start in range(0, size, ROWS):
        number = min(ROWS, size - start)
        for y in range(number):
            place = at(start + y)
            down(image, 3 * left, 3 * width, at(top) + first_y[place], count_y[place], weights_y[place], rows[y])
        turned_over(rows, columns, padded)
        for x in range(size):
            to = size - 1 - x if flip else x
            for colour in range(3):
                out = planes[colour, to, start : start + number]
                across(columns[colour:], first_x[x], count_x[x], weights_x[x], out)


# -- the colours: as pixels.py has them, with whole grey levels after each ---------------------------------


@compiled
def scaled(values, factor, shift):
    for j in range(values.size):
        values[j] = whole(values[j] * factor + shift)


@compiled
def mean_grey(pixels):
    """The mean of the view's grey, rounded. Sums of a few thousand grey levels are exact in float32."""
    sums = np.zeros(3)
    for colour in range(3):
        for start in range(0, pixels.shape[1], 4096):
            part, total = pixels[colour, start : start + 4096], f32(0)
            for j in range(part.size):
                total += part[j]
            sums[colour] += total
    red, green, blue = sums / pixels.shape[1]
    return int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)


@compiled
def saturated(pixels, factor):
    red, green, blue = pixels[0], pixels[1], pixels[2]
    u, v, w = f32(0.299 * (1 - factor)), f32(0.587 * (1 - factor)), f32(0.114 * (1 - factor))
    own = f32(factor)
    for j in range(red.size):
        grey = u * red[j] + v * green[j] + w * blue[j] + f32(CUT)
        red[j], green[j], blue[j] = (
            whole(grey + own * red[j]),
            whole(grey + own * green[j]),
            whole(grey + own * blue[j]),
        )


@compiled
def hue_turned(pixels, step):
    """To OpenCV's 8-bit HSV of 256 hues, `step` further, and back; step: 0 to 255.

    The way there is to the bit: quotients in 4096ths, whose products with whole numbers float32 holds exactly.
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
        hue = hue * f32(6 / 255)  # OpenCV's way back has 255 of them
        depth = value * saturation * f32(1 / 255)
        red[j], green[j], blue[j] = (
            np.rint(value - depth * away(hue + f32(5))),
            np.rint(value - depth * away(hue + f32(3))),
            np.rint(value - depth * away(hue + f32(1))),
        )


@compiled
def away(hue):
    """By how much of the depth a colour is below the value, at this hue from its own: in sixths, 0 to 12."""
    hue = hue - f32(6) if hue >= f32(6) else hue
    return max(f32(0), min(min(hue, f32(4) - hue), f32(1)))


@compiled
def greyed(pixels):
    """ITU-R 601 in the 15 bits that OpenCV has."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    for j in range(red.size):
        grey = np.floor((f32(9798) * red[j] + f32(19235) * green[j] + f32(3735) * blue[j]) * f32(2**-15) + f32(0.5))
        red[j], green[j], blue[j] = grey, grey, grey


@compiled
def blurred(plane, kernel, between, padded):
    """A plane [size, size] through the kernel, one way and the other. In 256ths sums are exact, and rounded once."""
    size, reach = plane.shape[0], kernel.size // 2
    middle = kernel[reach]
    for x in range(size):
        out, own = between[x], plane[x]
        for y in range(size):
            out[y] = middle * own[y]
        for k in range(1, reach + 1):
            before, after, w = plane[max(0, x - k)], plane[min(size - 1, x + k)], kernel[reach - k]
            for y in range(size):
                out[y] += w * (before[y] + after[y])
    for x in range(size):
        out, row = plane[x], between[x]
        for k in range(reach):  # beyond the border is the border
            padded[k], padded[reach + size + k] = row[0], row[size - 1]
        for y in range(size):
            padded[reach + y] = row[y]
            out[y] = middle * row[y]
        for k in range(1, reach + 1):
            before, after, w = (
                padded[reach - k : reach - k + size],
                padded[reach + k : reach + k + size],
                kernel[reach - k],
            )
            for y in range(size):
                out[y] += w * (before[y] + after[y])
        for y in range(size):
            out[y] = np.floor(out[y] + f32(0.5))


@compiled
def solarized(values, threshold):
    for j in range(values.size):
        bright = f32(values[j] >= threshold)
        values[j] += bright * (f32(255) - f32(2) * values[j])


@compiled
def written(planes, out):
    """out [size, 3 size] uint8, upright and colour beside colour."""
    size = planes.shape[1]
    even = size // BLOCK * BLOCK
    for y in range(0, even, BLOCK):
        for x in range(0, even, BLOCK):
            for i in range(BLOCK):
                for k in range(BLOCK):
                    for colour in range(3):
                        byte = np.uint8(planes[at(colour), at(x + k), at(y + i)])
                        out[at(y + i), at(3 * (x + k) + colour)] = byte
    for y in range(size):
        for x in range(even if y < even else 0, size):
            for colour in range(3):
                out[y, 3 * x + colour] = np.uint8(planes[colour, x, y])


# -- a view ------------------------------------------------------------------------------------------------

_BYTES, _SEEN = types.Array(types.uint8, 2, "C"), types.Array(types.uint8, 2, "C", readonly=True)
_NUMBERS = types.Array(types.float32, 1, "C", readonly=True)
_int, _float, _bool = types.int64, types.float64, types.boolean


@compiled_once(
    types.void(
        *(_SEEN, _int, _int, _int, _int, _bool),  # the picture and the crop
        *(types.Array(types.int64, 1, "C", readonly=True), _float, _float, _float, _int, _bool),  # the colours
        *(_NUMBERS, _int, _BYTES),
    )
)
def make(
    image, top, left, height, width, flip, order, brightness, contrast, saturation, step, grey, kernel, threshold, out
):
    """out [size, 3 size] = one view of image [H, 3 W], of what a Draw says."""
    size = out.shape[0]
    planes = np.empty((3, size, size), np.float32)
    resized(image, top, left, height, width, size, flip, planes)
    pixels, values = planes.reshape(3, size * size), planes.reshape(3 * size * size)
    for which in order:
        if which == BRIGHTNESS:
            scaled(values, f32(brightness), f32(CUT))
        elif which == CONTRAST:
            scaled(values, f32(contrast), f32(mean_grey(pixels) * (1 - contrast) + CUT))
        elif which == SATURATION:
            saturated(pixels, saturation)
        else:
            hue_turned(pixels, step)
    if grey:
        greyed(pixels)
    if kernel.size > 1:
        between, padded = np.empty((size, size), np.float32), np.empty(size + kernel.size, np.float32)
        for colour in range(3):
            blurred(planes[colour], kernel, between, padded)
    if threshold < NOTHING_BRIGHT:
        solarized(values, f32(threshold))
    written(planes, out)


_NO_BLUR = np.ones(1, np.float32)


@lru_cache
def _numbers(order: tuple[int, ...]) -> np.ndarray:
    return np.array(order, np.int64)


@dataclass(frozen=True)
class CompiledMultiCrop:
    """A MultiCrop whose views are made by compiled code; its draws are the plain one's."""

    plain: MultiCrop

    @property
    def repeats(self) -> int:
        return self.plain.repeats

    @property
    def size(self) -> int:
        return self.plain.size

    @property
    def view_shapes(self) -> list[tuple[int, int]]:
        return self.plain.view_shapes

    def decode_scale(self, height: int, width: int) -> Reduction:
        return self.plain.decode_scale(height, width)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """As the plain one."""
        sides = [side for number, side in self.view_shapes for _ in range(number)]
        draws = self.plain.sample_params(image.shape[0], image.shape[1], rng)
        flat = np.ascontiguousarray(image).reshape(len(image), -1)
        return [self.view(flat, draw, side) for draw, side in zip(draws, sides, strict=True)]

    def view(self, image: np.ndarray, draw: ViewParams, size: int) -> np.ndarray:
        """One view [size, size, 3] of a picture [H, 3 W]."""
        out = np.empty((size, 3 * size), np.uint8)
        brightness, contrast, saturation, turn = draw.factors
        make(
            *(image, draw.top, draw.left, draw.height, draw.width, draw.flip),
            *(_numbers(draw.order), brightness, contrast, saturation, int(turn * 255) % 256, draw.gray),
            gaussian(round(draw.sigma * 256)) if draw.sigma else _NO_BLUR,
            self.plain.solarize_threshold if draw.solarize else NOTHING_BRIGHT,
            out,
        )
        return out.reshape(size, size, 3)
