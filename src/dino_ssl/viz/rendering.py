"""Attention maps as images: heat maps, overlays, masks, and sheets of labeled panels."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dino_ssl.files import atomic_write
from dino_ssl.viz.attention import AttentionMaps, Point

Color = tuple[int, int, int]
Panel = tuple[str, np.ndarray]
"""A label and an image, uint8 [H, W, 3]."""

EDGE = (255, 214, 84)
INK = (38, 38, 42)
GAP, MARGIN, SHEET_WIDTH = 6, 20, 1440
MAX_PANEL_HEIGHT = 320
PANELS_PER_ROW, MAX_PANELS_PER_ROW = 6, 12
"""Panels in a row of the sheet of one image, and at most in a row of several images, side by side if they are few."""
PNG_LEVEL = 1
"""Of zlib: a quarter of the time of the default, level 6, for files that are a fifth larger."""

# -- single maps -------------------------------------------------------------------------------------------


def heat_map(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a map [h, w] as an image [*shape, 3] uint8, scaled from its minimum to its maximum."""
    return colormaps["magma"](_level(values, shape), bytes=True)[..., :3]


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the map drawn over the image, which is gray and dark where the map is low."""
    shape = image.shape[:2]
    level = _level(values, shape)[..., None]
    alpha = 0.75 * level**1.2
    lit = image * level + (0.35 * image + 0.36 * _gray(image)) * (1 - level)
    return np.clip(lit * (1 - alpha) + heat_map(values, shape) * alpha, 0, 255).astype(np.uint8)


def cutout(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image inside of the mask [h, w], dark gray outside, with a line at the edge of its patches."""
    height, width = image.shape[:2]
    inside = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    canvas = np.where(inside[..., None] > 0, image, 0.22 * _gray(image)).astype(np.uint8)
    edges, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(canvas, edges, -1, EDGE, max(1, min(height, width) // 160))


def draw_marker(image: np.ndarray, point: Point | None, color: Color = EDGE) -> np.ndarray:
    """Return the image with a ring around the point; unchanged without a point."""
    if point is None:
        return image
    center, radius = (round(point[0]), round(point[1])), max(4, min(image.shape[:2]) // 40)
    canvas = cv2.circle(image.copy(), center, radius, (20, 20, 20), max(3, radius // 2), cv2.LINE_AA)
    return cv2.circle(canvas, center, radius, color, max(1, radius // 4), cv2.LINE_AA)


# -- several maps in one image -----------------------------------------------------------------------------


def palette(count: int) -> list[Color]:
    """Return distinct bright colors, whose hues are multiples of the golden ratio: red, blue, green, magenta, ..."""
    hues = 0.618034 * np.arange(count) % 1
    colors = hsv_to_rgb(np.stack([hues, np.full(count, 0.75), np.ones(count)], axis=1))
    return [tuple(color) for color in (255 * colors).round().astype(int).tolist()]


def color_maps(
    image: np.ndarray, maps: Iterable[np.ndarray], masks: Iterable[np.ndarray], colors: Sequence[Color]
) -> np.ndarray:
    """Return several maps [n, h, w] in one image, each inside its mask and in its own color (Fig. 3 and 8).

    A map's strength is relative to its own 95th percentile inside the mask. Where masks overlap, the strongest map
    is drawn. The image is dark outside of all masks.
    """
    shape, gray = image.shape[:2], _gray(image)
    canvas, strongest = np.repeat(0.4 * gray, 3, axis=2), np.zeros((*shape, 1), np.float32)
    for values, mask, color in zip(maps, masks, colors, strict=True):
        level = np.clip(values / max(float(np.quantile(values[mask], 0.95)), 1e-12), 0, 1)
        level = _resize(np.where(mask, 0.3 + 0.7 * level, 0), shape)[..., None]
        tint = (0.45 + 0.55 * gray / 255) * np.array(color, np.float32)  # keeps the brightness of the image
        canvas = np.where(level > strongest, 0.4 * gray * (1 - 0.9 * level) + 0.9 * level * tint, canvas)
        strongest = np.maximum(strongest, level)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def color_heads(maps: AttentionMaps) -> np.ndarray:
    """Return every head's mask in its own color in one image, with the head numbers below (Fig. 3)."""
    colors = palette(len(maps.heads))
    page = Image.fromarray(color_maps(maps.display, maps.heads, maps.masks, colors))
    font_size = max(13, min(page.size) // 16)
    step, top = min(1.7 * font_size, page.width / len(colors)), page.height - 1.7 * font_size
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(font_size)
    draw.rectangle((0, top, step * len(colors), page.height), (16, 16, 18))
    for i, (head, color) in enumerate(zip(maps.head_ids, colors, strict=True)):
        draw.text(((i + 0.5) * step, (top + page.height) / 2), str(head), color, font, "mm")
    return np.asarray(page)


# -- panels and sheets -------------------------------------------------------------------------------------


def panels(maps: AttentionMaps | Sequence[AttentionMaps]) -> list[Panel]:
    """Return the panels of one image.

    Of one query: the input, mean (or similarity), overlay, mask, the colored heads, and each head. Of several points:
    the input with the points, their mean attention in their colors in one image (Fig. 8), and that of each point.
    """
    if not isinstance(maps, AttentionMaps):
        return panels(maps[0]) if len(maps) == 1 else _point_panels(maps)
    shape, several = maps.display.shape[:2], len(maps.heads) > 1
    mean = maps.kind if maps.kind == "similarity" else "mean" if several else f"head {maps.head_ids[0]}"
    result = [
        ("image", draw_marker(maps.display, maps.point)),
        (mean, heat_map(maps.mean, shape)),
        ("overlay", overlay(maps.display, maps.mean)),
        (f"mask {maps.mass:.0%}", cutout(maps.display, maps.mask)),
    ]
    if several:
        result.append(("heads", color_heads(maps)))
        result += [(f"head {i}", heat_map(head, shape)) for i, head in zip(maps.head_ids, maps.heads, strict=True)]
    return result


def _point_panels(points: Sequence[AttentionMaps]) -> list[Panel]:
    colors = palette(len(points))
    image, means, masks = points[0].display, [maps.mean for maps in points], [maps.mask for maps in points]
    together, alone = color_maps(image, means, masks, colors), []
    for maps, color in zip(points, colors, strict=True):
        image, together = draw_marker(image, maps.point, color), draw_marker(together, maps.point, color)
        alone.append(draw_marker(color_maps(maps.display, [maps.mean], [maps.mask], [color]), maps.point, color))
    numbered = [(f"point {number}", drawn) for number, drawn in enumerate(alone, 1)]
    return [("image", image), ("points", together), *numbered]


def video_frame(maps: Sequence[AttentionMaps]) -> np.ndarray:
    """Return one video frame side by side with its mean attention and colored heads, or with its colored points."""
    shown = ("image", "overlay", "heads", "points")
    return np.concatenate([image for name, image in panels(maps) if name in shown], axis=1)


def sheet(blocks: Sequence[Sequence[Panel]]) -> np.ndarray:
    """Return labeled panels as one image [H, W <= SHEET_WIDTH, 3] uint8; a block has the panels of one image.

    A block has rows of equal length, as 4 + 4; blocks of few panels are next to each other. All panels have one size.
    """
    count, per_row = max(map(len, blocks)), PANELS_PER_ROW if len(blocks) == 1 else MAX_PANELS_PER_ROW
    rows = math.ceil(count / per_row)
    columns = math.ceil(count / rows)
    across = min(len(blocks), max(1, round(0.75 * MAX_PANELS_PER_ROW / columns)))
    aspect = float(np.mean([image.shape[1] / image.shape[0] for block in blocks for _, image in block]))
    available = (SHEET_WIDTH - (across + 1) * MARGIN) // (across * columns) - GAP
    width = max(24, min(available, round(MAX_PANEL_HEIGHT * aspect)))
    height, font_size = round(width / aspect), min(22, max(13, width // 9))
    label_height = round(1.6 * font_size)
    step, line = width + GAP, height + label_height + GAP
    block_width, block_height = columns * step - GAP + MARGIN, rows * line + (MARGIN if rows > 1 else 0)
    size = (MARGIN + across * block_width, 2 * MARGIN + math.ceil(len(blocks) / across) * block_height)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(font_size)
    for number, block in enumerate(blocks):
        for i, (label, image) in enumerate(block):
            x = MARGIN + number % across * block_width + i % columns * step
            y = MARGIN + number // across * block_height + i // columns * line
            draw.text((x, y), keep_end(label, round(1.8 * width / font_size)), INK, font)
            page.paste(ImageOps.contain(Image.fromarray(image), (width, height)), (x, y + label_height))
    return np.asarray(page)


def save_image(path: Path, image: np.ndarray, **options: Any) -> Path:
    """Write [H, W, 3] or [H, W] uint8 in the format of the suffix, atomically. options: of PIL's `Image.save`."""
    options = {"format": Image.registered_extensions()[path.suffix.lower()], "compress_level": PNG_LEVEL, **options}
    return atomic_write(path, lambda part: Image.fromarray(image).save(part, **options))


def save_array(path: Path, array: np.ndarray) -> Path:
    """Write an array as .npy, atomically."""

    def write(part: Path) -> None:
        with part.open("wb") as file:  # numpy would append a suffix to a path
            np.save(file, array)

    return atomic_write(path, write)


def keep_end(text: str, limit: int) -> str:
    """Return the text, cut to its last `limit` characters with an ellipsis: file names differ at their ends."""
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


def shorten(text: str, limit: int) -> str:
    """Return the text, cut to `limit` characters with an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _gray(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)


def _level(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a map scaled to 0 .. 1 by its minimum and maximum, and resized."""
    values = values.astype(np.float32) - values.min()
    return _resize(values / max(float(values.max()), 1e-12), shape)


def _resize(level: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.clip(cv2.resize(level.astype(np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)
