"""Edge-aware refinement of coarse masks: the guided filter (He, Sun and Tang, 2010)."""

import cv2
import numpy as np


def guided_filter(guide: np.ndarray, values: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """Return values [H, W] that are locally affine in the guide [H, W, 3], so that their edges follow its edges.

    In each window of 2 radius + 1 pixels, values = a . color + b by least squares with the penalty eps |a|^2; a pixel
    averages the a and b of all windows around it. guide, values: float32 in 0 .. 1.
    """

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)

    center, level = mean(guide), mean(values)
    rows = [mean(guide * guide[..., i : i + 1]) - center * center[..., i : i + 1] for i in range(3)]
    for i in range(3):
        rows[i][..., i] += eps
    correlation = mean(guide * values[..., None]) - center * level[..., None]
    cofactors = [np.cross(rows[1], rows[2]), np.cross(rows[2], rows[0]), np.cross(rows[0], rows[1])]
    determinant = (rows[0] * cofactors[0]).sum(-1)
    slope = np.stack([(correlation * each).sum(-1) / determinant for each in cofactors], axis=-1)  # Cramer's rule
    offset = level - (slope * center).sum(-1)
    return (mean(slope) * guide).sum(-1) + mean(offset)


def refine(image: np.ndarray, soft: np.ndarray, cell: float, eps: float = 1e-4) -> np.ndarray:
    """Return a soft mask [h, w] at the size of the image [H, W, 3] uint8, with its 0.5 level along edges of the image.

    cell: pixels of the image per cell of the mask, twice the radius of the filter. Returns float32 [H, W] in 0 .. 1.
    """
    height, width = image.shape[:2]
    large = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)
    guide = image.astype(np.float32) / 255
    return np.clip(guided_filter(guide, large, max(1, round(cell / 2)), eps), 0, 1)
