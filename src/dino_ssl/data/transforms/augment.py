"""Supervised augmentation of DeiT (Touvron et al., 2021): random resized crop, flip, RandAugment, random erasing.

RandAugment (Cubuk et al., 2020) and random erasing (Zhong et al., 2020) are timm's, as in DeiT's own training.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_ssl.data.dataset import Reduction
from dino_ssl.data.transforms.base import check_interval, crop_box, jpeg_scale
from dino_ssl.data.transforms.eval import MEAN, denormalize, normalize
from dino_ssl.data.transforms.pixel_ops import resize
from dino_ssl.errors import check_range


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Supervised augmentation with DeiT's values: one view per image."""

    repeats: int = 1
    """Times that each image is repeated in a row, each time with another augmentation (DeiT: 3). The number of steps
    per epoch stays the same, so an epoch covers fewer images."""
    size: int = 224
    """Side of the view, in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area covered by the crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop before it is resized to a square."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    operations: int = 2
    """RandAugment: number of operations per image, each applied with probability 0.5; 0 for none."""
    magnitude: float = 9.0
    """RandAugment: magnitude of the operations, 0 to 10."""
    magnitude_std: float = 0.5
    """RandAugment: standard deviation of the magnitude of each operation."""
    erase: float = 0.25
    """Probability of random erasing: a rectangle is replaced by noise."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Smallest and largest share of the view that is erased."""

    def __post_init__(self) -> None:
        check_range(self, "size", "repeats", prefix="views.", least=1)
        check_range(self, "operations", "magnitude_std", prefix="views.", least=0)
        check_range(self, "magnitude", prefix="views.", least=0, most=10)
        check_range(self, "flip", "erase", prefix="views.", least=0, most=1)
        check_interval(self, "scale", "erase_area", most=1)
        check_interval(self, "ratio", most=math.inf)

    def with_size(self, size: int) -> "Augment":
        """Return a copy for images of `size` pixels."""
        return replace(self, size=size)

    @property
    def view_shapes(self) -> list[tuple[int, int]]:
        """(number of views, side in pixels): a single view."""
        return [(1, self.size)]

    def decode_scale(self, height: int, width: int) -> Reduction:
        """Return the factor by which an image of this size can be downscaled while its JPEG is decoded."""
        return jpeg_scale(height, width, self.ratio, (self.scale[0], self.size))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return one view [S, S, 3] of a uint8 RGB image [H, W, 3]."""
        top, left, height, width = crop_box(image.shape[0], image.shape[1], self.scale, self.ratio, rng)
        view = resize(image[top : top + height, left : left + width], self.size, self.size)
        if rng.random() < self.flip:
            view = cv2.flip(view, 1)
        with _global_seed(int(rng.integers(2**32))):
            if self.operations:
                augment = _rand_augment(self.operations, self.magnitude, self.magnitude_std)
                view = np.asarray(augment(Image.fromarray(view)))
            if rng.random() < self.erase:
                erase = _random_erasing(*self.erase_area)
                view = denormalize(erase(normalize(torch.tensor(view).movedim(-1, 0)))).movedim(0, -1).numpy()
        return [view]


@lru_cache
def _rand_augment(operations: int, magnitude: float, magnitude_std: float) -> Callable[[Image.Image], Image.Image]:
    """Return timm's `rand-m{magnitude}-n{operations}-mstd{magnitude_std}-inc1`, whose name takes integers only."""
    from timm.data.auto_augment import RandAugment, rand_augment_choices, rand_augment_ops

    mean = tuple(min(255, round(255 * value)) for value in MEAN)
    hparams = {"magnitude_std": magnitude_std, "magnitude_max": 9.99, "img_mean": mean}  # 10: posterize to 0 bits
    ops = rand_augment_ops(magnitude, hparams=hparams, transforms=rand_augment_choices("", increasing=True))
    return RandAugment(ops, operations)


@lru_cache
def _random_erasing(low: float, high: float) -> Callable[[Tensor], Tensor]:
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(probability=1, min_area=low, max_area=high, mode="pixel", device="cpu")


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of random, numpy and torch, which timm uses; restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
