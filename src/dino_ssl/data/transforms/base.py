"""Interface of training augmentations, and helpers that they share: random crops and the JPEG decode scale."""

import math
from typing import Any, Protocol

import cv2
import numpy as np

from dino_ssl.data.dataset import Reduction
from dino_ssl.errors import UserError, check_range
from dino_ssl.preprocessing import resize


class Views(Protocol):
    """Settings of an augmentation, callable on an image.

    The loader reads the properties, decodes the image and calls the augmentation with its own random generator.
    """

    @property
    def repeats(self) -> int:
        """Number of times that each image of an epoch is repeated in a row, each time with another augmentation."""
        ...

    @property
    def size(self) -> int:
        """Image size in pixels for which the network is trained; evaluations use center crops of this size."""
        ...

    @property
    def view_shapes(self) -> list[tuple[int, int]]:
        """(number of views, side in pixels) per resolution, in the order of the returned views."""
        ...

    def decode_scale(self, height: int, width: int) -> Reduction:
        """Return the factor by which an image of this size can be downscaled while its JPEG is decoded."""
        ...

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the views, each uint8 [S, S, 3], of a uint8 RGB image [H, W, 3]."""
        ...


def check_interval(settings: Any, *names: str, most: float) -> None:
    """Raise UserError unless these fields of `views` are (lower, upper) bounds with 0 < lower <= upper <= `most`."""
    check_range(settings, *names, prefix="views.", above=0, most=most)
    for name in names:
        low, high = getattr(settings, name)
        if low > high:
            raise UserError(f"`views.{name}`: expected the lower bound first, got {low} and {high}.")


class RandomSource(Protocol):
    """Source of uniform random numbers in [0, 1)."""

    def random(self) -> float:
        """Return the next number."""
        ...


def uniform(rng: RandomSource, low: float, high: float) -> float:
    """Return a random number from the uniform distribution on [low, high)."""
    return low + (high - low) * rng.random()


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: RandomSource
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random crop, sampled as by torchvision's RandomResizedCrop.

    The area is uniform in `scale` times the image's, the log of width / height uniform in `ratio`. After ten boxes
    that do not fit, the largest centered box within `ratio` is returned.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * uniform(rng, *scale)
        aspect = math.exp(uniform(rng, low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # defaults of torchvision's RandomResizedCrop


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Augment for linear classifiers (Appendix F.2): uint8 [H, W, 3] -> [size, size, 3].

    A crop of 8 to 100 % of the area, flipped with probability 0.5. Bilinear and antialiased, as torchvision resizes by
    default; the evaluation transform is bicubic.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], SCALE, RATIO, rng)
    crop = resize(image[top : top + height, left : left + width], size, size, "bilinear")
    return cv2.flip(crop, 1) if rng.random() < 0.5 else crop


MARGIN = 3
"""The smallest crop of a downscaled image is at least this many times larger than its view. The views then differ by
a third of a gray level on average."""


def jpeg_scale(height: int, width: int, ratio: tuple[float, float], *crops: tuple[float, int]) -> Reduction:
    """Return the factor by which an image of this size can be downscaled.

    Args:
        height: Image height in pixels.
        width: Image width in pixels.
        ratio: Smallest and largest width / height of a crop.
        crops: (smallest share of the image's area, side of the view in pixels) of each kind of crop.
    """
    narrow = min(ratio[0], 1 / ratio[1])
    least = min(min(math.sqrt(scale * height * width * narrow), height, width) / side for scale, side in crops) / MARGIN
    return 8 if least >= 8 else 4 if least >= 4 else 2 if least >= 2 else 1
