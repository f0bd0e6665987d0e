"""Training augmentation of linear classifiers (Appendix F.2): random resized crop and horizontal flip."""

import cv2
import numpy as np

from dino_ssl.data.transforms.base import crop_box
from dino_ssl.data.transforms.pixel_ops import resize

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # defaults of torchvision's RandomResizedCrop


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random crop of 8 to 100 % of the area, flipped with probability 0.5: uint8 [H, W, 3] -> [size, size, 3].

    Bilinear and antialiased, as torchvision resizes by default; the evaluation transform is bicubic.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], SCALE, RATIO, rng)
    crop = resize(image[top : top + height, left : left + width], size, size, "bilinear")
    return cv2.flip(crop, 1) if rng.random() < 0.5 else crop
