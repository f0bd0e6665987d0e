"""From an image to the input of a network: RGB, resize, center crop, normalization."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino_ssl.errors import UserError

RGB = tuple[float, float, float]
Interpolation = Literal["bicubic", "bilinear"]

MEAN: RGB = (0.485, 0.456, 0.406)  # of ImageNet's RGB values in [0, 1]
STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Evaluation transform of a network (`backbone.transform`): resize, center crop, normalization.

    Call it with one image: a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], of one channel as well. It
    returns the input that `embed` computes, float32 [3, size, size].
    """

    size: int = 224
    """Side of the center crop in pixels."""
    crop: float = 0.875
    """`size` divided by the shorter side of the resized image; 224 of 256 pixels in the paper."""
    mean: RGB = MEAN
    """Mean of red, green and blue in [0, 1], which is subtracted."""
    std: RGB = STD
    """Standard deviation of red, green and blue, by which the difference is divided."""
    interpolation: Interpolation = "bicubic"
    """Interpolation of the resize, antialiased."""
    channels: Literal["RGB"] = "RGB"
    """Order of the channels. Files with another order are refused."""
    bit_depth: int | None = None
    """Bits of the values in image files with 16 bits per value, as in training; None: estimated for each dataset."""

    def __call__(self, image: Any) -> Tensor:
        """Return the network's input. Raise UserError if `image` is none of the accepted types."""
        crop = np.ascontiguousarray(self.center_crop(to_rgb(image)))  # layout, and so rounding, of a batch
        return self.normalize(torch.from_numpy(crop).movedim(-1, -3))

    def center_crop(self, image: np.ndarray) -> np.ndarray:
        """Resize the shorter side to size / crop and crop the center: uint8 RGB [H, W, 3] -> [size, size, 3]."""
        height, width = image.shape[:2]
        short = min(height, width)
        if max(height, width) > 4 * short:  # only the center is used, and a resized panorama could take gigabytes
            top, left = max(0, (height - 4 * short) // 2), max(0, (width - 4 * short) // 2)
            image = image[top : top + 4 * short, left : left + 4 * short]
            height, width = image.shape[:2]
        side = round(self.size / self.crop)
        height, width = (int(side * extent / short) for extent in (height, width))
        image = resize(image, height, width, self.interpolation)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return image[top : top + self.size, left : left + self.size]

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation: uint8 [..., 3, H, W] -> float32."""
        return normalize(images, self.mean, self.std)


def normalize(images: Tensor, mean: RGB = MEAN, std: RGB = STD) -> Tensor:
    """Subtract the mean (default: ImageNet's) and divide by the standard deviation: uint8 [..., 3, H, W] -> float32.

    Runs on any device and keeps the memory format of the input.
    """
    pixels = images.movedim(-3, -1)
    if pixels.is_contiguous():  # channels last: rows of 3 W values, because a loop over 3 channels is slow
        scale, shift = _affine(images.device, images.shape[-1], mean, std)
        rows = pixels.flatten(-2).to(torch.float32)
        return torch.addcmul(shift, rows, scale, out=rows).view(pixels.shape).movedim(-1, -3)
    scale, shift = (values[:, None, None] for values in _affine(images.device, 1, mean, std))
    return images.to(torch.float32).mul_(scale).add_(shift)


def denormalize(images: Tensor) -> Tensor:
    """Invert `normalize` with ImageNet's values: float [..., 3, H, W] -> uint8, rounded and clipped to 0..255."""
    mean, std = (torch.tensor(values)[:, None, None].to(images.device) for values in (MEAN, STD))
    return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)


@lru_cache(64)
def _affine(device: torch.device, width: int, mean: RGB, std: RGB) -> tuple[Tensor, Tensor]:
    """Return scale and shift, each [3 width], cached on the device, since each transfer would synchronize."""
    center, spread = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    scale, shift = 1 / (255 * spread), -center / spread
    return scale.float().repeat(width).to(device), shift.float().repeat(width).to(device)


def resize(image: np.ndarray, height: int, width: int, mode: Interpolation = "bicubic") -> np.ndarray:
    """Resize uint8 [H, W, 3], bicubic (a = -0.5) or bilinear, antialiased; equals Pillow to one gray level.

    PyTorch's uint8 kernel is Pillow's algorithm in AVX2 on channels-last bytes: 4 times as fast as Pillow, and faster
    than OpenCV's INTER_AREA on strong reductions. OpenCV's cubic (a = -0.75) has no antialiasing.
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return np.ascontiguousarray(image)
    if not (image.flags.c_contiguous and image.flags.writeable):  # torch warns about read-only arrays
        image = image.copy()
    # Explicit channels-last strides: torch does not recognize numpy's strides of an axis of length 1 as channels last,
    # and the result would be planar.
    pixels = torch.from_numpy(image).as_strided((1, 3, h, w), (3 * h * w, 1, 3 * w, 3))
    pixels = F.interpolate(pixels, (height, width), mode=mode, antialias=True, align_corners=False)
    return pixels.numpy()[0].transpose(1, 2, 0)


def to_rgb(image: Any, name: str = "The image", hint: str = "") -> np.ndarray:
    """Return a PIL image, uint8 array [H, W, C] or [H, W], or uint8 tensor [C, H, W] as uint8 RGB [H, W, 3].

    C is 1 or 3. Raises UserError for anything else; name, hint: of the image and of further types, for the message.
    """
    if isinstance(image, Image.Image) and image.mode[0] not in "IF":  # of more than 8 bits, which would be clipped
        return np.array(image.convert("RGB"))
    pixels = image.movedim(0, -1).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else image
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8:
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.ndim == 3 and pixels.shape[2] in (1, 3):
            return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    shape = f" of {image.dtype} {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else ""
    shape = f" of mode {image.mode}, which has no fixed range" if isinstance(image, Image.Image) else shape
    raise UserError(
        f"{name}: expected a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]{hint}, got "
        f"{type(image).__name__}{shape}."
    )
