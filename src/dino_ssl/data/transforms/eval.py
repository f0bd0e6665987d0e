"""Evaluation transform (resize and center crop) and the normalization of every network input."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.transforms.pixel_ops import resize

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB values in [0, 1]
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation: uint8 [..., 3, H, W] -> float32.

    Runs on any device and keeps the memory format of the input.
    """
    pixels = images.movedim(-3, -1)
    if pixels.is_contiguous():  # channels last: rows of 3 W values, because a loop over 3 channels is slow
        scale, shift = _affine(images.device, images.shape[-1])
        rows = pixels.flatten(-2).to(torch.float32)
        return torch.addcmul(shift, rows, scale, out=rows).view(pixels.shape).movedim(-1, -3)
    scale, shift = (values[:, None, None] for values in _affine(images.device, 1))
    return images.to(torch.float32).mul_(scale).add_(shift)


def denormalize(images: Tensor) -> Tensor:
    """Invert `normalize`: float [..., 3, H, W] -> uint8, rounded and clipped to 0..255."""
    mean, std = (torch.tensor(values)[:, None, None].to(images.device) for values in (MEAN, STD))
    return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)


@lru_cache(64)
def _affine(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Return scale and shift, each [3 width], cached on the device, since each transfer would synchronize."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    scale, shift = 1 / (255 * std), -mean / std
    return scale.float().repeat(width).to(device), shift.float().repeat(width).to(device)


def eval_transform(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side to size * 256 / 224 and crop the center: uint8 RGB [H, W, 3] -> [size, size, 3]."""
    height, width = image.shape[:2]
    short = min(height, width)
    if max(height, width) > 4 * short:  # only the center is used, and a resized panorama could take gigabytes
        top, left = max(0, (height - 4 * short) // 2), max(0, (width - 4 * short) // 2)
        image = image[top : top + 4 * short, left : left + 4 * short]
        height, width = image.shape[:2]
    side = round(size * 256 / 224)
    height, width = (int(side * extent / short) for extent in (height, width))
    image = resize(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]
