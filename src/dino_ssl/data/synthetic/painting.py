"""Rendering of synthetic scenes: closed curves that are filled with two-color patterns, like paper cut-outs.

Positions and lengths are fractions of the image side, with (0, 0) in the center, so that one description of a scene
gives the same image at any size.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

Array = np.ndarray
_TURN = 2 * math.pi
_ANGLES = np.linspace(0, _TURN, 256, endpoint=False)
_DIRECTIONS = np.stack([np.cos(_ANGLES), -np.sin(_ANGLES)], 1)  # y points down
_SUPERSAMPLING = 4  # of outlines
VARIANTS = 3  # outlines per kind, with other numbers of petals, teeth, ...


def _fraction(x: Array) -> Array:
    return x - np.floor(x)


def _triangle_wave(x: Array) -> Array:
    """Return a triangle wave of period 1 from 0 (half-integers) to 1 (integers)."""
    return np.abs(2 * _fraction(x) - 1)


def _cell(u: Array, v: Array) -> tuple[Array, Array]:
    """Return positions from -0.5 to 0.5 in the cells of a grid in which every second row is shifted by a half."""
    return _fraction(u + 0.5 * (np.floor(v) % 2)) - 0.5, _fraction(v) - 0.5


def _cross(t: Array, n: int) -> Array:
    long, short, width = np.abs(np.cos(t)) + 1e-9, np.abs(np.sin(t)) + 1e-9, 0.3 + 0.05 * n
    return np.maximum(np.minimum(1 / long, width / short), np.minimum(width / long, 1 / short))


def _bricks(u: Array, v: Array) -> Array:
    x, y = _cell(0.6 * u, v)
    return 8 * np.minimum(0.653 - np.abs(x) / 0.6, 0.32 - np.abs(y))


def _scales(u: Array, v: Array) -> Array:
    x, y = _cell(0.8 * u, 0.8 * v)
    return np.sin(9.4 * np.hypot(x, y + 0.5) - 2.75)


def _triangles(u: Array, v: Array) -> Array:
    a, b = 0.6 * u, -0.3 * u + 0.52 * v
    return 4 * np.sin(_TURN * a) * np.sin(_TURN * b) * np.sin(_TURN * (a + b))


OUTLINES: dict[str, Callable[[Array, int], Array]] = {
    "star": lambda t, n: 0.42 + 0.58 * _triangle_wave(t / _TURN * (5 + n)),
    "flower": lambda t, n: 0.55 + 0.45 * np.abs(np.cos(t * (5 + n) / 2)),
    "gear": lambda t, n: 0.82 + 0.18 * np.clip(3 * np.cos(t * (8 + n)), -1, 1),
    "saw": lambda t, n: 0.65 + 0.35 * _fraction(t / _TURN * (6 + n)),
    "clover": lambda t, n: 0.2 + 0.8 * np.abs(np.cos(t * (3 + n) / 2)),
    "heart": lambda t, n: 2 - 2 * np.sin(t) + np.sin(t) * np.sqrt(np.abs(np.cos(t))) / (np.sin(t) + 1.3 + 0.1 * n),
    "drop": lambda t, n: 0.4 + 0.6 * ((1 + np.cos(t)) / 2) ** (3 + n),
    "shell": lambda t, n: 0.35 + 0.05 * n + 0.6 * t / _TURN,
    "cross": _cross,
    "peanut": lambda t, n: 0.35 + 0.05 * n + 0.6 * np.cos(t) ** 2,
}
"""Outlines of the classes in polar coordinates: radius at angle t, for a variant n from 0 to `VARIANTS` - 1."""
KINDS = tuple(OUTLINES)
PATTERNS: tuple[Callable[[Array, Array], Array], ...] = (
    lambda u, v: np.sin(_TURN * u),  # stripes
    lambda u, v: 5 * (0.4 - np.hypot(*_cell(u, v))),  # dots
    lambda u, v: 8 * (0.124 - np.abs(np.hypot(_fraction(0.8 * u) - 0.5, _fraction(0.8 * v) - 0.5) - 0.32)),  # rings
    lambda u, v: np.sin(_TURN * (u + 0.7 * _triangle_wave(0.6 * v))),  # zigzag
    lambda u, v: 2 * np.sin(4 * u) * np.sin(4 * v),  # checks
    lambda u, v: np.sin(4 * u + 1.7 * np.sin(3 * v)) + np.sin(4 * v + 1.7 * np.sin(2.6 * u)),  # blobs
    _bricks,
    _triangles,
    lambda u, v: np.sin(_TURN * np.where((np.floor(u / 2) + np.floor(v / 2)) % 2, u, v)),  # weave
    _scales,
)
"""Patterns of the classes: functions of the position in periods, each positive on half of the plane."""


class Texture(NamedTuple):
    """Two-color pattern.

    Attributes:
        pattern: See `PATTERNS`.
        frequency: Periods per unit of the size of a layer.
        angle: Direction in radians.
        shift: Phase in periods.
        colors: [2, 3], CIELAB.
        light: Relative change of brightness to the right and down, per unit of the size of a layer.
    """

    pattern: Callable[[Array, Array], Array]
    frequency: float
    angle: float
    shift: tuple[float, float]
    colors: Array
    light: tuple[float, float]


class Pose(NamedTuple):
    """Center, rotation in radians, and size (square root of the covered area)."""

    x: float
    y: float
    turn: float
    size: float


class Layer(NamedTuple):
    """Outline [n, 2] of area 1, its texture and pose, and its value in the mask (0: background)."""

    outline: Array
    texture: Texture
    pose: Pose
    label: int = 0


def object_outline(kind: str, variant: int) -> Array:
    """Return the outline of a kind, [n, 2], of area 1 and with its center of mass at (0, 0)."""
    radius = OUTLINES[kind](_ANGLES, variant)
    radius /= math.sqrt(math.pi * (radius**2).mean())
    return radius[:, None] * _DIRECTIONS - _TURN / 3 * (radius[:, None] ** 3 * _DIRECTIONS).mean(0)


def bar_outline(slim: float) -> Array:
    """Return the outline of a rounded bar with this ratio of width to length, [n, 2], of area 1."""
    rounded = np.sign(_DIRECTIONS) * np.sqrt(np.abs(_DIRECTIONS))
    return rounded * [(3.708 * slim) ** -0.5, (slim / 3.708) ** 0.5]


def render(size: int, layers: Sequence[Layer]) -> tuple[Array, Array]:
    """Return (image [s, s, 3] RGB, mask [s, s]), uint8, of layers with shadows from back to front."""
    image, mask = np.zeros((3, size, size), np.float32), np.zeros((size, size), np.uint8)
    shadow = max(round(0.012 * size), 1)  # offset to the lower right in pixels
    for outline, texture, pose, label in layers:
        c, s = math.cos(pose.turn) * pose.size, math.sin(pose.turn) * pose.size
        points = (outline @ [[c, s], [-s, c]] + [pose.x + 0.5, pose.y + 0.5]) * size
        left, top = np.clip(np.floor(points.min(0)), 0, size).astype(int).tolist()
        right, bottom = np.clip(np.ceil(points.max(0)) + shadow, 0, size).astype(int).tolist()
        if left >= right or top >= bottom:
            continue
        alpha = _coverage(points - [left, top], bottom - top, right - left)
        x = (np.arange(left, right, dtype=np.float32) + 0.5) / size - 0.5
        y = (np.arange(top, bottom, dtype=np.float32) + 0.5) / size - 0.5
        color = _paint(texture, pose.turn, (x[None] - pose.x) / pose.size, (y[:, None] - pose.y) / pose.size)
        part = image[:, top:bottom, left:right]
        part[:, shadow:, shadow:] *= 1 - 0.35 * alpha[:-shadow, :-shadow]
        part += (color - part) * alpha
        mask[top:bottom, left:right][alpha > 0.5] = label
    return np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy(), mask


def _coverage(points: Array, height: int, width: int) -> Array:
    """Return the share of each pixel of a window that is inside the outline, [h, w]."""
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    cv2.fillPoly(fine, [np.rint(points * _SUPERSAMPLING - 0.5).astype(np.int32)], (255,))
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _paint(texture: Texture, turn: float, x: Array, y: Array) -> Array:
    """Return colors [3, h, w] from 0 to 255 at positions relative to the center of a layer."""
    c, s = (texture.frequency * f(turn + texture.angle) for f in (math.cos, math.sin))
    wave = texture.pattern(c * x + s * y + texture.shift[0], c * y - s * x + texture.shift[1])
    first, second = 255 * cv2.cvtColor(texture.colors[None].astype(np.float32), cv2.COLOR_LAB2RGB)[0, :, :, None, None]
    light = 1 + texture.light[0] * x + texture.light[1] * y
    return (first + np.clip(0.5 + 1.2 * wave, 0, 1) * (second - first)) * light
