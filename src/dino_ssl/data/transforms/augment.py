"""Supervised augmentation of DeiT (Touvron et al., 2021): random resized crop, flip, RandAugment, random erasing.

The operations of RandAugment (Cubuk et al., 2020) are timm's, as in DeiT's own training; random erasing (Zhong et al.,
2020) is torchvision's.
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

from dino_ssl.data.dataset import Reduction
from dino_ssl.data.transforms.base import check_interval, crop_box, jpeg_scale
from dino_ssl.errors import check_range
from dino_ssl.preprocessing import MEAN, denormalize, resize


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
                ops = _operations(self.magnitude, self.magnitude_std)
                view = _apply(view, [ops[i] for i in rng.integers(len(ops), size=self.operations).tolist()])
            return [_erase(view, self.erase_area) if rng.random() < self.erase else view]


MAX_MAGNITUDE = 9.99
"""At 10, timm posterizes to 0 bits, which Pillow refuses."""

Operation = Callable[[Image.Image], Image.Image]


def _apply(view: np.ndarray, ops: list[Operation]) -> np.ndarray:
    image = Image.fromarray(view)
    for op in ops:
        image = op(image)
    return np.asarray(image)


@lru_cache
def _operations(magnitude: float, magnitude_std: float) -> list[Operation]:
    """Return the fifteen operations of timm's `rand-m{magnitude}-mstd{magnitude_std}-inc1`."""
    from timm.data.auto_augment import rand_augment_choices, rand_augment_ops

    mean = tuple(min(255, round(255 * value)) for value in MEAN)
    hparams = {"magnitude_std": magnitude_std, "magnitude_max": MAX_MAGNITUDE, "img_mean": mean}
    return rand_augment_ops(magnitude, hparams=hparams, transforms=rand_augment_choices("", increasing=True))


def _erase(view: np.ndarray, area: tuple[float, float]) -> np.ndarray:
    """Replace a rectangle by noise that is standard normal after `normalize`, but clipped to 0..255."""
    from torchvision.transforms import RandomErasing

    side = len(view)
    top, left, height, width, noise = RandomErasing.get_params(torch.empty(3, side, side), area, (0.3, 1 / 0.3))
    if height == width == side:  # torchvision found no rectangle that fits
        return view
    erased = view.copy()
    erased[top : top + height, left : left + width] = denormalize(noise).movedim(0, -1).numpy()
    return erased


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed the global generators of random and torch, which timm and torchvision use; restore them afterwards."""
    states = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
