"""Multi-crop views by compiled code, on one CPU core.

Views have the same random parameters and the same steps as those of `MultiCrop`, and differ by a gray level or two from
rounding (more after a hue shift of nearly gray pixels). Importing this module compiles it, which takes about ten
seconds; the machine code is cached. Raises ImportError without numba.
"""

from functools import lru_cache

import numpy as np
from numba import types

from dino_ssl.data.transforms import pixel_ops
from dino_ssl.data.transforms.multi_crop import JITTER_OPS, MultiCrop, ViewParams
from dino_ssl.kernels.color import (
    TRUNCATE,
    adjust_saturation,
    blur,
    mean_gray,
    scale,
    shift_hue,
    solarize,
    to_gray,
)
from dino_ssl.kernels.jit import compiled_to_disk, f32
from dino_ssl.kernels.resample import crop_and_resize, write_bytes

BRIGHTNESS, CONTRAST, SATURATION = map(
    JITTER_OPS.index, (pixel_ops.adjust_brightness, pixel_ops.adjust_contrast, pixel_ops.adjust_saturation)
)
NO_SOLARIZE = 256
"""A solarization threshold above all values."""
NO_BLUR = np.ones(1, np.float32)
"""The identity blur kernel."""

_bytes, _image = types.Array(types.uint8, 2, "C"), types.Array(types.uint8, 2, "C", readonly=True)
_floats, _ints = (types.Array(t, 1, "C", readonly=True) for t in (types.float32, types.int64))
_int, _float, _bool = types.int64, types.float64, types.boolean


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


@lru_cache
def _as_array(order: tuple[int, ...]) -> np.ndarray:
    return np.array(order, np.int64)


class CompiledMultiCrop:
    """A MultiCrop whose views are made by compiled code, with the same random parameters."""

    def __init__(self, reference: MultiCrop) -> None:
        self.reference = reference
        self.repeats, self.size, self.view_shapes = reference.repeats, reference.size, reference.view_shapes
        self.decode_scale = reference.decode_scale

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the views of an image [H, W, 3] in the reference's order."""
        sides = [side for number, side in self.view_shapes for _ in range(number)]
        params = self.reference.sample_params(image.shape[0], image.shape[1], rng)
        rows = np.ascontiguousarray(image).reshape(len(image), -1)
        return [self.view(rows, view, side) for view, side in zip(params, sides, strict=True)]

    def view(self, image: np.ndarray, params: ViewParams, size: int) -> np.ndarray:
        """Return one view [size, size, 3] of an image [H, 3 W]."""
        out = np.empty((size, 3 * size), np.uint8)
        brightness, contrast, saturation, hue = params.factors
        make_view(
            *(image, params.top, params.left, params.height, params.width, params.flip),
            *(_as_array(params.order), brightness, contrast, saturation, int(hue * 255) % 256, params.gray),
            pixel_ops.gaussian(round(params.sigma * 256)) if params.sigma else NO_BLUR,
            self.reference.solarize_threshold if params.solarize else NO_SOLARIZE,
            out,
        )
        return out.reshape(size, size, 3)
