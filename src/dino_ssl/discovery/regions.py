"""Connected regions of patches, their boxes, and soft masks.

Masks are bool [h, w]; boxes are (left, top, right, bottom) in pixels, right and bottom excluded.
"""

from typing import NamedTuple

import cv2
import numpy as np

Box = tuple[float, float, float, float]


class Found(NamedTuple):
    """The objects of one image on the grid of patches, the most salient first."""

    masks: np.ndarray
    """[n, h, w] bool."""
    soft: np.ndarray
    """[n, h, w] float32 in 0 .. 1: above 0.5 inside of the masks."""


def component_at(mask: np.ndarray, seed: int) -> np.ndarray:
    """Return the region of patches with a common side in a bool mask [h, w] that contains the patch `seed`."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return mask & (labels == labels.flat[seed])


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest region of patches with a common side; an empty mask unchanged."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    sizes = np.bincount(labels[mask], minlength=1)
    return mask & (labels == sizes.argmax())


def box_of(mask: np.ndarray, cell: int = 1, size: tuple[int, int] | None = None) -> Box:
    """Return the box around a mask whose cells have `cell` pixels, clipped to an image of `size` (height, width)."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    height, width = size or (cell * side for side in mask.shape)
    right, bottom = cell * (int(columns[-1]) + 1), cell * (int(rows[-1]) + 1)
    return float(cell * columns[0]), float(cell * rows[0]), float(min(right, width)), float(min(bottom, height))


def soft_mask(values: np.ndarray, threshold: float, mask: np.ndarray) -> np.ndarray:
    """Return values [h, w] on a scale of 0 .. 1 with the threshold at 0.5; at most 0.5 outside of the mask."""
    above, below = (max(float(side.max()), 1e-12) for side in (values - threshold, threshold - values))
    soft = 0.5 + 0.5 * np.where(values > threshold, (values - threshold) / above, (values - threshold) / below)
    return np.where(mask, soft, np.minimum(soft, 0.5)).astype(np.float32)
