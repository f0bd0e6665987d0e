"""How a supervised network sees a picture: DeiT's augmentation (Touvron et al., 2021) on uint8, one view of each.

A random resized crop and a flip, then RandAugment (Cubuk et al., 2020) in the variant that DeiT and those after it use
(timm's `rand-m9-mstd0.5-inc1`: fifteen operations, all of them stronger with the magnitude), then random erasing
(Zhong et al., 2020). Pillow's definitions of the operations; tests/equations/test_augment.py says by how much each
differs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from dino_ssl.data.dataset import Reduction
from dino_ssl.data.transforms.multi_crop import (
    MEAN,
    STD,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    check_fields,
    crop_box,
    reduction,
    resize,
    solarize,
)

FILL = tuple(min(255, round(255 * value)) for value in MEAN)  # what comes in from outside a picture
Operation = Callable[[np.ndarray], np.ndarray]
"""uint8 [H, W, 3] -> uint8 [H, W, 3]."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The supervised augmentation, with DeiT's values: one view of each picture, for a classifier to learn."""

    repeats: int = 1
    """Times that a picture comes in a row, augmented anew each time (DeiT: 3). An epoch is as long, and sees as many
    times fewer pictures."""
    size: int = 224
    """Side of the view, in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest part of the picture's area that is seen."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop before it is resized to a square."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    operations: int = 2
    """RandAugment: operations drawn for a picture, each of which happens every other time; 0 for none."""
    magnitude: float = 9.0
    """RandAugment: strength of the operations, 0 to 10."""
    magnitude_spread: float = 0.5
    """RandAugment: standard deviation of each operation's own strength."""
    erase: float = 0.25
    """Probability that a rectangle is erased and filled with noise."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Smallest and largest part of the view that is erased."""

    def __post_init__(self) -> None:
        check_fields(self.size >= 1, "size", self.size, "a side of at least 1 pixel")
        check_fields(self.repeats >= 1, "repeats", self.repeats, "1 or more")
        check_fields(self.operations >= 0, "operations", self.operations, "0 or more")
        check_fields(0 <= self.magnitude <= 10, "magnitude", self.magnitude, "0 to 10")
        check_fields(self.magnitude_spread >= 0, "magnitude_spread", self.magnitude_spread, "0 or more")
        for name in ("flip", "erase"):
            check_fields(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability from 0 to 1")
        for name, top in (("scale", 1), ("ratio", math.inf), ("erase_area", 1)):
            low, high = getattr(self, name)
            check_fields(0 < low <= high <= top, name, (low, high), "a lower and an upper bound, above 0")

    @property
    def view_shapes(self) -> list[tuple[int, int]]:
        """(number, side) of the views of each resolution: one alone."""
        return [(1, self.size)]

    def decode_scale(self, height: int, width: int) -> Reduction:
        """How many times smaller a picture may be decoded, since the view is much smaller still."""
        return reduction(height, width, self.ratio, (self.scale[0], self.size))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """uint8 RGB [H, W, 3] -> one view [S, S, 3]; all draws come from rng."""
        top, left, height, width = crop_box(image.shape[0], image.shape[1], self.scale, self.ratio, rng)
        view = resize(image[top : top + height, left : left + width], self.size, self.size)
        if rng.random() < self.flip:
            view = cv2.flip(view, 1)
        for operation in rand_augment(self.operations, self.magnitude, self.magnitude_spread, rng):
            view = operation(view)
        if rng.random() < self.erase:
            view = erase(view, self.erase_area, rng)
        return [view]


# -- RandAugment ------------------------------------------------------------------------------------------------------


def rand_augment(count: int, magnitude: float, spread: float, rng: np.random.Generator) -> list[Operation]:
    """The operations for one picture: `count` of the fifteen, with repetition, each kept with probability 1/2.

    Each has a strength of its own, normal around the magnitude and cut to 0 .. 10.
    """
    chosen = []
    for _ in range(count):
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        happens = rng.random() < 0.5
        level = min(10.0, max(0.0, rng.normal(magnitude, spread))) / 10
        sign = 1 if rng.random() < 0.5 else -1
        if happens:
            chosen.append(partial(operation, level=level, sign=sign))
    return chosen


def auto_contrast(view: np.ndarray) -> np.ndarray:
    """Each channel stretched to 0 .. 255; one that has a single value stays."""
    channels = []
    for channel in cv2.split(view):
        low, high = int(channel.min()), int(channel.max())
        table = np.clip((np.arange(256) - low) * (255 / max(1, high - low)), 0, 255).astype(np.uint8)
        channels.append(cv2.LUT(channel, table) if high > low else channel)
    return cv2.merge(channels)


def equalize(view: np.ndarray) -> np.ndarray:
    """Each channel's values spread so that all are about equally frequent, by Pillow's integer rule."""
    channels = []
    for channel in cv2.split(view):
        counts = np.bincount(channel.ravel(), minlength=256)
        present = counts[counts > 0]
        step = (present.sum() - present[-1]) // 255
        before = step // 2 + np.concatenate([[0], counts.cumsum()[:-1]])
        table = np.clip(before // max(1, step), 0, 255).astype(np.uint8)
        channels.append(cv2.LUT(channel, table) if step else channel)
    return cv2.merge(channels)


def invert(view: np.ndarray) -> np.ndarray:
    return 255 - view


def posterize(view: np.ndarray, bits: int) -> np.ndarray:
    """The highest `bits` bits of every value; the others 0."""
    return view & np.uint8(0xFF00 >> bits & 0xFF)


def solarize_add(view: np.ndarray, amount: int) -> np.ndarray:
    """Every value below 128 made brighter."""
    table = np.arange(256)
    return cv2.LUT(view, np.where(table < 128, np.minimum(255, table + amount), table).astype(np.uint8))


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def adjust_sharpness(view: np.ndarray, factor: float) -> np.ndarray:
    """Away from a slight blur of itself; the outermost pixels stay as they are."""
    smooth = view.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(view, -1, _SMOOTH)[1:-1, 1:-1]
    return cv2.addWeighted(view, factor, smooth, 1 - factor, -0.5)  # -0.5: Pillow truncates, OpenCV rounds


def affine(view: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """[2, 3] takes a point of the result to the point of the view that is shown there, in pixels from the corner."""
    matrix = np.array(matrix, np.float64)
    matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5  # OpenCV counts from the center of the first pixel
    height, width = view.shape[:2]
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(view, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=FILL)


def rotate(view: np.ndarray, degrees: float) -> np.ndarray:
    """Counterclockwise around the middle."""
    height, width = view.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return affine(view, np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]))


def shear_x(view: np.ndarray, slope: float) -> np.ndarray:
    return affine(view, np.array([[1, slope, 0], [0, 1, 0]]))


def shear_y(view: np.ndarray, slope: float) -> np.ndarray:
    return affine(view, np.array([[1, 0, 0], [slope, 1, 0]]))


def translate_x(view: np.ndarray, part: float) -> np.ndarray:
    """By a part of the width."""
    return affine(view, np.array([[1, 0, part * view.shape[1]], [0, 1, 0]]))


def translate_y(view: np.ndarray, part: float) -> np.ndarray:
    """By a part of the height."""
    return affine(view, np.array([[1, 0, 0], [0, 1, part * view.shape[0]]]))


def _factor(level: float, sign: int) -> float:
    """How far colour, contrast, brightness or sharpness go up or down: 1 +- 0.9 level, at least 0.1."""
    return max(0.1, 1 + sign * 0.9 * level)


OPERATIONS: tuple[Callable[..., np.ndarray], ...] = (
    lambda view, level, sign: auto_contrast(view),
    lambda view, level, sign: equalize(view),
    lambda view, level, sign: invert(view),
    lambda view, level, sign: rotate(view, sign * 30 * level),
    lambda view, level, sign: posterize(view, 4 - int(4 * level)),
    lambda view, level, sign: solarize(view, 256 - int(256 * level)),
    lambda view, level, sign: solarize_add(view, int(110 * level)),
    lambda view, level, sign: adjust_saturation(view, _factor(level, sign)),
    lambda view, level, sign: adjust_contrast(view, _factor(level, sign)),
    lambda view, level, sign: adjust_brightness(view, _factor(level, sign)),
    lambda view, level, sign: adjust_sharpness(view, _factor(level, sign)),
    lambda view, level, sign: shear_x(view, sign * 0.3 * level),
    lambda view, level, sign: shear_y(view, sign * 0.3 * level),
    lambda view, level, sign: translate_x(view, sign * 0.45 * level),
    lambda view, level, sign: translate_y(view, sign * 0.45 * level),
)
"""What a level from 0 to 1 and a sign make of a view. Each grows with the level, as DeiT's variant has it."""


# -- random erasing ---------------------------------------------------------------------------------------------------


def erase(view: np.ndarray, area: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A rectangle of noise: its area uniform in `area` of the view's, log of height / width uniform in 0.3 .. 1/0.3.

    Ten tries to fit, then none. The noise is standard normal for the network, after `normalize`, as DeiT's is, but
    for what no picture can have: it is cut to 0 .. 255.
    """
    height, width = view.shape[:2]
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = 255 * (rng.standard_normal((h, w, 3)) * STD + MEAN)
            view = view.copy()
            view[top : top + h, left : left + w] = np.clip(noise.round(), 0, 255)
            return view
    return view
