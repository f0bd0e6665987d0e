"""Rendering of synthetic scenes: textures, colors and light of the shapes in shapes.py.

Positions and lengths are fractions of the image side, with (0, 0) in the center, so that one description of a scene
gives the same image at any size.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from dino_ssl.data.synthetic.shapes import KINDS, SIDE, VARIANTS, stencil

Array = np.ndarray  # float32; an image is [3, h, w] until it is complete, which is fastest in numpy
Rng = np.random.Generator
Color = tuple[float, float, float]  # lightness, chroma, hue in Oklch
f32 = np.float32

_TYPICAL = ((0.78, 0.09, 1.3), (0.42, 0.06, 4.4))  # amber object, slate background: the only colors at variety 0
_CONTRAST = 0.3  # lightness between a background and either color of an object of equal mean lightness
_LIGHT = (-0.6, -0.8)  # direction of the light: from the upper left
_PATTERNS = ("plain", "stripes", "checks", "dots", "clouds", "marble", "grain")
_CLASS_PATTERNS = tuple(
    (pattern, band)
    for band in ((5.0, 6.5), (10.0, 13.0))
    for pattern in ("stripes", "checks", "dots", "marble", "grain")
)
"""(pattern, range of its frequency) of each class; the colors do not depend on the class."""


class Pose(NamedTuple):
    """Center, rotation in radians, and size (square root of the covered area) of an object."""

    x: float
    y: float
    turn: float
    size: float


@dataclass(frozen=True)
class Texture:
    """Two-color pattern over the plane.

    Attributes:
        pattern: Name of the pattern.
        frequency: Periods per image side.
        angle: Direction in radians.
        shift: Phase in periods.
        colors: [2, 3], RGB from 0 to 255.
        depth: Contrast, from 0 (first color only) to 1.
    """

    pattern: str
    frequency: float
    angle: float
    shift: tuple[float, float]
    colors: Array
    depth: float


@dataclass(frozen=True)
class Object:
    """A shape with its texture and the color [3] of its inner lines, without a pose."""

    kind: str
    variant: int
    texture: Texture
    line_color: Array


@dataclass(frozen=True)
class Clutter:
    """Rounded bar of any aspect ratio (`slim` = width / length), in front of or behind the objects."""

    pose: Pose
    slim: float
    texture: Texture
    in_front: bool


@dataclass(frozen=True)
class Background:
    """Texture, clutter, direction and strength of a soft light gradient, and standard deviation of the noise."""

    texture: Texture
    light: tuple[float, float]
    clutter: tuple[Clutter, ...]
    noise: float


def oklch(light: float, chroma: float, hue: float) -> Array:
    """Return RGB [3] from 0 to 255 of an Oklch color; equal lightness looks equally light in every hue."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return np.array([255 * min(max(v, 0.0), 1.0) ** (1 / 2.2) for v in linear], np.float32)


def sample_colors(rng: Rng, first: Color | None = None, variety: float = 1.0) -> tuple[Color, Color]:
    """Return the colors of an object and its background, resampled until they differ in lightness.

    At variety 1 both have the same distribution; below, they approach one pair. `first` fixes the object's color.
    """
    while True:
        color = first or _towards(_random_color(rng), _TYPICAL[0], variety)
        background = _towards(_random_color(rng), _TYPICAL[1], variety)
        if abs(color[0] - background[0]) > 0.2:
            return color, background


def sample_equal_lightness(rng: Rng, first: Color | None = None, variety: float = 1.0) -> tuple[Color, Color]:
    """Return the colors of an object and its background whose mean lightness is equal.

    The two colors of the object's texture are `_CONTRAST` above and below the background's lightness, so that
    brightness is uninformative.
    """
    background = (0.6 + 0.3 * variety * float(rng.uniform(-1, 1)), 0.06, float(rng.uniform(0, 2 * np.pi)))
    side = _CONTRAST if rng.random() < 0.5 else -_CONTRAST
    return first or (background[0] + side, 0.06, float(rng.uniform(0, 2 * np.pi))), background


def _towards(color: Color, typical: Color, variety: float) -> Color:
    light, chroma, hue = (variety * a + (1 - variety) * b for a, b in zip(color, typical, strict=True))
    return light, chroma, hue


def _random_color(rng: Rng) -> Color:
    return float(rng.uniform(0.32, 0.9)), float(rng.uniform(0.03, 0.15)), float(rng.uniform(0, 2 * np.pi))


def sample_texture(rng: Rng, color: Color, strength: float) -> Texture:
    """Return a random texture around a color."""
    light, chroma, hue = color
    sign, step, tint, pattern, period, angle, right, down = rng.random(8).tolist()  # one call, because it is frequent
    other = light + (0.08 + 0.12 * step) * (1 if sign < 0.5 else -1)
    second = oklch(min(max(other, 0.2), 0.97), chroma * (0.6 + 0.8 * tint), hue + float(rng.normal(0, 0.5)))
    return Texture(
        pattern=_PATTERNS[int(pattern * len(_PATTERNS))],
        frequency=3 * math.exp(period * math.log(10 / 3)),
        angle=math.pi * angle,
        shift=(8 * right, 8 * down),
        colors=np.stack([oklch(light, chroma, hue), second]),
        depth=strength * (0.4 + 0.6 * float(rng.random())),
    )


def sample_object(rng: Rng, kind: str, color: Color, strength: float, *, equal_lightness: bool) -> Object:
    """Return an object of a kind in a random variant, with the pattern of its class."""
    light, chroma, hue = color
    line = light + 0.3 if light < 0.6 else light - 0.3
    variant, texture = int(rng.integers(VARIANTS)), sample_texture(rng, color, strength)
    pattern, band = _CLASS_PATTERNS[KINDS.index(kind)]
    step = 2 * _CONTRAST if equal_lightness else float(rng.uniform(0.2, 0.35))
    step *= 1 if light < 0.6 else -1
    frequency = float(rng.uniform(*band))
    colors = np.stack([oklch(light, chroma, hue), oklch(light + step, chroma, hue + float(rng.normal(0, 0.6)))])
    texture = replace(texture, pattern=pattern, frequency=frequency, depth=1.0, colors=colors)
    return Object(kind, variant, texture, oklch(line, chroma, hue + float(rng.normal(0, 0.8))))


@lru_cache(maxsize=8)
def _plane(size: int) -> tuple[Array, Array]:
    """Return x [1, s] and y [s, 1] of the pixel centers."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size) - 0.5
    return line[None, :], line[:, None]


@lru_cache(maxsize=1)
def _cloud() -> Array:
    """Return periodic smooth noise from 0 to 1, [256, 256]."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None]) * 256
    spectrum = np.fft.rfft2(rng.standard_normal((256, 256)))
    field = np.fft.irfft2(spectrum * np.exp(-((frequency / 18) ** 2)) / (1 + frequency / 6), s=(256, 256))
    order = np.argsort(np.argsort(field, axis=None))
    return (order.reshape(256, 256) / 65535).astype(np.float32)


def _sample_cloud(u: Array, v: Array) -> Array:
    side = f32(16)
    return cv2.remap(_cloud(), (u * side) % 256, (v * side) % 256, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def _pattern(texture: Texture, x: Array, y: Array) -> Array:
    """Return the share of the second color at positions x, y, [h, w] from 0 to 1."""
    c, s = math.cos(texture.angle) * texture.frequency, math.sin(texture.angle) * texture.frequency
    u = f32(c) * x + f32(s) * y + f32(texture.shift[0])
    v = f32(c) * y - f32(s) * x + f32(texture.shift[1])
    turn = f32(2 * np.pi)
    match texture.pattern:
        case "plain":
            return 0.5 + 0.5 * np.sin(u * f32(0.7))
        case "stripes":
            return _soft_edges(np.sin(u * turn))
        case "checks":
            return _soft_edges(np.sin(u * (turn / 2)) * np.sin(v * (turn / 2)) * 2)
        case "dots":
            return _soft_edges(np.cos(u * turn) + np.cos(v * turn) - f32(0.6))
        case "clouds":
            return _sample_cloud(u * f32(0.5), v * f32(0.5))
        case "marble":
            return _soft_edges(np.sin((u + 1.4 * _sample_cloud(u * f32(0.4), v * f32(0.4))) * turn) * 0.6)
        case _:
            return _sample_cloud(u * f32(2.2), v * f32(2.2))


def _soft_edges(wave: Array) -> Array:
    return np.clip(f32(0.5) + f32(1.2) * wave, 0, 1)


def _paint(texture: Texture, x: Array, y: Array) -> Array:
    """Return the texture's colors [3, h, w] at positions x, y."""
    first, second = texture.colors[:, :, None, None]
    return first + _pattern(texture, x, y) * (f32(texture.depth) * (second - first))


def _blend(image: Array, color: Array, alpha: Array) -> None:
    """Blend `color` over the image, in place."""
    image += (color - image) * alpha


def _local(pose: Pose, x: Array, y: Array, unit: float = 1.0) -> tuple[Array, Array]:
    """Return image positions in the coordinates of an object."""
    c, s = f32(math.cos(pose.turn) / unit), f32(math.sin(pose.turn) / unit)
    dx, dy = x - f32(pose.x), y - f32(pose.y)
    return c * dx + s * dy, c * dy - s * dx


def _draw_clutter(image: Array, piece: Clutter) -> tuple[tuple[slice, slice], Array]:
    """Draw a piece of clutter; return its window in the image and its alpha there, [h, w]."""
    size = image.shape[1]
    long = piece.pose.size / math.sqrt(piece.slim) / 2
    radius = long * piece.slim
    low = [max(0, math.floor((at + 0.5 - long - 0.06) * size)) for at in (piece.pose.y, piece.pose.x)]
    high = [max(0, math.ceil((at + 0.5 + long + 0.06) * size)) for at in (piece.pose.y, piece.pose.x)]
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    x, y = _plane(size)
    part = image[:, *window]
    u, v = _local(piece.pose, x[:, window[1]], y[window[0]])
    distance = f32(radius) - np.hypot(np.maximum(np.abs(u) - f32(long - radius), 0), v)
    alpha = np.clip(distance * f32(size) + f32(0.5), 0, 1)
    if part.size:
        part *= 1 - np.clip(distance * f32(12) + f32(0.6), 0, 1) * f32(0.22)  # shadow
        _blend(part, _paint(piece.texture, u, v), alpha)
    return window, alpha


def reach(obj: Object) -> float:
    """Return half the side of the square around the unrotated object, per unit of its pose's size."""
    return 0.45 * SIDE / stencil(obj.kind, obj.variant)[1]


def place(obj: Object, pose: Pose, size: int) -> Array:
    """Rasterize an object: [size, size, 2], signed distance in pixels (positive inside) and inner lines (0 to 1)."""
    pixels = pose.size * size  # square root of the object's area in pixels
    level = 0
    while level < 3 and stencil(obj.kind, obj.variant, level)[1] > 2 * pixels:
        level += 1
    pattern, area = stencil(obj.kind, obj.variant, level)
    scale = area / pixels  # stencil pixels per image pixel
    c, s = math.cos(pose.turn) * scale, math.sin(pose.turn) * scale
    x, y = (pose.x + 0.5) * size - 0.5, (pose.y + 0.5) * size - 0.5
    middle = (SIDE >> level) / 2 - 0.5
    matrix = np.array([[c, s, middle - c * x - s * y], [-s, c, middle + s * x - c * y]], np.float64)
    flags, outside = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, (-float(SIDE), 0.0, 0.0, 0.0)
    border = cv2.BORDER_CONSTANT
    placed = cv2.warpAffine(pattern, matrix, (size, size), flags=flags, borderMode=border, borderValue=outside)
    placed[..., 0] /= f32(scale)
    return placed


def _draw_object(image: Array, obj: Object, pose: Pose) -> Array:
    """Draw an object with shadow, bevel and inner lines; return its alpha, [h, w] from 0 to 1."""
    size = image.shape[1]
    placed = place(obj, pose, size)
    distance, lines = np.ascontiguousarray(placed[..., 0]), np.ascontiguousarray(placed[..., 1])
    alpha = np.clip(distance + f32(0.5), 0, 1)
    soft = max(1.0, 0.02 * size)
    shift = round(0.018 * size)
    shadow = np.zeros_like(alpha)
    shadow[shift:, shift:] = np.clip(distance / soft + 0.7, 0, 1)[: size - shift, : size - shift]
    image *= 1 - shadow * f32(0.35)

    color = _paint(obj.texture, *_local(pose, *_plane(size), unit=pose.size / 0.4))
    _blend(color, obj.line_color[:, None, None], lines * f32(0.85))
    height = np.minimum(np.maximum(distance, -1), f32(0.035 * size))  # bevel: a steep border, a flat center
    slope = f32(_LIGHT[0]) * cv2.Sobel(height, -1, 1, 0) + f32(_LIGHT[1]) * cv2.Sobel(height, -1, 0, 1)
    color *= 1 - f32(0.028) * slope
    _blend(image, color, alpha)
    return alpha


def compose(
    size: int, objects: list[tuple[Object, Pose]], background: Background, pan: tuple[float, float], rng: Rng
) -> tuple[Array, Array]:
    """Return (image [s, s, 3], mask [s, s]), uint8: background, objects in order, light and noise.

    The mask holds 1 for the first object, 2 for the second, ...; occluded pixels belong to the nearer one. `pan` moves
    the background (in image sides); `rng` gives the noise.
    """
    x, y = _plane(size)
    image = _paint(background.texture, x - f32(pan[0]), y - f32(pan[1]))
    mask = np.zeros((size, size), np.uint8)
    clutter = [
        replace(piece, pose=piece.pose._replace(x=piece.pose.x + pan[0], y=piece.pose.y + pan[1]))
        for piece in background.clutter
    ]
    for piece in clutter:
        if not piece.in_front:
            _draw_clutter(image, piece)
    for number, (obj, pose) in enumerate(objects, 1):
        mask[_draw_object(image, obj, pose) > 0.5] = number
    for piece in clutter:
        if piece.in_front:
            window, alpha = _draw_clutter(image, piece)
            mask[window][alpha > 0.5] = 0
    angle, strength = background.light
    image *= 1 + f32(strength) * (f32(math.cos(angle)) * x + f32(math.sin(angle)) * y)
    if background.noise > 0:
        image += rng.standard_normal(image.shape, np.float32) * f32(background.noise)
    image += f32(0.5)
    return np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy(), mask
