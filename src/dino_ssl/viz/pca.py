"""Principal components of features, and patches colored by their first three components.

N rows, D width, k components, h x w patches of an image.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dino_ssl.errors import UserError, check_value
from dino_ssl.evals.attention_maps import resize_to_patches
from dino_ssl.models.backbone import Backbone
from dino_ssl.viz.attention import display_image, last_features

MAX_VALUES = 2**28
"""Maximum number of float32 values of all patch features: 1 GiB, or 190 images of ViT-S/8 at 480 pixels."""
CLIPPED = 0.01
"""Share of the patches at either end of a component that get the darkest or the brightest color."""


class Components(NamedTuple):
    """Directions of the largest variance, in descending order."""

    mean: Tensor  # [D]
    directions: Tensor  # [k, D], orthonormal
    variance: Tensor  # [k], of the rows along each direction

    def project(self, rows: Tensor) -> Tensor:
        """Return the centered rows [N, D] along the directions: [N, k]."""
        return (rows - self.mean) @ self.directions.T


def principal_components(rows: Tensor, count: int) -> Components:
    """Return the first `count` principal components of rows [N, D], fewer if N or D is smaller.

    They come from the D x D covariance in float64, so memory does not grow with N. Each direction's sign is chosen
    so that its largest entry is positive: the same rows give the same result on every machine.
    """
    rows = rows.float()
    mean, covariance = rows.mean(dim=0), rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(4096):
        centered = (part - mean).double()
        covariance += centered.T @ centered / len(rows)
    values, vectors = torch.linalg.eigh(covariance)
    k = min(count, *rows.shape)
    directions = vectors.flip(1)[:, :k].T
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return Components(mean, (directions * largest.sign()).float(), values.flip(0)[:k].clamp(min=0).float())


@dataclass(frozen=True)
class PatchColors:
    """One image and the color of each of its patches."""

    display: np.ndarray  # the image as `attention.display_image` returns it
    colors: np.ndarray  # [h, w, 3] float32 in 0 .. 1: the three components; the background is 0
    foreground: np.ndarray  # [h, w] bool: all True without a threshold

    def draw(self) -> np.ndarray:
        """Return the colors as square patches, uint8 of the shape of `display`."""
        height, width = self.display.shape[:2]
        return cv2.resize(
            (255 * self.colors).round().astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST
        )


def patch_colors(
    backbone: Backbone, images: Iterable[np.ndarray], *, size: int = 480, foreground: float | None = None
) -> tuple[list[PatchColors], list[float]]:
    """Color the patches of all images by the first three principal components of their last-layer features.

    Returns the colors of each image, and each component's share of the variance.

    images: uint8 [H, W, 3] RGB, read one at a time. size: short side of the network input in pixels. foreground:
    threshold in (0, 1) on the first component, scaled to 0 .. 1. Patches below it are background, and the components
    are those of the others. The sign of a component is arbitrary: the side with fewer border patches is kept.
    """
    check_value("foreground", foreground, above=0, below=1)
    displays: list[np.ndarray] = []
    maps: list[Tensor] = []  # [h, w, D] each
    for image in images:
        resized = resize_to_patches(image, size, backbone.patch)
        displays.append(display_image(image, resized))
        maps.append(last_features(backbone, resized).patches[0].float().cpu())
        if sum(map(Tensor.numel, maps)) > MAX_VALUES:
            raise UserError(f"The features of {len(maps)} images exceed 1 GiB: use fewer images, or a smaller `size`.")
    rows = torch.cat([patches.flatten(0, 1) for patches in maps])
    kept = torch.ones(len(rows), dtype=torch.bool) if foreground is None else _foreground(rows, maps, foreground)
    components = principal_components(rows[kept], 3)
    colors = torch.zeros(len(rows), 3)
    colors[kept, : len(components.directions)] = unit_range(components.project(rows[kept]))
    variance = rows[kept].var(dim=0, correction=0).sum()
    counts = [patches[..., 0].numel() for patches in maps]
    results = [
        PatchColors(display, color.reshape(*patches.shape[:2], 3).numpy(), mask.reshape(patches.shape[:2]).numpy())
        for display, patches, color, mask in zip(displays, maps, colors.split(counts), kept.split(counts), strict=True)
    ]
    return results, (components.variance / variance.clamp(min=1e-12)).tolist()


def unit_range(values: Tensor) -> Tensor:
    """Scale each column of [N, k] to 0 .. 1 and clip the outermost rows, so that outliers do not take all the range."""
    ordered, last = values.sort(dim=0).values, len(values) - 1
    low, high = ordered[round(CLIPPED * last)], ordered[round((1 - CLIPPED) * last)]
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def _foreground(rows: Tensor, maps: list[Tensor], threshold: float) -> Tensor:
    """Return which rows are above the threshold along the first component, as bool [N]."""
    first = unit_range(principal_components(rows, 1).project(rows))[:, 0]
    borders = [torch.ones(patches.shape[:2], dtype=torch.bool) for patches in maps]
    for border in borders:
        border[1:-1, 1:-1] = False
    border = torch.cat([border.flatten() for border in borders])
    if not border.all() and first[border].mean() > first[~border].mean():
        first = 1 - first
    if not (first >= threshold).any():
        raise UserError(f"No patch is above the `foreground` threshold of {threshold:g}: use a lower one.")
    return first >= threshold
