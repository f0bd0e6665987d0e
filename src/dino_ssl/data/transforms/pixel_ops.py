"""Operations of the augmentation on uint8 RGB images [H, W, 3], equal to Pillow's up to rounding.

tests/equations/test_views.py bounds the difference from Pillow. On small views a call costs as much as its pixels, so
each operation is one or two OpenCV calls.
"""

from functools import lru_cache

import cv2
import numpy as np

cv2.setNumThreads(0)  # one thread per image; worker processes are the parallelism

_TRUNCATE = -0.499  # Pillow truncates and OpenCV rounds; slightly above -0.5, so that integers are unchanged


def adjust_brightness(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black."""
    return cv2.convertScaleAbs(view, alpha=factor, beta=_TRUNCATE)


def adjust_contrast(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean gray level of the view."""
    red, green, blue, _ = cv2.mean(view)
    mean = int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)
    return cv2.addWeighted(view, factor, view, 0, mean * (1 - factor) + _TRUNCATE)


def adjust_saturation(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grayscale view."""
    red, green, blue = 0.299 * (1 - factor), 0.587 * (1 - factor), 0.114 * (1 - factor)
    rows = (
        (red + factor, green, blue, _TRUNCATE),
        (red, green + factor, blue, _TRUNCATE),
        (red, green, blue + factor, _TRUNCATE),
    )
    return cv2.transform(view, np.array(rows, np.float32))


def adjust_hue(view: np.ndarray, shift: float) -> np.ndarray:
    """Shift the hue by a fraction of the color circle, in 256 steps as in Pillow's HSV."""
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)  # adding complete rows is 3 times as fast as adding every third byte
    np.add(rows, _hue_row(int(shift * 255) % 256, view.shape[1]), out=rows)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@lru_cache(1024)
def _hue_row(step: int, width: int) -> np.ndarray:
    """Return a row of HSV bytes with the step at every hue, 0 at saturation and value."""
    return np.tile(np.array([step, 0, 0], np.uint8), width)


def gray(view: np.ndarray) -> np.ndarray:
    """Convert to ITU-R 601 grayscale, in three equal channels."""
    return cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Apply a Gaussian filter; Pillow's GaussianBlur(radius=sigma) approximates it by box filters.

    Equals cv2.GaussianBlur in 8 bits and is twice as fast: OpenCV's generic separable filter is better optimized.
    """
    kernel = gaussian(round(sigma * 256))
    if len(kernel) == 1:
        return view
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


@lru_cache(4096)
def gaussian(sigma: int) -> np.ndarray:
    """Return the filter for a standard deviation in 256ths of a pixel, in 256ths that sum to 1; [1] without blur."""
    reach = (round(6 * sigma / 256 + 1) | 1) // 2
    exact = cv2.getGaussianKernel(2 * reach + 1, max(sigma, 1) / 256)[:reach, 0]
    side = np.diff(np.rint(256 * exact.cumsum()), prepend=0)  # rounding errors are carried to the next weight
    side = side[side.cumsum() > 0]
    return np.concatenate([side, [256 - 2 * side.sum()], side[::-1]]).astype(np.float32) / 256


def solarize(view: np.ndarray, threshold: int) -> np.ndarray:
    """Invert values greater than or equal to the threshold."""
    return cv2.LUT(view, _solarized(threshold))


@lru_cache
def _solarized(threshold: int) -> np.ndarray:
    levels = np.arange(256)
    return np.where(threshold <= levels, 255 - levels, levels).astype(np.uint8)


def to_planar(image: np.ndarray, out: np.ndarray) -> None:
    """Write an image [H, W, 3] into `out` [3, H, W]."""
    for channel, plane in zip(cv2.split(image), out, strict=True):
        plane[...] = channel
