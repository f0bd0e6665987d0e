"""Distortions for copy detection, after Copydays (Table 4).

Crops, JPEG compression, and "strong" ones: blur, rotation, mirroring, print and scan, pasting into another image.
"""

import cv2
import numpy as np

Image = np.ndarray  # uint8 [h, w, 3] RGB; a mask is uint8 [h, w]
Rng = np.random.Generator
VERSION = 1
"""Of the distortions, in the cache keys of distorted images."""


def crop(image: Image, lost: float, rng: Rng) -> Image:
    """Crop a random rectangle of the same aspect ratio that removes the fraction `lost` (0 to 1) of the area."""
    height, width = image.shape[:2]
    h, w = cropped(height, width, lost)
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return image[top : top + h, left : left + w].copy()


def cropped(height: int, width: int, lost: float) -> tuple[int, int]:
    """Return (height, width) of the result of `crop`."""
    return max(1, round(height * (1 - lost) ** 0.5)), max(1, round(width * (1 - lost) ** 0.5))


def jpeg(image: Image, quality: int) -> Image:
    """Compress as a JPEG of this quality (1 to 100) and decode."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)


def blur(image: Image, share: float = 0.02) -> Image:
    """Blur by a Gaussian with a standard deviation of this share of the shorter side."""
    return cv2.GaussianBlur(image, (0, 0), max(0.5, share * min(image.shape[:2])))


def rotate(image: Image, degrees: float, fill: tuple[int, int, int] = (255, 255, 255)) -> Image:
    """Rotate about the center; keep the size and fill the corners."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=fill)


def print_scan(image: Image, rng: Rng) -> Image:
    """Simulate print and scan: lower contrast, color cast, uneven light, blur, grain, slight rotation."""
    height, width = image.shape[:2]
    rotated = rotate(blur(image, 0.008), float(rng.uniform(-3, 3)), (236, 233, 224)).astype(np.float32)
    cast = rng.uniform(0.86, 1.04, 3).astype(np.float32)
    left, right = rng.uniform(0.85, 1.05, 2)
    shade = np.linspace(left, right, width, dtype=np.float32)[None, :, None]
    paper = (34 + rotated * 0.78) * cast * shade
    paper += rng.standard_normal((height, width, 1), np.float32) * 5
    return np.clip(paper, 0, 255).astype(np.uint8)


def paste(image: Image, into: Image, rng: Rng, share: float = 0.35) -> Image:
    """Paste the image, shrunk to at most `share` of the area, at a random position of another one."""
    height, width = into.shape[:2]
    ratio = min(height / image.shape[0], width / image.shape[1]) * share**0.5
    h, w = (max(1, round(side * ratio)) for side in image.shape[:2])
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    out = into.copy()
    out[top : top + h, left : left + w] = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    return out


def copies(image: Image, rng: Rng, into: Image | None = None) -> dict[str, Image]:
    """Return every distortion by its name `block_strength`, where block is the one that Copydays reports.

    `into` is the image that strong_paste pastes into; without it, strong_paste is omitted.
    """
    out = {f"crop_{lost}": crop(image, lost / 100, rng) for lost in (10, 20, 30, 50, 80)}
    out |= {f"jpeg_{quality}": jpeg(image, quality) for quality in (75, 30, 15, 8, 3)}
    out |= {
        "strong_blur": blur(image, 0.03),
        "strong_rotate": rotate(image, float(rng.choice([-1, 1]) * rng.uniform(10, 30))),
        "strong_mirror": np.ascontiguousarray(image[:, ::-1]),
        "strong_print": print_scan(image, rng),
    }
    if into is not None:
        out["strong_paste"] = paste(image, into, rng)
    return out
