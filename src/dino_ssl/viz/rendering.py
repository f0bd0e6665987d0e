"""Attention as pictures: heat maps, overlays, contours, and the figure that lays them side by side."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from dino_ssl.files import atomic_write
from dino_ssl.viz.attention import Attention

Colour = tuple[int, int, int]
Panel = tuple[str, np.ndarray]

PAPER, INK = (255, 255, 255), (38, 38, 42)
EDGE = (255, 214, 84)
COLOURS: list[Colour] = [
    (240, 62, 62), (66, 133, 255), (250, 204, 21), (46, 204, 96), (222, 80, 240), (40, 220, 240),
    (255, 128, 20), (170, 240, 60), (255, 140, 190), (140, 120, 255), (30, 190, 160), (215, 180, 140),
]  # fmt: skip
GAP, MARGIN, LABEL = 6, 20, 30
ACROSS = 6
"""Panels of a figure in one row."""


def heat(values: np.ndarray, shape: tuple[int, int], *, colors: str = "magma", smooth: bool = True) -> np.ndarray:
    """A map [h, w] as a picture [*shape, 3] uint8, its lowest value the darkest colour and its highest the
    lightest.
    """
    return _colored(stretch(values), shape, colors, smooth)


def stretch(values: np.ndarray) -> np.ndarray:
    """Values moved to 0 .. 1; a constant map is all 0."""
    values = values.astype(np.float32) - values.min()
    return values / max(float(values.max()), 1e-12)


def overlay(picture: np.ndarray, values: np.ndarray, *, colors: str = "inferno", strength: float = 0.75) -> np.ndarray:
    """The map glowing over the darkened picture: where attention is low, the picture stays, grey and dim."""
    height, width = picture.shape[:2]
    level = _resize(stretch(values), (height, width), smooth=True)[..., None]
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32) * 0.55
    base = 0.35 * picture + 0.65 * np.repeat(grey, 3, axis=2)
    glow = _colored(stretch(values), (height, width), colors, True).astype(np.float32)
    alpha = strength * level**1.2
    lit = picture * level + base * (1 - level)
    return np.clip(lit * (1 - alpha) + glow * alpha, 0, 255).astype(np.uint8)


def cutout(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture inside of the mask, its ghost outside, and the edge between: patches stay square."""
    height, width = picture.shape[:2]
    inside = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    ghost = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) * 0.22
    drawn = np.where(inside[..., None] > 0, picture, ghost.astype(np.uint8))
    edges, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.ascontiguousarray(drawn), edges, -1, EDGE, max(1, min(height, width) // 160))


def mark(picture: np.ndarray, point: tuple[float, float] | None, color: Colour = EDGE) -> np.ndarray:
    """The picture with a ring around a point; unchanged for [CLS]."""
    if point is None:
        return picture
    center, radius = (round(point[0]), round(point[1])), max(4, min(picture.shape[:2]) // 40)
    drawn = picture.copy()
    cv2.circle(drawn, center, radius, (20, 20, 20), max(3, radius // 2), cv2.LINE_AA)
    return cv2.circle(drawn, center, radius, color, max(1, radius // 4), cv2.LINE_AA)


def palette(count: int) -> list[Colour]:
    """Colours that can be told apart: the first 12 by hand, the rest around the circle of hues."""
    turns = [
        colorsys.hsv_to_rgb((0.11 + 0.618 * i) % 1, 0.55 + 0.4 * (i % 2), 1.0) for i in range(count - len(COLOURS))
    ]
    return [*COLOURS, *(tuple(round(255 * part) for part in turn) for turn in turns)][:count]  # type: ignore[list-item]


def in_colours(picture: np.ndarray, maps: np.ndarray, masks: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """Several maps [n, h, w] in one picture, a colour each, where their masks are (Fig. 3 and 8).

    The stronger a map, the more of its colour; where several maps are, the strongest alone has the place. A map's
    strength is its share of its own near-highest value. Elsewhere the picture is dim.
    """
    shape = picture.shape[:2]
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    drawn, strongest = 0.4 * grey, np.zeros((*shape, 1), np.float32)
    for values, mask, colour in zip(maps, masks, colours, strict=True):
        level = np.clip(values / max(float(np.quantile(values[mask], 0.95)), 1e-12), 0, 1)
        level = _resize(np.where(mask, 0.3 + 0.7 * level, 0), shape, smooth=True)[..., None]
        tint = (0.45 + 0.55 * grey / 255) * np.array(colour, np.float32)  # the picture's light stays
        mixed = 0.4 * grey * (1 - 0.9 * level) + 0.9 * level * tint
        drawn = np.where(level > strongest, mixed, drawn)
        strongest = np.maximum(strongest, level)
    return np.broadcast_to(np.clip(drawn, 0, 255), (*shape, 3)).astype(np.uint8)


def heads_in_colours(seen: Attention) -> np.ndarray:
    """Fig. 3: every head's mask in its own colour in one picture, the heads' numbers below."""
    colours = palette(len(seen.heads))
    drawn = in_colours(seen.shown, seen.heads, seen.masks, colours)
    return _legend(drawn, [str(number) for number in seen.numbers], colours)


def points_in_colours(seen: Sequence[Attention]) -> np.ndarray:
    """Fig. 8: what each point attends to (the mean over heads), in the point's colour, in one picture."""
    colours = palette(len(seen))
    drawn = in_colours(
        seen[0].shown, np.stack([one.mean for one in seen]), np.stack([one.mask for one in seen]), colours
    )
    return _marked(drawn, seen, colours)


def panels(seen: Attention) -> list[Panel]:
    """(name, picture) of everything there is to show: the picture, mean, overlay, mask, the heads in colours, then
    each head."""
    shape, several = seen.shown.shape[:2], len(seen.heads) > 1
    found = [
        ("picture", mark(seen.shown, _on_shown(seen))),
        ("mean" if several or seen.kind != "attention" else f"head {seen.numbers[0]}", heat(seen.mean, shape)),
        ("overlay", overlay(seen.shown, seen.mean)),
        (f"mask {seen.mass:.0%}", cutout(seen.shown, seen.mask)),
    ]
    if several:
        found.append(("heads", heads_in_colours(seen)))
        found += [(f"head {i}", heat(head, shape)) for i, head in zip(seen.numbers, seen.heads, strict=True)]
    return found


def point_panels(seen: Sequence[Attention]) -> list[Panel]:
    """(name, picture): the picture with the points, all that they attend to in one picture, then each alone."""
    colours = palette(len(seen))
    found = [("picture", _marked(seen[0].shown, seen, colours)), ("points", points_in_colours(seen))]
    for number, (one, colour) in enumerate(zip(seen, colours, strict=True), 1):
        alone = in_colours(one.shown, one.mean[None], one.mask[None], [colour])
        found.append((f"point {number}", mark(alone, _on_shown(one), colour)))
    return found


def coloured_patches(colours: np.ndarray, foreground: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Colours [h, w, 3] in 0 .. 1 as a picture [*shape, 3] uint8: square patches, black where no foreground is."""
    levels = (np.where(foreground[..., None], colours, 0) * 255).round().astype(np.uint8)
    return cv2.resize(levels, shape[::-1], interpolation=cv2.INTER_NEAREST)


def video_frame(seen: Attention | Sequence[Attention]) -> np.ndarray:
    """One frame of a film: the picture, its mean attention over it, its heads in colours; or the picture with its
    points, and what these attend to."""
    if not isinstance(seen, Attention):
        return np.concatenate([image for _, image in point_panels(seen)[:2]], axis=1)
    parts = [mark(seen.shown, _on_shown(seen)), overlay(seen.shown, seen.mean)]
    if len(seen.heads) > 1:
        parts.append(heads_in_colours(seen))
    return np.concatenate(parts, axis=1)


def figure(
    seen: Sequence[Attention | Sequence[Attention]], *, height: int = 224, names: Sequence[str] = ()
) -> np.ndarray:
    """One block of panels per picture, [H, W, 3] uint8. A list is the points of one picture."""
    return sheet([panels(one) if isinstance(one, Attention) else point_panels(one) for one in seen], height, names)


def sheet(blocks: Sequence[Sequence[Panel]], height: int = 224, names: Sequence[str] = ()) -> np.ndarray:
    """Panels side by side, `ACROSS` in a row; each block starts a new one, and `names` go over their first panels."""
    rows: list[list[Panel]] = []
    for i, block in enumerate(blocks):
        drawn = [(name, _fit(image, height)) for name, image in block]
        if i < len(names):
            drawn[0] = (names[i], drawn[0][1])
        rows += [drawn[start : start + ACROSS] for start in range(0, len(drawn), ACROSS)]
    across = max(sum(image.shape[1] + GAP for _, image in row) for row in rows) + 2 * MARGIN
    down = len(rows) * (height + LABEL + GAP) + 2 * MARGIN
    page = Image.new("RGB", (across, down), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, row in enumerate(rows):
        x, y = MARGIN, MARGIN + i * (height + LABEL + GAP)
        for name, image in row:
            draw.text((x, y + 6), _short(name, image.shape[1] // 7), INK, font=font)
            page.paste(Image.fromarray(image), (x, y + LABEL - 4))
            x += image.shape[1] + GAP
    return np.asarray(page)


def save(path: Path, image: np.ndarray, **options) -> Path:
    """Writes [H, W, 3] or [H, W] uint8 as the file type that the name says, whole or not at all."""
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix.lower()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, lambda aside: Image.fromarray(image).save(aside, format=kind, **options))


def _colored(level: np.ndarray, shape: tuple[int, int], colors: str, smooth: bool) -> np.ndarray:
    table = (colormaps[colors](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table[(_resize(level, shape, smooth) * 255).round().astype(np.uint8)]


def _resize(level: np.ndarray, shape: tuple[int, int], smooth: bool) -> np.ndarray:
    how = cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST
    return np.clip(cv2.resize(level.astype(np.float32), shape[::-1], interpolation=how), 0, 1)


def _on_shown(seen: Attention) -> tuple[float, float] | None:
    """The query's place in `shown`."""
    times = seen.shown.shape[0] / seen.picture.shape[0]
    return None if seen.point is None else (seen.point[0] * times, seen.point[1] * times)


def _marked(picture: np.ndarray, seen: Sequence[Attention], colours: Sequence[Colour]) -> np.ndarray:
    for one, colour in zip(seen, colours, strict=True):
        picture = mark(picture, _on_shown(one), colour)
    return picture


def _legend(picture: np.ndarray, words: Sequence[str], colours: Sequence[Colour]) -> np.ndarray:
    """The picture with the words along its lower edge, each in its colour on black; rows where one is too short."""
    side = max(13, min(picture.shape[:2]) // 22)
    font, wide = ImageFont.load_default(side), round(1.7 * side)
    in_row = max(1, picture.shape[1] // wide)
    page = Image.fromarray(picture)
    draw, rows = ImageDraw.Draw(page), -(-len(words) // in_row)
    for i, (word, colour) in enumerate(zip(words, colours, strict=True)):
        x, y = i % in_row * wide, picture.shape[0] - (rows - i // in_row) * wide
        draw.rectangle((x, y, x + wide - 1, y + wide - 1), fill=(16, 16, 18))
        draw.text((x + wide / 2, y + wide / 2), word, colour, font=font, anchor="mm")
    return np.asarray(page)


def _fit(image: np.ndarray, height: int) -> np.ndarray:
    shrinks, width = height < image.shape[0], max(24, round(image.shape[1] * height / image.shape[0]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _short(name: str, limit: int) -> str:
    return name if len(name) <= max(limit, 4) else f"{name[: max(limit, 4) - 1]}…"
