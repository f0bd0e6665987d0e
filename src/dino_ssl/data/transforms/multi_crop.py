"""Sec. 3.1, multi-crop: the set V of views of a picture, drawn as the authors draw them, on uint8.

Every operation is the authors' (torchvision's on Pillow pictures) in distribution, and most are the same to
the last bit or to one grey level; tests/equations/test_views.py states by how much each differs. What makes
it fast: the picture is decoded once, a crop is a slice, each change is one or two calls on bytes (pixels.py), chance
is drawn in one go, and the views stay uint8, in the order of bytes that networks take (channels last), until they are
on the device, where `normalize` makes them float.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, permutations, repeat
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.dataset import Reduction
from dino_ssl.data.transforms.pixel_ops import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    gray,
    resize,
    solarize,
)
from dino_ssl.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's mean and standard deviation of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)

CHANGES = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
ORDERS = tuple(permutations(range(len(CHANGES))))
"""The colour changes of a view, and the orders in which they may come."""


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
    def view_shapes(self) -> list[tuple[int, int]]:
        """(number, side) of the views of each resolution, in the order in which the call gives them."""
        ...

    def decode_scale(self, height: int, width: int) -> Reduction:
        """How many times smaller a picture of this size may be decoded, since all views are much smaller still."""
        ...

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]: ...


class RandomSource(Protocol):
    """A source of numbers from 0 to below 1."""

    def random(self) -> float: ...


class ViewParams(NamedTuple):
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
            check_fields(all(0 <= p <= 1 for p in odds), name, value, "probabilities from 0 to 1")
        for name in ("blur", "solarize"):
            value = getattr(self, name)
            check_fields(len(value) == 3, name, value, "three: first global view, second, local ones")
        for name in ("global_size", "local_size"):
            check_fields(getattr(self, name) >= 1, name, getattr(self, name), "a side of at least 1 pixel")
        check_fields(self.local >= 0, "local", self.local, "a number of views, 0 or more")
        for name, top in (
            ("global_scale", 1),
            ("local_scale", 1),
            ("ratio", math.inf),
            ("blur_sigma", math.inf),
        ):
            low, high = getattr(self, name)
            what = f"a lower and an upper bound, above 0{' and up to 1' if top == 1 else ''}"
            check_fields(0 < low <= high <= top, name, (low, high), what)
        for name, top in (
            ("brightness", math.inf),
            ("contrast", math.inf),
            ("saturation", math.inf),
            ("hue", 0.5),
        ):
            check_fields(0 <= getattr(self, name) <= top, name, getattr(self, name), f"a strength from 0 to {top}")
        check_fields(0 <= self.solarize_threshold <= 256, "solarize_threshold", self.solarize_threshold, "0 to 256")

    @property
    def repeats(self) -> int:
        """A picture comes once in an epoch."""
        return 1

    @property
    def size(self) -> int:
        """Side in pixels at which the network is meant to be used: the global views'."""
        return self.global_size

    @property
    def view_shapes(self) -> list[tuple[int, int]]:
        """(number, side) of the views of each resolution, in their order."""
        return [(n, side) for n, side in ((2, self.global_size), (self.local, self.local_size)) if n]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """uint8 RGB [H, W, 3] -> 2 global views [S, S, 3], then the local ones [s, s, 3]; all draws come
        from rng."""
        sides = [side for number, side in self.view_shapes for _ in range(number)]
        draws = self.draw(image.shape[0], image.shape[1], rng)
        return [self._view(image, draw, side) for draw, side in zip(draws, sides, strict=True)]

    def decode_scale(self, height: int, width: int) -> Reduction:
        """How many times smaller a picture may be decoded: its least crops stay SPARE times larger than their views."""
        least = (self.global_scale[0], self.global_size), (self.local_scale[0], self.local_size)
        return reduction(height, width, self.ratio, *least[: len(self.view_shapes)])

    def draw(self, height: int, width: int, rng: np.random.Generator) -> list[ViewParams]:
        """All that chance decides of the views of a picture of this size, which is not looked at; in their order."""
        scales = [self.global_scale] * 2 + [self.local_scale] * self.local
        ahead = BufferedRandom(rng)
        return [self._draw(height, width, min(n, 2), scale, ahead) for n, scale in enumerate(scales)]

    def _draw(self, height: int, width: int, kind: int, scale: tuple[float, float], rng: RandomSource) -> ViewParams:
        box = crop_box(height, width, scale, self.ratio, rng)
        flip = rng.random() < self.flip
        jitter = rng.random() < self.jitter
        factors, order = self._jitter(rng) if jitter else ((1.0, 1.0, 1.0, 0.0), ())
        gray = rng.random() < self.gray
        sigma = _uniform(rng, *self.blur_sigma) if rng.random() < self.blur[kind] else 0.0
        return ViewParams(*box, flip, factors, order, gray, sigma, solarize=rng.random() < self.solarize[kind])

    def _jitter(self, rng: RandomSource) -> tuple[tuple[float, float, float, float], tuple[int, ...]]:
        """The factor of each of the four colour changes, and their order."""
        brightness = _uniform(rng, max(0.0, 1 - self.brightness), 1 + self.brightness)
        contrast = _uniform(rng, max(0.0, 1 - self.contrast), 1 + self.contrast)
        saturation = _uniform(rng, max(0.0, 1 - self.saturation), 1 + self.saturation)
        hue = _uniform(rng, -self.hue, self.hue)
        return (brightness, contrast, saturation, hue), ORDERS[int(len(ORDERS) * rng.random())]

    def _view(self, image: np.ndarray, draw: ViewParams, size: int) -> np.ndarray:
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


def check_fields(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"views.{field}: expected {expected}, got {value}")


class BufferedRandom:
    """rng's numbers, drawn many at a time: a call of numpy costs more than ten numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.random = chain.from_iterable(rng.random(128).tolist() for _ in repeat(None)).__next__


def _uniform(rng: RandomSource, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: RandomSource
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
            return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def planar(views: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write uint8 [h, w, 3] views into out [n, 3, h, w]."""
    for view, planes in zip(views, out, strict=True):
        for channel, plane in enumerate(cv2.split(view)):
            planes[channel] = plane


SPARE = 3
"""A crop of a JPEG that was decoded smaller is still so many times larger than its view, which is the same to a third
of a grey level then, in the mean."""


def reduction(height: int, width: int, ratio: tuple[float, float], *kinds: tuple[float, int]) -> Reduction:
    """By how much a picture may be reduced. kinds: the least part of its area that a crop covers; the view's side."""
    narrow = min(ratio[0], 1 / ratio[1])
    spare = min(min(math.sqrt(scale * height * width * narrow), height, width) / side for scale, side in kinds) / SPARE
    return 8 if spare >= 8 else 4 if spare >= 4 else 2 if spare >= 2 else 1


def normalize(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, each channel less ImageNet's mean and over its deviation; on any
    device, in the order of bytes in which they come."""
    pixels = images.movedim(-3, -1)
    if pixels.is_contiguous():  # channels last: by rows of 3 W numbers, where a pixel alone is a loop of 3
        scale, shift = _affine(images.device, images.shape[-1])
        rows = pixels.flatten(-2).to(torch.float32)
        return torch.addcmul(shift, rows, scale, out=rows).view(pixels.shape).movedim(-1, -3)
    scale, shift = (values[:, None, None] for values in _affine(images.device, 1))
    return images.to(torch.float32).mul_(scale).add_(shift)


@lru_cache(64)
def _affine(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """[3 width] each: what a row of grey levels 0 .. 255 is multiplied by, and what is added. Kept on the device: to
    send them each time would be to wait for it."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    scale, shift = 1 / (255 * std), -mean / std
    return scale.float().repeat(width).to(device), shift.float().repeat(width).to(device)


def eval_transform(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> uint8 [size, size, 3]: the shorter side to size * 256 / 224, then the center."""
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
    return image[top : top + size, left : left + size]
