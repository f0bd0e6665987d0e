"""Attention as pictures: heat maps, overlays, contours, and the figure that lays them side by side."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from dino.analysis.attention import Attention
from dino.files import write_whole

PAPER, INK, FAINT = (255, 255, 255), (38, 38, 42), (120, 120, 128)
EDGE = (255, 214, 84)
GAP, MARGIN, LABEL = 6, 20, 30


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


def mark(picture: np.ndarray, point: tuple[float, float] | None) -> np.ndarray:
    """The picture with a ring around the query's point; unchanged for [CLS]."""
    if point is None:
        return picture
    center, radius = (round(point[0]), round(point[1])), max(4, min(picture.shape[:2]) // 40)
    drawn = picture.copy()
    cv2.circle(drawn, center, radius, (20, 20, 20), max(3, radius // 2), cv2.LINE_AA)
    return cv2.circle(drawn, center, radius, EDGE, max(1, radius // 4), cv2.LINE_AA)


def panels(seen: Attention) -> list[tuple[str, np.ndarray]]:
    """(name, picture) of everything there is to show: the picture, mean, overlay, mask, then each head."""
    shape = seen.picture.shape[:2]
    found = [
        ("picture", mark(seen.picture, seen.point)),
        ("mean", heat(seen.mean, shape)),
        ("overlay", overlay(seen.picture, seen.mean)),
        (f"mask {seen.mass:.0%}", cutout(seen.picture, seen.mask)),
    ]
    if len(seen.heads) > 1:
        found += [(f"head {i}", heat(head, shape)) for i, head in enumerate(seen.heads)]
    return found


def figure(seen: Sequence[Attention], *, height: int = 224, names: Sequence[str] = ()) -> np.ndarray:
    """One row per picture: picture | mean | overlay | mask | each head, [H, W, 3] uint8. Rows may differ in
    shape.
    """
    rows = []
    for attention in seen:
        drawn = panels(attention)
        scale = height / attention.picture.shape[0]
        width = max(24, round(attention.picture.shape[1] * scale))
        rows.append([(name, _fit(image, height, width)) for name, image in drawn])
    across = max(sum(image.shape[1] + GAP for _, image in row) for row in rows) + 2 * MARGIN
    down = len(rows) * (height + LABEL + GAP) + 2 * MARGIN
    page = Image.new("RGB", (across, down), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, row in enumerate(rows):
        x, y = MARGIN, MARGIN + i * (height + LABEL + GAP)
        for j, (name, image) in enumerate(row):
            named = names[i] if j == 0 and i < len(names) else name
            draw.text((x, y + 6), _short(named, image.shape[1] // 7), INK if j == 0 else FAINT, font=font)
            page.paste(Image.fromarray(image), (x, y + LABEL - 4))
            x += image.shape[1] + GAP
    return np.asarray(page)


def save(path: Path, image: np.ndarray, **options) -> Path:
    """Writes [H, W, 3] or [H, W] uint8 as the file type that the name says, whole or not at all."""
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix.lower()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, lambda aside: Image.fromarray(image).save(aside, format=kind, **options))


def _colored(level: np.ndarray, shape: tuple[int, int], colors: str, smooth: bool) -> np.ndarray:
    table = (colormaps[colors](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table[(_resize(level, shape, smooth) * 255).round().astype(np.uint8)]


def _resize(level: np.ndarray, shape: tuple[int, int], smooth: bool) -> np.ndarray:
    how = cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST
    return np.clip(cv2.resize(level.astype(np.float32), shape[::-1], interpolation=how), 0, 1)


def _fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = height < image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _short(name: str, limit: int) -> str:
    return name if len(name) <= max(limit, 4) else f"{name[: max(limit, 4) - 1]}…"
