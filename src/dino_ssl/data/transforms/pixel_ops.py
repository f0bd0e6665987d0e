"""What is done to a view, on uint8 RGB [H, W, 3]: the authors' operations, each by the fastest way that keeps its
values.

tests/equations/test_views.py says by how much each differs from Pillow's. On small views a call costs as much as its
pixels: so there are no tables to fill where OpenCV multiplies, and no conversion that is not needed.
"""

from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F

cv2.setNumThreads(0)  # a picture is one thread's work; the worker processes are the parallelism


def resize(image: np.ndarray, height: int, width: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> np.ndarray:
    """Bicubic (a = -0.5) or bilinear, antialiased: Pillow's, to one grey level.

    By PyTorch's uint8 kernel, which is Pillow's algorithm in AVX2 on channels-last bytes: 4 times faster
    than Pillow, and on strong reductions faster than OpenCV's INTER_AREA, which blurs; OpenCV's cubic (a =
    -0.75) has no antialiasing.
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return np.ascontiguousarray(image)
    if not (image.flags.c_contiguous and image.flags.writeable):  # torch warns of what cannot be written
        image = image.copy()
    # The strides of channels last, said outright: those that numpy gives an axis of length 1 are not taken for it,
    # the result comes channel by channel, and putting it in order takes as long again.
    pixels = torch.from_numpy(image).as_strided((1, 3, h, w), (3 * h * w, 1, 3 * w, 3))
    pixels = F.interpolate(pixels, (height, width), mode=mode, antialias=True, align_corners=False)
    return pixels.numpy()[0].transpose(1, 2, 0)


_CUT = -0.499  # Pillow cuts where OpenCV rounds; a little above -0.5, so that whole numbers stay what they are


def adjust_brightness(view: np.ndarray, factor: float) -> np.ndarray:
    """Away from black."""
    return cv2.convertScaleAbs(view, alpha=factor, beta=_CUT)


def adjust_contrast(view: np.ndarray, factor: float) -> np.ndarray:
    """Away from the view's mean grey."""
    red, green, blue, _ = cv2.mean(view)
    mean = int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)
    return cv2.addWeighted(view, factor, view, 0, mean * (1 - factor) + _CUT)


def adjust_saturation(view: np.ndarray, factor: float) -> np.ndarray:
    """Away from each pixel's own grey."""
    red, green, blue = 0.299 * (1 - factor), 0.587 * (1 - factor), 0.114 * (1 - factor)
    rows = (red + factor, green, blue, _CUT), (red, green + factor, blue, _CUT), (red, green, blue + factor, _CUT)
    return cv2.transform(view, np.array(rows, np.float32))


def adjust_hue(view: np.ndarray, turn: float) -> np.ndarray:
    """Turn every hue by a part of the circle, which 8 bits divide into 256 steps as in Pillow's HSV."""
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)  # long rows are added 3 times as fast as every third byte
    np.add(rows, _turned(int(turn * 255) % 256, view.shape[1]), out=rows)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@lru_cache(1024)
def _turned(step: int, width: int) -> np.ndarray:
    """A row's bytes: the step at every hue, 0 at saturation and value."""
    return np.tile(np.array([step, 0, 0], np.uint8), width)


def gray(view: np.ndarray) -> np.ndarray:
    """ITU-R 601 grey, in three equal channels."""
    return cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian of this standard deviation; Pillow's GaussianBlur(radius=sigma) approximates the same by
    boxes.

    In 8 bits, as OpenCV's own, and twice as fast: its filter for any separable kernel has the better code.
    """
    kernel = gaussian(round(sigma * 256))
    if len(kernel) == 1:
        return view
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


@lru_cache(4096)
def gaussian(sigma: int) -> np.ndarray:
    """The weights for a deviation in 256ths of a pixel: 256ths too, that sum to 1; 1 alone where that is no blur."""
    reach = (round(6 * sigma / 256 + 1) | 1) // 2
    exact = cv2.getGaussianKernel(2 * reach + 1, max(sigma, 1) / 256)[:reach, 0]
    side = np.diff(np.rint(256 * exact.cumsum()), prepend=0)  # what one weight's rounding takes, the next one gives
    side = side[side.cumsum() > 0]
    return np.concatenate([side, [256 - 2 * side.sum()], side[::-1]]).astype(np.float32) / 256


def solarize(view: np.ndarray, threshold: int) -> np.ndarray:
    """Invert every value from the threshold on."""
    return cv2.LUT(view, _solarized(threshold))


@lru_cache
def _solarized(threshold: int) -> np.ndarray:
    levels = np.arange(256)
    return np.where(threshold <= levels, 255 - levels, levels).astype(np.uint8)


def to_planar(image: np.ndarray, out: np.ndarray) -> None:
    """Write an image [H, W, 3] into `out` [3, H, W]."""
    for channel, plane in zip(cv2.split(image), out, strict=True):
        plane[...] = channel
