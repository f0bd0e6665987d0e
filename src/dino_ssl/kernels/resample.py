"""Compiled crop and resize: Pillow's antialiased bicubic, first along columns, then along rows.

The result is transposed, `planes[channel, x, y]`, so that the inner loops of both passes run over contiguous memory and
become vector instructions.
"""

import numpy as np

from dino_ssl.kernels.jit import compiled, f32, u64

ROWS = 64
"""Output rows that are resized together: their inputs stay in the CPU's cache."""
BLOCK = 8
"""Side of the blocks that are transposed together: the width of a vector instruction."""


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
    even = size // BLOCK * BLOCK
    for y in range(0, even, BLOCK):
        for x in range(0, even, BLOCK):
            for i in range(BLOCK):
                for k in range(BLOCK):
                    for channel in range(3):
                        byte = np.uint8(planes[u64(channel), u64(x + k), u64(y + i)])
                        out[u64(y + i), u64(3 * (x + k) + channel)] = byte
    for y in range(size):
        for x in range(even if y < even else 0, size):
            for channel in range(3):
                out[y, 3 * x + channel] = np.uint8(planes[channel, x, y])
