"""What happens to a picture on its way through the world: the copies that copy detection must recognise.

After Copydays (Table 4): crops that lose part of the surface, JPEG compression, and "strong" attacks: blur,
rotation, mirroring, print and scan, insertion into another picture. Works on any picture.
"""

import cv2
import numpy as np

Image = np.ndarray  # uint8 [h, w, 3] RGB; a mask is uint8 [h, w]
Rng = np.random.Generator


def crop(image: Image, lost: float, rng: Rng) -> Image:
    """A rectangle of the picture's own proportions, `lost` (0..1) of the surface cut away."""
    height, width = image.shape[:2]
    h, w = cropped(height, width, lost)
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return image[top : top + h, left : left + w].copy()


def cropped(height: int, width: int, lost: float) -> tuple[int, int]:
    """(height, width) of what `crop` leaves."""
    return max(1, round(height * (1 - lost) ** 0.5)), max(1, round(width * (1 - lost) ** 0.5))


def jpeg(image: Image, quality: int) -> Image:
    """Through a JPEG file of this quality (1..100)."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)


def blur(image: Image, share: float = 0.02) -> Image:
    """A Gaussian of this share of the shorter side."""
    return cv2.GaussianBlur(image, (0, 0), max(0.5, share * min(image.shape[:2])))


def rotate(image: Image, degrees: float, fill: tuple[int, int, int] = (255, 255, 255)) -> Image:
    """Turned about its middle, the corners filled, the size kept."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=fill)


def print_scan(image: Image, rng: Rng) -> Image:
    """Printed and scanned: less contrast, a colour cast, uneven light, soft, grainy, a little askew."""
    height, width = image.shape[:2]
    askew = rotate(blur(image, 0.008), float(rng.uniform(-3, 3)), (236, 233, 224)).astype(np.float32)
    cast = rng.uniform(0.86, 1.04, 3).astype(np.float32)
    left, right = rng.uniform(0.85, 1.05, 2)
    shade = np.linspace(left, right, width, dtype=np.float32)[None, :, None]
    paper = (34 + askew * 0.78) * cast * shade
    paper += rng.standard_normal((height, width, 1), np.float32) * 5
    return np.clip(paper, 0, 255).astype(np.uint8)


def paste(image: Image, into: Image, rng: Rng, share: float = 0.35) -> Image:
    """The picture, shrunk to `share` of the surface, inside another one."""
    height, width = into.shape[:2]
    ratio = min(height / image.shape[0], width / image.shape[1]) * share**0.5
    h, w = (max(1, round(side * ratio)) for side in image.shape[:2])
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    out = into.copy()
    out[top : top + h, left : left + w] = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    return out


def copies(image: Image, rng: Rng, into: Image | None = None) -> dict[str, Image]:
    """Every edit by name, `block_strength`: before the underscore stands the block that Copydays reports.

    `into` is another picture, into which this one is pasted; without it that edit is left out.
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
