"""Compiled color jitter, grayscale, blur and solarization, in place on float32 gray levels; see `transforms.pixel_ops`.

pixels [3, n] are the channels of a view; every function leaves integers from 0 to 255.
"""

import numpy as np

from dino_ssl.kernels.jit import compiled, f32
from dino_ssl.kernels.resample import round_to_byte

TRUNCATE = -0.499
"""Added before rounding if Pillow truncates; slightly above -0.5, so that integers stay the same."""


@compiled
def scale(values, factor, shift):
    """Multiply by a factor and add a shift: brightness and contrast."""
    for j in range(values.size):
        values[j] = round_to_byte(values[j] * factor + shift)


@compiled
def mean_gray(pixels):
    """Return the rounded mean of the view's gray levels; sums of a few thousand of them are exact in float32."""
    sums = np.zeros(3)
    for channel in range(3):
        for start in range(0, pixels.shape[1], 4096):
            part, total = pixels[channel, start : start + 4096], f32(0)
            for j in range(part.size):
                total += part[j]
            sums[channel] += total
    red, green, blue = sums / pixels.shape[1]
    return int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)


@compiled
def adjust_saturation(pixels, factor):
    """Interpolate between gray (0) and the color (1) of each pixel, or extrapolate."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    u, v, w = f32(0.299 * (1 - factor)), f32(0.587 * (1 - factor)), f32(0.114 * (1 - factor))
    weight = f32(factor)
    for j in range(red.size):
        gray = u * red[j] + v * green[j] + w * blue[j] + f32(TRUNCATE)
        red[j], green[j], blue[j] = (
            round_to_byte(gray + weight * red[j]),
            round_to_byte(gray + weight * green[j]),
            round_to_byte(gray + weight * blue[j]),
        )


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
        red[j], green[j], blue[j] = (
            np.rint(value - depth * _absorption(hue + f32(5))),
            np.rint(value - depth * _absorption(hue + f32(3))),
            np.rint(value - depth * _absorption(hue + f32(1))),
        )


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
            before, after, w = (
                padded[radius - k : radius - k + size],
                padded[radius + k : radius + k + size],
                kernel[radius - k],
            )
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
