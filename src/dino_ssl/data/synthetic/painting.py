"""Textures, colours, light: how a thing of `shapes` becomes part of a picture.

Positions and lengths are fractions of the picture's side, with (0, 0) at its middle, so that one description
of a scene gives the same picture at any size. Nothing here knows of classes but the stencil of `Thing.kind`.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from dino_ssl.data.synthetic.shapes import KINDS, SIDE, VARIANTS, stencil

Array = np.ndarray  # float32; a picture is [3, h, w] until it is done: numpy is fastest so
Rng = np.random.Generator
Colour = tuple[float, float, float]  # lightness, chroma, hue in Oklch

_USUAL = ((0.78, 0.09, 1.3), (0.42, 0.06, 4.4))  # amber on slate: what colours come near to as variety goes to 0
_RELIEF = 0.3  # lightness between a ground and either colour of a coat on it, where both are equally light on average
_LIGHT = (-0.6, -0.8)  # where the light comes from: the upper left
_WEAVES = ("plain", "stripes", "checks", "dots", "clouds", "marble", "grain")
_COATS = tuple(
    (weave, band) for band in ((5.0, 6.5), (10.0, 13.0)) for weave in ("stripes", "checks", "dots", "marble", "grain")
)
"""What the surface of a kind is like, by its number: a weave, coarse or fine; its colours are anybody's."""


class Pose(NamedTuple):
    """Where a thing is: its middle, its turn in radians, and the square root of the area it covers."""

    x: float
    y: float
    turn: float
    size: float


@dataclass(frozen=True)
class Texture:
    """A two-colour pattern over the plane: a weave, its frequency (periods per side), direction and shift."""

    weave: str
    frequency: float
    angle: float
    shift: tuple[float, float]
    colours: Array  # [2, 3], RGB from 0 to 255
    depth: float  # how far the pattern goes from the first colour towards the second


@dataclass(frozen=True)
class Thing:
    """An object: a stencil and the paint on it. Its pose is not part of it."""

    kind: str
    variant: int
    texture: Texture
    ink: Array  # [3], the colour of the inner lines


@dataclass(frozen=True)
class Ground:
    """What is behind the objects: a texture, the light over it, and pieces of clutter."""

    texture: Texture
    light: tuple[float, float]  # direction and strength of a soft gradient over the whole picture
    clutter: tuple["Piece", ...]
    grain: float  # standard deviation of the sensor noise, in grey levels


@dataclass(frozen=True)
class Piece:
    """A rounded bar of any proportion, from a ball to a stick: it belongs to no class."""

    pose: Pose
    slim: float
    texture: Texture
    before: bool  # in front of the objects


def oklch(light: float, chroma: float, hue: float) -> Array:
    """[3] RGB 0..255 of a colour in Oklch: equal steps of lightness look equal, whatever the hue."""
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


def draw_colours(rng: Rng, beside: Colour | None = None, variety: float = 1.0) -> tuple[Colour, Colour]:
    """Two Oklch colours, of a thing and of its ground, redrawn until they differ in lightness.

    At variety 1 they come from one distribution, and which is lighter is a coin's toss; below, every picture's pair
    comes nearer to one and the same. With `beside`, the first is given and only the second is drawn.
    """
    while True:
        first = beside or _mixed(_any_colour(rng), _USUAL[0], variety)
        second = _mixed(_any_colour(rng), _USUAL[1], variety)
        if abs(first[0] - second[0]) > 0.2:
            return first, second


def draw_level_colours(rng: Rng, beside: Colour | None = None, variety: float = 1.0) -> tuple[Colour, Colour]:
    """Two Oklch colours, of a thing and of its ground, of which the thing's coat makes a mean as light as the ground:
    its two colours lie `_RELIEF` either side. Brightness then tells nothing, and hue is anybody's.
    """
    ground = (0.6 + 0.3 * variety * float(rng.uniform(-1, 1)), 0.06, float(rng.uniform(0, 2 * np.pi)))
    side = _RELIEF if rng.random() < 0.5 else -_RELIEF
    return beside or (ground[0] + side, 0.06, float(rng.uniform(0, 2 * np.pi))), ground


def _mixed(colour: Colour, usual: Colour, variety: float) -> Colour:
    light, chroma, hue = (variety * a + (1 - variety) * b for a, b in zip(colour, usual, strict=True))
    return light, chroma, hue


def _any_colour(rng: Rng) -> Colour:
    return float(rng.uniform(0.32, 0.9)), float(rng.uniform(0.03, 0.15)), float(rng.uniform(0, 2 * np.pi))


def draw_texture(rng: Rng, colour: Colour, strength: float) -> Texture:
    light, chroma, hue = colour
    sign, step, tint, which, period, angle, right, down = rng.random(8).tolist()  # one call: this is drawn most
    other = light + (0.08 + 0.12 * step) * (1 if sign < 0.5 else -1)
    return Texture(
        weave=_WEAVES[int(which * len(_WEAVES))],
        frequency=3 * math.exp(period * math.log(10 / 3)),
        angle=math.pi * angle,
        shift=(8 * right, 8 * down),
        colours=np.stack(
            [
                oklch(light, chroma, hue),
                oklch(min(max(other, 0.2), 0.97), chroma * (0.6 + 0.8 * tint), hue + float(rng.normal(0, 0.5))),
            ]
        ),
        depth=strength * (0.4 + 0.6 * float(rng.random())),
    )


def draw_thing(rng: Rng, kind: str, colour: Colour, strength: float, *, coat: bool, level: bool = False) -> Thing:
    """A thing of a kind, in any variant, turn of colour and texture; with `coat`, in its kind's own weave, whose second
    colour, if `level`, lies as far on the other side of the ground's lightness."""
    light, chroma, hue = colour
    ink = light + 0.3 if light < 0.6 else light - 0.3
    variant, texture = int(rng.integers(VARIANTS)), draw_texture(rng, colour, strength)
    if coat:
        weave, band = _COATS[KINDS.index(kind)]
        step = 2 * _RELIEF if level else float(rng.uniform(0.2, 0.35))
        step *= 1 if light < 0.6 else -1
        texture = replace(
            texture,
            weave=weave,
            frequency=float(rng.uniform(*band)),
            depth=1.0,
            colours=np.stack([oklch(light, chroma, hue), oklch(light + step, chroma, hue + float(rng.normal(0, 0.6)))]),
        )
    return Thing(
        kind=kind,
        variant=variant,
        texture=texture,
        ink=oklch(ink, chroma, hue + float(rng.normal(0, 0.8))),
    )


@lru_cache(maxsize=8)
def _plane(size: int) -> tuple[Array, Array]:
    """x [1, s] and y [s, 1] of every pixel's middle, in sides."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size) - 0.5
    return line[None, :], line[:, None]


@lru_cache(maxsize=1)
def _cloud() -> Array:
    """[256, 256] smooth noise from 0 to 1 that repeats without a seam."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None]) * 256
    spectrum = np.fft.rfft2(rng.standard_normal((256, 256)))
    field = np.fft.irfft2(spectrum * np.exp(-((frequency / 18) ** 2)) / (1 + frequency / 6), s=(256, 256))
    order = np.argsort(np.argsort(field, axis=None))
    return (order.reshape(256, 256) / 65535).astype(np.float32)


def _sample_cloud(u: Array, v: Array) -> Array:
    """The noise at (u, v), one bump per unit or so."""
    side = np.float32(16)
    return cv2.remap(_cloud(), (u * side) % 256, (v * side) % 256, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def weave(texture: Texture, x: Array, y: Array) -> Array:
    """[h, w] from 0 to 1: how much of the second colour there is at the places x, y (they broadcast)."""
    c, s = math.cos(texture.angle) * texture.frequency, math.sin(texture.angle) * texture.frequency
    u = np.float32(c) * x + np.float32(s) * y + np.float32(texture.shift[0])
    v = np.float32(c) * y - np.float32(s) * x + np.float32(texture.shift[1])
    turn = np.float32(2 * np.pi)
    if texture.weave == "plain":
        return 0.5 + 0.5 * np.sin(u * np.float32(0.7))
    if texture.weave == "stripes":
        return _crisp(np.sin(u * turn))
    if texture.weave == "checks":
        return _crisp(np.sin(u * (turn / 2)) * np.sin(v * (turn / 2)) * 2)
    if texture.weave == "dots":
        return _crisp(np.cos(u * turn) + np.cos(v * turn) - np.float32(0.6))
    if texture.weave == "clouds":
        return _sample_cloud(u * np.float32(0.5), v * np.float32(0.5))
    if texture.weave == "marble":
        return _crisp(np.sin((u + 1.4 * _sample_cloud(u * np.float32(0.4), v * np.float32(0.4))) * turn) * 0.6)
    return _sample_cloud(u * np.float32(2.2), v * np.float32(2.2))


def _crisp(wave: Array) -> Array:
    """-1..1 to 0..1 with soft edges."""
    return np.clip(np.float32(0.5) + np.float32(1.2) * wave, 0, 1)


def _paint(texture: Texture, x: Array, y: Array) -> Array:
    """[3, h, w] the texture's colours at x, y."""
    first, second = texture.colours[:, :, None, None]
    return first + weave(texture, x, y) * (np.float32(texture.depth) * (second - first))


def _lay(picture: Array, colour: Array, alpha: Array) -> None:
    """Puts `colour` over the picture where alpha is 1, in place."""
    picture += (colour - picture) * alpha


def _local(pose: Pose, x: Array, y: Array, unit: float = 1.0) -> tuple[Array, Array]:
    """The picture's places in a thing's own coordinates."""
    c, s = np.float32(math.cos(pose.turn) / unit), np.float32(math.sin(pose.turn) / unit)
    dx, dy = x - np.float32(pose.x), y - np.float32(pose.y)
    return c * dx + s * dy, c * dy - s * dx


def _darken(picture: Array, shadow: Array) -> None:
    """Takes the share `shadow` of the light away, in place."""
    picture *= 1 - shadow


def _lay_piece(picture: Array, piece: Piece) -> tuple[tuple[slice, slice], Array]:
    """Draws a piece of clutter; returns the window it lies in and where it is in there, [h, w] 0 to 1."""
    size = picture.shape[1]
    long = piece.pose.size / math.sqrt(piece.slim) / 2
    radius = long * piece.slim
    low = [max(0, math.floor((at + 0.5 - long - 0.06) * size)) for at in (piece.pose.y, piece.pose.x)]
    high = [max(0, math.ceil((at + 0.5 + long + 0.06) * size)) for at in (piece.pose.y, piece.pose.x)]
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    x, y = _plane(size)
    part = picture[:, *window]
    u, v = _local(piece.pose, x[:, window[1]], y[window[0]])
    distance = np.float32(radius) - np.hypot(np.maximum(np.abs(u) - np.float32(long - radius), 0), v)
    alpha = np.clip(distance * np.float32(size) + np.float32(0.5), 0, 1)
    if part.size:
        _darken(part, np.clip(distance * np.float32(12) + np.float32(0.6), 0, 1) * np.float32(0.22))
        _lay(part, _paint(piece.texture, u, v), alpha)
    return window, alpha


def reach(thing: Thing) -> float:
    """Half the side of the square that holds the thing unturned, per unit of a pose's size."""
    return 0.45 * SIDE / stencil(thing.kind, thing.variant)[1]


def place(thing: Thing, pose: Pose, size: int) -> Array:
    """[size, size, 2]: the thing's distance map (in picture pixels, positive inside) and inner lines."""
    wanted = pose.size * size  # the side, in pixels, of a square as large as the thing
    level = 0
    while level < 3 and stencil(thing.kind, thing.variant, level)[1] > 2 * wanted:
        level += 1
    sheet, area = stencil(thing.kind, thing.variant, level)
    scale = area / wanted  # stencil pixels per picture pixel
    c, s = math.cos(pose.turn) * scale, math.sin(pose.turn) * scale
    x, y = (pose.x + 0.5) * size - 0.5, (pose.y + 0.5) * size - 0.5
    middle = (SIDE >> level) / 2 - 0.5
    matrix = np.array([[c, s, middle - c * x - s * y], [-s, c, middle + s * x - c * y]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    outside = (-float(SIDE), 0.0, 0.0, 0.0)
    placed = cv2.warpAffine(
        sheet, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=outside
    )
    placed[..., 0] /= np.float32(scale)
    return placed


def _lay_thing(picture: Array, thing: Thing, pose: Pose) -> Array:
    """Draws a thing with shadow, bevel and inner lines; returns where it is, [h, w] from 0 to 1."""
    size = picture.shape[1]
    placed = place(thing, pose, size)
    distance, lines = np.ascontiguousarray(placed[..., 0]), np.ascontiguousarray(placed[..., 1])
    alpha = np.clip(distance + np.float32(0.5), 0, 1)
    soft = max(1.0, 0.02 * size)
    shift = round(0.018 * size)
    shadow = np.zeros_like(alpha)
    shadow[shift:, shift:] = np.clip(distance / soft + 0.7, 0, 1)[: size - shift, : size - shift]
    _darken(picture, shadow * np.float32(0.35))

    colour = _paint(thing.texture, *_local(pose, *_plane(size), unit=pose.size / 0.4))
    _lay(colour, thing.ink[:, None, None], lines * np.float32(0.85))
    rim = 0.035 * size  # the bevel: the border is as steep as a pillow's, the middle is flat
    height = np.minimum(np.maximum(distance, -1), np.float32(rim))
    slope = np.float32(_LIGHT[0]) * cv2.Sobel(height, -1, 1, 0) + np.float32(_LIGHT[1]) * cv2.Sobel(height, -1, 0, 1)
    colour *= 1 - np.float32(0.028) * slope
    _lay(picture, colour, alpha)
    return alpha


def compose(size: int, things: list[tuple[Thing, Pose]], ground: Ground, pan: tuple[float, float], rng: Rng):
    """(picture [s, s, 3], mask [s, s]), uint8: the ground, the things in order, light and noise over all.

    The mask holds 1 for the first thing, 2 for the second, ...; what is nearer hides what is behind. `pan`
    moves the ground (in sides) under the things; `rng` gives the noise.
    """
    x, y = _plane(size)
    picture = _paint(ground.texture, x - np.float32(pan[0]), y - np.float32(pan[1]))
    mask = np.zeros((size, size), np.uint8)
    moved = [
        Piece(
            piece.pose._replace(x=piece.pose.x + pan[0], y=piece.pose.y + pan[1]),
            piece.slim,
            piece.texture,
            piece.before,
        )
        for piece in ground.clutter
    ]
    for piece in moved:
        if not piece.before:
            _lay_piece(picture, piece)
    for number, (thing, pose) in enumerate(things, 1):
        mask[_lay_thing(picture, thing, pose) > 0.5] = number
    for piece in moved:
        if piece.before:
            window, alpha = _lay_piece(picture, piece)
            mask[window][alpha > 0.5] = 0
    angle, strength = ground.light
    lamp = 1 + np.float32(strength) * (np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y)
    picture *= lamp
    if ground.grain > 0:
        picture += rng.standard_normal(picture.shape, np.float32) * np.float32(ground.grain)
    picture += np.float32(0.5)
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy(), mask
