"""Shapes of the synthetic classes: a silhouette and the lines inside it.

A shape is stored as a signed distance to its border (positive inside) and a map of its inner lines. A distance can be
rotated, scaled and shaded smoothly, so that one small stencil serves every pose and image size.
"""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

Array = np.ndarray
Rng = np.random.Generator

SIDE = 256  # side of a stencil in pixels, at the finest level
VARIANTS = 6  # stencils per kind, with other numbers of petals, teeth, rungs
_SUPER = 2  # supersampling factor of the rasterization


class _Sheet:
    """Canvas [-1, 1] x [-1, 1] with y up; `body` is the silhouette, `lines` the inner lines."""

    def __init__(self) -> None:
        side = SIDE * _SUPER
        self.body = np.zeros((side, side), np.uint8)
        self.lines = np.zeros((side, side), np.uint8)

    def _pixels(self, points) -> Array:
        half = SIDE * _SUPER / 2
        xy = np.asarray(points, np.float64) * [0.9 * half, -0.9 * half] + half
        return np.rint(xy).astype(np.int32)

    def _length(self, value: float) -> int:
        return max(1, round(value * 0.9 * SIDE * _SUPER / 2))

    def fill(self, points, value: int = 255) -> None:
        cv2.fillPoly(self.body, [self._pixels(points)], (value,))

    def disk(self, center, radius: float, value: int = 255) -> None:
        cv2.circle(self.body, self._pixels([center])[0].tolist(), self._length(radius), (value,), -1)

    def band(self, points, width: float, value: int = 255) -> None:
        cv2.polylines(self.body, [self._pixels(points)], False, (value,), self._length(width))

    def line(self, points, width: float = 0.05, closed: bool = False) -> None:
        cv2.polylines(self.lines, [self._pixels(points)], closed, (255,), self._length(width))

    def dot(self, center, radius: float) -> None:
        cv2.circle(self.lines, self._pixels([center])[0].tolist(), self._length(radius), (255,), -1)


def _polar(radius, angle) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).astype(np.float32)


def _around(n: int, start: float = np.pi / 2) -> Array:
    return (start + 2 * np.pi * np.arange(n) / n).astype(np.float32)


def _star(sheet: _Sheet, rng: Rng) -> None:
    n, inner = int(rng.integers(5, 8)), rng.uniform(0.42, 0.52)
    angles, radii = _around(2 * n), np.tile([1.0, inner], n)
    sheet.fill(_polar(radii, angles))
    sheet.line(_polar(0.56 * radii, angles), closed=True)
    for angle in angles[::2]:
        sheet.line([(0, 0), _polar(0.86, angle)], 0.035)


def _flower(sheet: _Sheet, rng: Rng) -> None:
    n, heart = int(rng.integers(5, 9)), rng.uniform(0.2, 0.26)
    petal = 0.92 * np.sin(np.pi / n) / (1 + np.sin(np.pi / n)) * 1.18
    circle = _around(40)
    for angle in _around(n):
        center = _polar(1 - petal, angle)
        sheet.disk(center, petal)
        sheet.line(center + _polar(0.52 * petal, circle), 0.045, closed=True)
    sheet.disk((0, 0), 1 - petal)
    sheet.dot((0, 0), heart)


def _gear(sheet: _Sheet, rng: Rng) -> None:
    n, depth = int(rng.integers(8, 13)), rng.uniform(0.2, 0.26)
    step = np.pi / n
    corners = [(1 - depth, -0.62), (1.0, -0.36), (1.0, 0.36), (1 - depth, 0.62)]
    sheet.fill(np.concatenate([[_polar(r, a + k * step) for r, k in corners] for a in _around(n)]))
    sheet.disk((0, 0), rng.uniform(0.2, 0.3), 0)
    sheet.line(_polar(0.62, _around(60)), 0.045, closed=True)
    for angle in _around(n):
        sheet.line([_polar(0.66, angle), _polar(0.86, angle)], 0.06)


def _rings(sheet: _Sheet, rng: Rng) -> None:
    n, share = int(rng.integers(2, 4)), rng.uniform(0.6, 0.7)
    step = 1 / (n + 0.35)
    for k in range(n):
        outer = 1 - k * step
        sheet.disk((0, 0), outer)
        sheet.disk((0, 0), outer - share * step, 0)
        sheet.line(_polar(outer - 0.5 * share * step, _around(80)), 0.035, closed=True)
    sheet.disk((0, 0), 0.3 * step)


def _spiral(sheet: _Sheet, rng: Rng) -> None:
    turns, hand = rng.uniform(2.0, 2.8), rng.choice([-1, 1])
    t = np.linspace(0.04, 1, 160)
    points = _polar(0.86 * t, hand * 2 * np.pi * turns * t)
    width = 0.62 * 0.86 / turns
    sheet.band(points, width)
    for end in (points[0], points[-1]):
        sheet.disk(end, width / 2)
    sheet.line(points, 0.04)


def _ladder(sheet: _Sheet, rng: Rng) -> None:
    n, half, width = int(rng.integers(4, 7)), rng.uniform(0.42, 0.55), rng.uniform(0.15, 0.19)
    heights = np.linspace(-0.78, 0.78, n)
    for x in (-half, half):
        sheet.band([(x, -0.97), (x, 0.97)], width)
        sheet.line([(x, -0.93), (x, 0.93)], 0.04)
    for y in heights:
        sheet.band([(-half, y), (half, y)], width)
        sheet.line([(-half, y), (half, y)], 0.04)


def _tree(sheet: _Sheet, rng: Rng) -> None:
    n, width = int(rng.integers(3, 6)), rng.uniform(0.68, 0.82)
    sheet.fill([(-0.11, -1), (0.11, -1), (0.11, -0.6), (-0.11, -0.6)])
    tops = np.linspace(1.0, -0.05, n)
    for k, top in enumerate(tops):
        w = width * (0.45 + 0.55 * k / (n - 1))
        base = top - 1.05 / (n - 1) * 0.62 - 0.36
        sheet.fill([(0, top), (w, base), (-w, base)])
        sheet.line([(-0.62 * w, base + 0.13), (0, base + 0.3), (0.62 * w, base + 0.13)], 0.05)


def _fish(sheet: _Sheet, rng: Rng) -> None:
    tall, hand = rng.uniform(0.46, 0.56), rng.choice([-1, 1])
    t = np.linspace(0, np.pi, 40)
    back = np.stack([0.22 - 0.78 * np.cos(t), tall * np.sin(t) ** 0.8], -1)
    flip = np.array([hand, 1.0])
    sheet.fill(np.concatenate([back, back[::-1] * [1, -1]]) * flip)
    sheet.fill(np.array([(-0.42, 0.0), (-1, 0.5), (-0.86, 0.0), (-1, -0.5)]) * flip)
    sheet.fill(np.array([(-0.1, tall * 0.7), (0.05, tall + 0.28), (0.5, tall * 0.75)]) * flip)
    sheet.fill(np.array([(0.0, -tall * 0.7), (0.05, -tall - 0.22), (0.4, -tall * 0.8)]) * flip)
    sheet.dot((hand * 0.72, 0.1), 0.085)
    arc = np.linspace(-1.25, 1.25, 16)
    sheet.line((np.array([0.24, 0]) + _polar(0.3, arc) * [1.0, tall / 0.36]) * flip, 0.05)
    for x, y in ((0.12, 0.0), (-0.08, 0.17), (-0.08, -0.17), (-0.28, 0.0), (0.1, 0.32), (0.1, -0.32)):
        sheet.line((np.array([x, y]) + _polar(0.15, arc)) * flip, 0.04)


def _mug(sheet: _Sheet, rng: Rng) -> None:
    tall, hand = rng.uniform(0.72, 0.86), rng.choice([-1, 1])
    flip = np.array([hand, 1.0])
    ear = np.array([0.36, 0.0]) + _polar(1.0, _around(60)) * [0.48, 0.62 * tall]
    sheet.band(np.concatenate([ear, ear[:1]]) * flip, 0.17)
    sheet.fill(np.array([(-0.85, tall), (0.45, tall), (0.36, -tall), (-0.76, -tall)]) * flip)
    for y in (0.72, -0.55):
        sheet.line(np.array([(-0.8, y * tall), (0.4, y * tall)]) * flip, 0.05)
    heart = np.linspace(0, 2 * np.pi, 40)
    x = 16 * np.sin(heart) ** 3
    y = 13 * np.cos(heart) - 5 * np.cos(2 * heart) - 2 * np.cos(3 * heart) - np.cos(4 * heart)
    sheet.line((np.stack([x, y], -1) * 0.019 + [-0.2, 0.06]) * flip, 0.06, closed=True)


def _bolt(sheet: _Sheet, rng: Rng) -> None:
    n, width, swing = int(rng.integers(3, 5)), rng.uniform(0.34, 0.42), rng.uniform(0.3, 0.38)
    y = np.linspace(0.98, -0.98, n + 1)
    x = swing * np.where(np.arange(n + 1) % 2, 1.0, -1.0)
    left, right = np.stack([x - width / 1.2, y], -1), np.stack([x + width / 1.2, y], -1)
    sheet.fill(np.concatenate([left, right[::-1]]))
    for shift in (-0.13, 0.13):
        sheet.line(np.stack([x + shift, y], -1), 0.045)


_SHAPES = (_star, _flower, _gear, _rings, _spiral, _ladder, _tree, _fish, _mug, _bolt)
_DRAW: dict[str, Callable[[_Sheet, Rng], None]] = {shape.__name__[1:]: shape for shape in _SHAPES}
KINDS = tuple(_DRAW)


@lru_cache(maxsize=len(KINDS) * VARIANTS * 4)
def stencil(kind: str, variant: int, level: int = 0) -> tuple[Array, float]:
    """Return ([s, s, 2], size), s = SIDE / 2^level: distance to the border in stencil pixels, and lines (0 to 1).

    `size` is the square root of the silhouette's area in stencil pixels. Poses divide by it, so that every kind covers
    the same number of pixels and the amount of object color does not reveal the class.
    """
    if level:
        fine, area = stencil(kind, variant, level - 1)
        coarse = cv2.resize(fine, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        coarse[..., 0] /= 2
        return coarse, area / 2
    sheet = _Sheet()
    _DRAW[kind](sheet, np.random.default_rng([KINDS.index(kind), variant]))
    solid = sheet.body > 127
    inside = cv2.distanceTransform(solid.astype(np.uint8), cv2.DIST_L2, 5)
    outside = cv2.distanceTransform((~solid).astype(np.uint8), cv2.DIST_L2, 5)
    distance = cv2.resize(inside - outside, (SIDE, SIDE), interpolation=cv2.INTER_AREA) / _SUPER
    lines = cv2.resize(sheet.lines.astype(np.float32) / 255, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    area = float(np.sqrt(solid.sum())) / _SUPER
    return np.ascontiguousarray(np.stack([distance, lines], -1), np.float32), area
