"""Edge-aware refinement of coarse masks: the guided filter (He, Sun and Tang, 2010; fast: He and Sun, 2015)."""

import cv2
import numpy as np

MAX_RADIUS = 8
"""Windows of a larger radius are fitted on a smaller copy of the image: 12 megapixels in 1 instead of 8 seconds."""


def guided_filter(guide: np.ndarray, values: np.ndarray, radius: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the a [H, W, 3] and b [H, W] of the filtered values a . color + b, which has edges where the guide has.

    In each window of 2 radius + 1 pixels, values = a . color + b by least squares with the penalty eps |a|^2; a pixel
    averages the a and b of all windows around it. guide [H, W, 3], values [H, W]: float32 in 0 .. 1.
    """

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)

    r, g, b = planes = [np.ascontiguousarray(guide[..., channel]) for channel in range(3)]
    mr, mg, mb = centers = [mean(plane) for plane in planes]
    level = mean(values)
    rr, gg, bb = (mean(x * x) - m * m + eps for x, m in zip(planes, centers, strict=True))
    rg, rb, gb = mean(r * g) - mr * mg, mean(r * b) - mr * mb, mean(g * b) - mg * mb
    pr, pg, pb = (mean(x * values) - m * level for x, m in zip(planes, centers, strict=True))
    # the inverse of the symmetric covariance by its cofactors
    crr, crg, crb = gg * bb - gb * gb, rb * gb - rg * bb, rg * gb - rb * gg
    cgg, cgb, cbb = rr * bb - rb * rb, rg * rb - rr * gb, rr * gg - rg * rg
    determinant = rr * crr + rg * crg + rb * crb
    slope = [
        (crr * pr + crg * pg + crb * pb) / determinant,
        (crg * pr + cgg * pg + cgb * pb) / determinant,
        (crb * pr + cgb * pg + cbb * pb) / determinant,
    ]
    offset = level - sum(a * m for a, m in zip(slope, centers, strict=True))
    return np.stack([mean(a) for a in slope], axis=-1), mean(offset)


def refine(image: np.ndarray, soft: np.ndarray, cell: float, eps: float = 1e-4) -> np.ndarray:
    """Return a soft mask [h, w] at the size of the image [H, W, 3] uint8, with its 0.5 level along edges of the image.

    cell: pixels of the image per cell of the mask, twice the radius of the filter. Returns float32 [H, W] in 0 .. 1.
    """
    height, width = image.shape[:2]
    times = max(1.0, cell / 2 / MAX_RADIUS)
    size = max(1, round(width / times)), max(1, round(height / times))
    small = image if times == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    values = cv2.resize(soft, size, interpolation=cv2.INTER_LINEAR)
    slope, offset = guided_filter(small.astype(np.float32) / 255, values, max(1, round(cell / 2 / times)), eps)
    if times > 1:
        slope, offset = (cv2.resize(x, (width, height), interpolation=cv2.INTER_LINEAR) for x in (slope, offset))
    filtered = np.einsum("hwc,hwc->hw", slope, image, dtype=np.float32) / 255 + offset
    return np.clip(filtered, 0, 1)
