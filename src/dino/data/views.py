"""Sec. 3.1, multi-crop: the set V of views of a picture, drawn as the authors draw them, on uint8.

Every operation is the authors' (torchvision's on Pillow pictures) in distribution, and most are the same to
the last bit or to one grey level; tests/equations/test_views.py states by how much each differs. What makes
it fast: the picture is decoded once, a crop is a slice, brightness, contrast and solarisation are table
look-ups by OpenCV, and the views stay uint8 until they are on the device, where `normalize` makes them
float.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's mean and standard deviation of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)

cv2.setNumThreads(0)  # a picture is one thread's work; the worker processes are the parallelism


class Batch(NamedTuple):
    """Views of B pictures, stacked per resolution."""

    views: tuple[Tensor, ...]
    """One [n, B, 3, H, W] per resolution, uint8 until it is on the device. Multi-crop: views[0] the 2 global views,
    views[1] the local ones, absent where there are none. Supervised: views[0] the one view."""
    labels: Tensor | None = None
    """[B] int64, -1 where a picture has none; None where the source has no labels."""

    def parts(self, size: int) -> list["Batch"]:
        """The batch in parts of at most `size` pictures, as even as they can be; 0 leaves it whole."""
        count = self.views[0].shape[1]
        if not 0 < size < count:
            return [self]
        number = math.ceil(count / size)
        views = zip(*(view.tensor_split(number, dim=1) for view in self.views), strict=True)
        labels = [None] * number if self.labels is None else self.labels.tensor_split(number)
        return [Batch(stacks, own) for stacks, own in zip(views, labels, strict=True)]


class Views(Protocol):
    """Settings of an augmentation: what the loader needs to know of it, and the call that makes a picture's views."""

    @property
    def repeats(self) -> int:
        """Times that a picture comes in a row in an epoch's order, each time augmented anew."""
        ...

    @property
    def size(self) -> int:
        """Side in pixels at which the network is meant to be used: evaluations show it center crops of that side."""
        ...

    @property
    def stacks(self) -> list[tuple[int, int]]:
        """(number, side) of the views of each resolution, in the order in which the call gives them."""
        ...

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]: ...


class Draw(NamedTuple):
    """All that chance decides of one view; what it takes to make the view of the picture."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    factors: tuple[float, float, float, float]
    """Of brightness, contrast and saturation, and the turn of the hue; they count where they are in `order`."""
    order: tuple[int, ...]
    """The colour changes by their number in CHANGES; empty without jitter."""
    gray: bool
    sigma: float
    """Of the blur; 0 without."""
    solarize: bool


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """The authors' augmentation: two global views and `local` local ones, each cropped, flipped, coloured,
    blurred."""

    global_size: int = 224
    """Side of the global views, in pixels."""
    local_size: int = 96
    """Side of the local views, in pixels."""
    local: int = 8
    """Number of local views; 0 trains on the two global ones alone."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest part of the picture's area that a global view covers."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest part of the picture's area that a local view covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop before it is resized to a square."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Colour jitter: the brightness factor is drawn from 1 +- this."""
    contrast: float = 0.4
    """Colour jitter: the contrast factor is drawn from 1 +- this."""
    saturation: float = 0.2
    """Colour jitter: the saturation factor is drawn from 1 +- this."""
    hue: float = 0.1
    """Colour jitter: the hue is turned by up to +- this part of the colour circle; at most 0.5."""
    gray: float = 0.2
    """Probability of a grey view."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of a Gaussian blur on the first global view, the second, and each local one."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability that the bright part is inverted, on the first global view, the second, and each local
    one."""
    solarize_threshold: int = 128
    """Values from here on are inverted by solarisation."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            value = getattr(self, name)
            odds = value if isinstance(value, tuple) else (value,)
            expect(all(0 <= p <= 1 for p in odds), name, value, "probabilities from 0 to 1")
        for name in ("blur", "solarize"):
            value = getattr(self, name)
            expect(len(value) == 3, name, value, "three: first global view, second, local ones")
        for name in ("global_size", "local_size"):
            expect(getattr(self, name) >= 1, name, getattr(self, name), "a side of at least 1 pixel")
        expect(self.local >= 0, "local", self.local, "a number of views, 0 or more")
        for name, top in (
            ("global_scale", 1),
            ("local_scale", 1),
            ("ratio", math.inf),
            ("blur_sigma", math.inf),
        ):
            low, high = getattr(self, name)
            what = f"a lower and an upper bound, above 0{' and up to 1' if top == 1 else ''}"
            expect(0 < low <= high <= top, name, (low, high), what)
        for name, top in (
            ("brightness", math.inf),
            ("contrast", math.inf),
            ("saturation", math.inf),
            ("hue", 0.5),
        ):
            expect(0 <= getattr(self, name) <= top, name, getattr(self, name), f"a strength from 0 to {top}")
        expect(0 <= self.solarize_threshold <= 256, "solarize_threshold", self.solarize_threshold, "0 to 256")

    @property
    def repeats(self) -> int:
        """A picture comes once in an epoch."""
        return 1

    @property
    def size(self) -> int:
        """Side in pixels at which the network is meant to be used: the global views'."""
        return self.global_size

    @property
    def stacks(self) -> list[tuple[int, int]]:
        """(number, side) of the views of each resolution, in their order."""
        return [(n, side) for n, side in ((2, self.global_size), (self.local, self.local_size)) if n]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """uint8 RGB [H, W, 3] -> 2 global views [S, S, 3], then the local ones [s, s, 3]; all draws come
        from rng."""
        sides = [side for number, side in self.stacks for _ in range(number)]
        draws = self.draw(image.shape[0], image.shape[1], rng)
        return [self._view(image, draw, side) for draw, side in zip(draws, sides, strict=True)]

    def draw(self, height: int, width: int, rng: np.random.Generator) -> list[Draw]:
        """All that chance decides of the views of a picture of this size, which is not looked at; in their order."""
        scales = [self.global_scale] * 2 + [self.local_scale] * self.local
        return [self._draw(height, width, min(n, 2), scale, rng) for n, scale in enumerate(scales)]

    def _draw(self, height: int, width: int, kind: int, scale: tuple[float, float], rng: np.random.Generator) -> Draw:
        box = crop_box(height, width, scale, self.ratio, rng)
        flip = rng.random() < self.flip
        jitter = rng.random() < self.jitter
        factors, order = self._jitter(rng) if jitter else ((1.0, 1.0, 1.0, 0.0), ())
        gray = rng.random() < self.gray
        sigma = _uniform(rng, *self.blur_sigma) if rng.random() < self.blur[kind] else 0.0
        return Draw(*box, flip, factors, order, gray, sigma, solarize=rng.random() < self.solarize[kind])

    def _jitter(self, rng: np.random.Generator) -> tuple[tuple[float, float, float, float], tuple[int, ...]]:
        """The factor of each of the four colour changes, and their order."""
        brightness = _uniform(rng, max(0.0, 1 - self.brightness), 1 + self.brightness)
        contrast = _uniform(rng, max(0.0, 1 - self.contrast), 1 + self.contrast)
        saturation = _uniform(rng, max(0.0, 1 - self.saturation), 1 + self.saturation)
        hue = _uniform(rng, -self.hue, self.hue)
        return (brightness, contrast, saturation, hue), tuple(rng.permutation(4).tolist())

    def _view(self, image: np.ndarray, draw: Draw, size: int) -> np.ndarray:
        view = image[draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]
        view = resize(view, size, size)
        if draw.flip:
            view = cv2.flip(view, 1)
        for which in draw.order:
            view = CHANGES[which](view, draw.factors[which])
        if draw.gray:
            view = gray(view)
        if draw.sigma:
            view = blur(view, draw.sigma)
        if draw.solarize:
            view = solarize(view, self.solarize_threshold)
        return view


def expect(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"views.{field}: expected {expected}, got {value}")


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, h, w) of a random crop, as torchvision's RandomResizedCrop draws it.

    Area uniform in `scale` times the picture's, log of width / height uniform in `ratio`; ten tries to fit,
    then the largest centered crop within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic (a = -0.5), antialiased: Pillow's, to one grey level.

    By PyTorch's uint8 kernel, which is Pillow's algorithm in AVX2 on channels-last bytes: 4 times faster
    than Pillow, and on strong reductions faster than OpenCV's INTER_AREA, which blurs; OpenCV's cubic (a =
    -0.75) has no antialiasing.
    """
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    pixels = (
        torch.from_numpy(np.require(image, requirements=("C", "W"))).unsqueeze(0).permute(0, 3, 1, 2)
    )  # channels last
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return np.ascontiguousarray(pixels.squeeze(0).permute(1, 2, 0).numpy())


_LEVELS = np.arange(256, dtype=np.float32)


def _blend_table(base: float, factor: float) -> np.ndarray:
    """[256] uint8: base + factor (x - base) for every grey level x, clamped and truncated as Pillow's blend
    does."""
    return np.clip(base + factor * (_LEVELS - base), 0, 255).astype(np.uint8)


def adjust_brightness(view: np.ndarray, factor: float) -> np.ndarray:
    """Away from black."""
    return cv2.LUT(view, _blend_table(0, factor))


def adjust_contrast(view: np.ndarray, factor: float) -> np.ndarray:
    """Away from the view's mean grey."""
    red, green, blue, _ = cv2.mean(view)
    return cv2.LUT(view, _blend_table(int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5), factor))


def adjust_saturation(view: np.ndarray, factor: float) -> np.ndarray:
    """Away from each pixel's own grey."""
    return cv2.addWeighted(view, factor, gray(view), 1 - factor, -0.5)  # -0.5: Pillow truncates, OpenCV rounds


def adjust_hue(view: np.ndarray, turn: float) -> np.ndarray:
    """Turn every hue by a part of the circle, which 8 bits divide into 256 steps as in Pillow's HSV."""
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


CHANGES = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
"""The colour changes of the jitter, in the order of their factors."""


def gray(view: np.ndarray) -> np.ndarray:
    """ITU-R 601 grey, in three equal channels."""
    return cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian of this standard deviation; Pillow's GaussianBlur(radius=sigma) approximates the same by
    boxes."""
    return cv2.GaussianBlur(view, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def solarize(view: np.ndarray, threshold: int) -> np.ndarray:
    """Invert every value from the threshold on."""
    return cv2.LUT(view, np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS).astype(np.uint8))


def planar(views: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write uint8 [h, w, 3] views into out [n, 3, h, w]."""
    for view, planes in zip(views, out, strict=True):
        for channel, plane in enumerate(cv2.split(view)):
            planes[channel] = plane


def normalize(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, each channel less ImageNet's mean and over its deviation; on any
    device."""
    mean, std = (images.new_tensor(v, dtype=torch.float32).mul(255)[:, None, None] for v in (MEAN, STD))
    return images.to(torch.float32).sub_(mean).mul_(1 / std)


def eval_transform(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> uint8 [3, size, size]: the shorter side to size * 256 / 224, then the center."""
    height, width = image.shape[:2]
    short = min(height, width)
    if max(height, width) > 4 * short:  # of a strip only the middle is seen: resizing it all could take gigabytes
        top, left = max(0, (height - 4 * short) // 2), max(0, (width - 4 * short) // 2)
        image = image[top : top + 4 * short, left : left + 4 * short]
        height, width = image.shape[:2]
    side = round(size * 256 / 224)
    height, width = (int(side * extent / short) for extent in (height, width))
    image = resize(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(image[top : top + size, left : left + size].transpose(2, 0, 1))
