"""Multi-crop (Sec. 3.1): the set V of views of an image, with the authors' augmentation, on uint8 images.

Every operation has the same distribution as the authors' (torchvision on Pillow images); given the same parameters,
most results are equal or differ by at most one gray level, see tests/equations/test_views.py. It is fast because the
image is decoded once, a crop is a slice, each operation is one or two OpenCV calls on bytes (pixel_ops.py), random
numbers are drawn in blocks, and the views stay uint8 in channels-last order until they are on the device, where
`normalize` converts them to float.
"""

import math
from dataclasses import dataclass, replace
from itertools import chain, permutations, repeat
from typing import NamedTuple

import cv2
import numpy as np

from dino_ssl.data.dataset import Reduction
from dino_ssl.data.transforms import pixel_ops as ops
from dino_ssl.data.transforms.base import RandomSource, check_interval, crop_box, jpeg_scale, uniform
from dino_ssl.errors import UserError, check_range
from dino_ssl.preprocessing import resize

JITTER_OPS = (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation, ops.adjust_hue)
JITTER_ORDERS = tuple(permutations(range(len(JITTER_OPS))))


class ViewParams(NamedTuple):
    """All random parameters of one view."""

    top: int
    left: int
    height: int
    width: int
    """Crop box in pixels of the image."""
    flip: bool
    factors: tuple[float, float, float, float]
    """Factors of brightness, contrast and saturation, and the hue shift; used if listed in `order`."""
    order: tuple[int, ...]
    """Indices into JITTER_OPS in the order of application; empty without color jitter."""
    gray: bool
    sigma: float
    """Standard deviation of the blur in pixels; 0 for none."""
    solarize: bool


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Multi-crop augmentation: two global and `local` local views with color jitter, blur and solarization."""

    global_size: int = 224
    """Side of the global views, in pixels."""
    local_size: int = 96
    """Side of the local views, in pixels."""
    local: int = 8
    """Number of local views; 0 trains on the two global views alone."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest share of the image's area covered by a global view."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest share of the image's area covered by a local view."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop before it is resized to a square."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of color jitter."""
    brightness: float = 0.4
    """Color jitter: the brightness factor is drawn from 1 +- this value."""
    contrast: float = 0.4
    """Color jitter: the contrast factor is drawn from 1 +- this value."""
    saturation: float = 0.2
    """Color jitter: the saturation factor is drawn from 1 +- this value."""
    hue: float = 0.1
    """Color jitter: the hue is shifted by up to +- this fraction of the color circle; at most 0.5."""
    gray: float = 0.2
    """Probability of conversion to grayscale."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur of the first global view, the second global view, and each local view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarization of the first global view, the second global view, and each local view."""
    solarize_threshold: int = 128
    """Solarization inverts values greater than or equal to this one."""

    def __post_init__(self) -> None:
        check_range(self, "global_size", "local_size", prefix="views.", least=1)
        check_range(self, "local", "brightness", "contrast", "saturation", prefix="views.", least=0)
        check_range(self, "hue", prefix="views.", least=0, most=0.5)
        check_range(self, "flip", "jitter", "gray", "blur", "solarize", prefix="views.", least=0, most=1)
        check_range(self, "solarize_threshold", prefix="views.", least=0, most=256)
        check_interval(self, "global_scale", "local_scale", most=1)
        check_interval(self, "ratio", "blur_sigma", most=math.inf)
        for name in ("blur", "solarize"):
            if len(getattr(self, name)) != 3:
                raise UserError(
                    f"`views.{name}`: expected three probabilities (first global view, second global view, local "
                    f"views), got {getattr(self, name)}."
                )

    @property
    def repeats(self) -> int:
        """Number of times that each image of an epoch is repeated: once."""
        return 1

    @property
    def size(self) -> int:
        """Image size in pixels for which the network is trained: the global views'."""
        return self.global_size

    def with_size(self, size: int) -> "MultiCrop":
        """Return a copy with global views of `size` pixels."""
        return replace(self, global_size=size)

    @property
    def view_shapes(self) -> list[tuple[int, int]]:
        """(number of views, side in pixels) of the global views, then of the local ones if there are any."""
        return [(n, side) for n, side in ((2, self.global_size), (self.local, self.local_size)) if n]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return two global views [S, S, 3], then the local views [s, s, 3], of a uint8 RGB image [H, W, 3]."""
        sides = [side for number, side in self.view_shapes for _ in range(number)]
        params = self.sample_params(image.shape[0], image.shape[1], rng)
        return [self._view(image, view, side) for view, side in zip(params, sides, strict=True)]

    def decode_scale(self, height: int, width: int) -> Reduction:
        """Return the factor by which an image of this size can be downscaled while its JPEG is decoded."""
        crops = (self.global_scale[0], self.global_size), (self.local_scale[0], self.local_size)
        return jpeg_scale(height, width, self.ratio, *crops[: len(self.view_shapes)])

    def sample_params(self, height: int, width: int, rng: np.random.Generator) -> list[ViewParams]:
        """Return the random parameters of every view of an image of this size, in the order of the views."""
        scales = [self.global_scale] * 2 + [self.local_scale] * self.local
        buffered = BufferedRandom(rng)
        return [self._sample_view(height, width, min(n, 2), scale, buffered) for n, scale in enumerate(scales)]

    def _sample_view(
        self, height: int, width: int, kind: int, scale: tuple[float, float], rng: RandomSource
    ) -> ViewParams:
        box = crop_box(height, width, scale, self.ratio, rng)
        flip = rng.random() < self.flip
        jitter = rng.random() < self.jitter
        factors, order = self._sample_jitter(rng) if jitter else ((1.0, 1.0, 1.0, 0.0), ())
        gray = rng.random() < self.gray
        sigma = uniform(rng, *self.blur_sigma) if rng.random() < self.blur[kind] else 0.0
        return ViewParams(*box, flip, factors, order, gray, sigma, solarize=rng.random() < self.solarize[kind])

    def _sample_jitter(self, rng: RandomSource) -> tuple[tuple[float, float, float, float], tuple[int, ...]]:
        """Return the factors of the four operations in JITTER_OPS, and the order in which they are applied."""
        brightness = uniform(rng, max(0.0, 1 - self.brightness), 1 + self.brightness)
        contrast = uniform(rng, max(0.0, 1 - self.contrast), 1 + self.contrast)
        saturation = uniform(rng, max(0.0, 1 - self.saturation), 1 + self.saturation)
        hue = uniform(rng, -self.hue, self.hue)
        return (brightness, contrast, saturation, hue), JITTER_ORDERS[int(len(JITTER_ORDERS) * rng.random())]

    def _view(self, image: np.ndarray, params: ViewParams, size: int) -> np.ndarray:
        view = image[params.top : params.top + params.height, params.left : params.left + params.width]
        view = resize(view, size, size)
        if params.flip:
            view = cv2.flip(view, 1)
        for op in params.order:
            view = JITTER_OPS[op](view, params.factors[op])
        if params.gray:
            view = ops.gray(view)
        if params.sigma:
            view = ops.blur(view, params.sigma)
        if params.solarize:
            view = ops.solarize(view, self.solarize_threshold)
        return view


class BufferedRandom:
    """Random numbers drawn in blocks: one call of numpy costs as much as more than ten numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.random = chain.from_iterable(rng.random(128).tolist() for _ in repeat(None)).__next__
