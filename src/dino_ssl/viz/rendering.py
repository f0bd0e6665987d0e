"""Attention maps as images: heat maps, overlays, masks, and sheets of labeled panels."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from dino_ssl.viz.attention import AttentionMaps, Point

Color = tuple[int, int, int]
Panel = tuple[str, np.ndarray]

PAPER, INK = (255, 255, 255), (38, 38, 42)
EDGE = (255, 214, 84)
COLORS: list[Color] = [
    (240, 62, 62), (66, 133, 255), (250, 204, 21), (46, 204, 96), (222, 80, 240), (40, 220, 240),
    (255, 128, 20), (170, 240, 60), (255, 140, 190), (140, 120, 255), (30, 190, 160), (215, 180, 140),
]  # fmt: skip
GAP, MARGIN, LABEL = 6, 20, 30
PANELS_PER_ROW = 6

# -- single maps -------------------------------------------------------------------------------------------


def heat_map(values: np.ndarray, shape: tuple[int, int], *, colormap: str = "magma", smooth: bool = True) -> np.ndarray:
    """Return a map [h, w] as an image [*shape, 3] uint8, scaled from its minimum to its maximum."""
    table = (colormaps[colormap](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table[(_resize(rescale(values), shape, smooth) * 255).round().astype(np.uint8)]


def rescale(values: np.ndarray) -> np.ndarray:
    """Scale values to 0 .. 1 by their minimum and maximum; constant values become 0."""
    values = values.astype(np.float32) - values.min()
    return values / max(float(values.max()), 1e-12)


def overlay(image: np.ndarray, values: np.ndarray, *, colormap: str = "inferno", strength: float = 0.75) -> np.ndarray:
    """Return the map drawn over the image, which is gray and dark where the map is low."""
    shape = image.shape[:2]
    level = _resize(rescale(values), shape, smooth=True)[..., None]
    base = 0.35 * image + 0.65 * np.repeat(_grey(image) * 0.55, 3, axis=2)
    heat = heat_map(values, shape, colormap=colormap).astype(np.float32)
    alpha = strength * level**1.2
    lit = image * level + base * (1 - level)
    return np.clip(lit * (1 - alpha) + heat * alpha, 0, 255).astype(np.uint8)


def cutout(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image inside of the mask [h, w], dark gray outside, with a line at the edge of its patches."""
    height, width = image.shape[:2]
    inside = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    outside = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) * 0.22
    canvas = np.where(inside[..., None] > 0, image, outside.astype(np.uint8))
    edges, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.ascontiguousarray(canvas), edges, -1, EDGE, max(1, min(height, width) // 160))


def draw_marker(image: np.ndarray, point: Point | None, color: Color = EDGE) -> np.ndarray:
    """Return the image with a ring around the point; unchanged without a point."""
    if point is None:
        return image
    center, radius = (round(point[0]), round(point[1])), max(4, min(image.shape[:2]) // 40)
    canvas = image.copy()
    cv2.circle(canvas, center, radius, (20, 20, 20), max(3, radius // 2), cv2.LINE_AA)
    return cv2.circle(canvas, center, radius, color, max(1, radius // 4), cv2.LINE_AA)


def patch_color_image(colors: np.ndarray, foreground: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return colors [h, w, 3] in 0 .. 1 as square patches in an image [*shape, 3] uint8, background black."""
    levels = (np.where(foreground[..., None], colors, 0) * 255).round().astype(np.uint8)
    return cv2.resize(levels, shape[::-1], interpolation=cv2.INTER_NEAREST)


# -- several maps in one image -----------------------------------------------------------------------------


def palette(count: int) -> list[Color]:
    """Return distinct colors: the first 12 are fixed, more are spread over the hues."""
    hues = [colorsys.hsv_to_rgb((0.11 + 0.618 * i) % 1, 0.55 + 0.4 * (i % 2), 1.0) for i in range(count - len(COLORS))]
    return [*COLORS, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues)][:count]


def color_maps(image: np.ndarray, maps: np.ndarray, masks: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
    """Return several maps [n, h, w] in one image, each inside its mask and in its own color (Fig. 3 and 8).

    A map's strength is relative to its own 95th percentile inside the mask. Where masks overlap, the strongest map
    is drawn. The image is dark outside of all masks.
    """
    shape = image.shape[:2]
    grey = _grey(image)
    canvas, strongest = 0.4 * grey, np.zeros((*shape, 1), np.float32)
    for values, mask, color in zip(maps, masks, colors, strict=True):
        level = np.clip(values / max(float(np.quantile(values[mask], 0.95)), 1e-12), 0, 1)
        level = _resize(np.where(mask, 0.3 + 0.7 * level, 0), shape, smooth=True)[..., None]
        tint = (0.45 + 0.55 * grey / 255) * np.array(color, np.float32)  # keeps the brightness of the image
        mixed = 0.4 * grey * (1 - 0.9 * level) + 0.9 * level * tint
        canvas = np.where(level > strongest, mixed, canvas)
        strongest = np.maximum(strongest, level)
    return np.broadcast_to(np.clip(canvas, 0, 255), (*shape, 3)).astype(np.uint8)


def color_heads(maps: AttentionMaps) -> np.ndarray:
    """Return every head's mask in its own color in one image, with the head numbers below (Fig. 3)."""
    colors = palette(len(maps.heads))
    return _legend(color_maps(maps.display, maps.heads, maps.masks, colors), [str(i) for i in maps.head_ids], colors)


def color_points(points: Sequence[AttentionMaps]) -> np.ndarray:
    """Return the mean attention of each point, in the point's color, in one image (Fig. 8)."""
    colors = palette(len(points))
    means, masks = np.stack([maps.mean for maps in points]), np.stack([maps.mask for maps in points])
    return _draw_markers(color_maps(points[0].display, means, masks, colors), points, colors)


# -- panels and sheets -------------------------------------------------------------------------------------


def panels(maps: AttentionMaps) -> list[Panel]:
    """Return (name, image) of the input, mean, overlay, mask, the colored heads, and each head."""
    shape, several = maps.display.shape[:2], len(maps.heads) > 1
    mean = "mean" if several or maps.kind == "similarity" else f"head {maps.head_ids[0]}"
    result = [
        ("image", draw_marker(maps.display, maps.marker)),
        (mean, heat_map(maps.mean, shape)),
        ("overlay", overlay(maps.display, maps.mean)),
        (f"mask {maps.mass:.0%}", cutout(maps.display, maps.mask)),
    ]
    if several:
        result.append(("heads", color_heads(maps)))
        result += [(f"head {i}", heat_map(head, shape)) for i, head in zip(maps.head_ids, maps.heads, strict=True)]
    return result


def point_panels(points: Sequence[AttentionMaps]) -> list[Panel]:
    """Return (name, image) of the input with its points, of all points in one image, and of each point."""
    colors = palette(len(points))
    result = [("image", _draw_markers(points[0].display, points, colors)), ("points", color_points(points))]
    for number, (maps, color) in enumerate(zip(points, colors, strict=True), 1):
        alone = color_maps(maps.display, maps.mean[None], maps.mask[None], [color])
        result.append((f"point {number}", draw_marker(alone, maps.marker, color)))
    return result


def video_frame(maps: Sequence[AttentionMaps]) -> np.ndarray:
    """Return one video frame side by side with its mean attention and colored heads, or with its colored points."""
    if len(maps) > 1:
        return np.concatenate([image for _, image in point_panels(maps)[:2]], axis=1)
    parts = [draw_marker(maps[0].display, maps[0].marker), overlay(maps[0].display, maps[0].mean)]
    return np.concatenate([*parts, color_heads(maps[0])] if len(maps[0].heads) > 1 else parts, axis=1)


def attention_panels(maps: Sequence[AttentionMaps]) -> list[Panel]:
    """Return the panels of one image: `panels` for one query, `point_panels` for several."""
    return panels(maps[0]) if len(maps) == 1 else point_panels(maps)


def sheet(blocks: Sequence[Sequence[Panel]], *, height: int = 224, names: Sequence[str] = ()) -> np.ndarray:
    """Return labeled panels as one image [H, W, 3] uint8, PANELS_PER_ROW in a row.

    Each block starts a new row. names: labels of the blocks' first panels.
    """
    rows: list[list[Panel]] = []
    for i, block in enumerate(blocks):
        fitted = [(name, _fit(image, height)) for name, image in block]
        if i < len(names):
            fitted[0] = (names[i], fitted[0][1])
        rows += [fitted[start : start + PANELS_PER_ROW] for start in range(0, len(fitted), PANELS_PER_ROW)]
    total_width = max(sum(image.shape[1] + GAP for _, image in row) for row in rows) + 2 * MARGIN
    page = Image.new("RGB", (total_width, len(rows) * (height + LABEL + GAP) + 2 * MARGIN), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, row in enumerate(rows):
        x, y = MARGIN, MARGIN + i * (height + LABEL + GAP)
        for name, image in row:
            draw.text((x, y + 6), shorten(name, max(image.shape[1] // 7, 4)), INK, font=font)
            page.paste(Image.fromarray(image), (x, y + LABEL - 4))
            x += image.shape[1] + GAP
    return np.asarray(page)


def center_square(image: np.ndarray, side: int) -> np.ndarray:
    """Return the largest center square of an image, resized to side x side pixels."""
    short = min(image.shape[:2])
    top, left = (image.shape[0] - short) // 2, (image.shape[1] - short) // 2
    square = np.ascontiguousarray(image[top : top + short, left : left + short])
    return cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA if short > side else cv2.INTER_CUBIC)


def shorten(text: str, limit: int) -> str:
    """Return the text, cut to `limit` characters with an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)


def _resize(level: np.ndarray, shape: tuple[int, int], smooth: bool) -> np.ndarray:
    interpolation = cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST
    return np.clip(cv2.resize(level.astype(np.float32), shape[::-1], interpolation=interpolation), 0, 1)


def _draw_markers(image: np.ndarray, points: Sequence[AttentionMaps], colors: Sequence[Color]) -> np.ndarray:
    for maps, color in zip(points, colors, strict=True):
        image = draw_marker(image, maps.marker, color)
    return image


def _legend(image: np.ndarray, labels: Sequence[str], colors: Sequence[Color]) -> np.ndarray:
    """Return the image with colored labels along its lower edge, in several rows if needed."""
    font_size = max(13, min(image.shape[:2]) // 22)
    font, cell = ImageFont.load_default(font_size), round(1.7 * font_size)
    per_row = max(1, image.shape[1] // cell)
    page, num_rows = Image.fromarray(image), -(-len(labels) // per_row)
    draw = ImageDraw.Draw(page)
    for i, (label, color) in enumerate(zip(labels, colors, strict=True)):
        x, y = i % per_row * cell, image.shape[0] - (num_rows - i // per_row) * cell
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(16, 16, 18))
        draw.text((x + cell / 2, y + cell / 2), label, color, font=font, anchor="mm")
    return np.asarray(page)


def _fit(image: np.ndarray, height: int) -> np.ndarray:
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    width = max(24, round(image.shape[1] * height / image.shape[0]))
    return cv2.resize(image, (width, height), interpolation=interpolation)
