"""Principal components of features, and patches in three of them as colours: what a network holds for alike.

Legend: N rows, D width, k components, h x w places of a picture's map.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_masks import resize_to_patches
from dino_ssl.evals.base import evaluating
from dino_ssl.models.backbone import Backbone
from dino_ssl.viz.attention import enlarged

MAX_NUMBERS = 2**28
"""Numbers of all patches' features that are kept at once: 1 GiB, or 190 pictures of ViT-S/8 at 480 pixels."""
CLIPPED = 0.01
"""Share of the patches at either end of a component that get the darkest or the brightest colour."""


class Components(NamedTuple):
    """Directions of the largest variance, the largest first."""

    mean: Tensor  # [D]
    directions: Tensor  # [k, D], orthonormal
    variance: Tensor  # [k], of the rows along each direction

    def of(self, rows: Tensor) -> Tensor:
        """[N, D] -> [N, k]: the rows along the directions, from the mean."""
        return (rows - self.mean) @ self.directions.T


def components(rows: Tensor, count: int) -> Components:
    """Principal components of rows [N, D]; k is `count`, or what N and D allow.

    Through the D x D covariance in float64, so that memory does not grow with N. A direction's sign is free: it
    is the one with which its largest entry is positive, so that the same rows give the same colours anywhere.
    """
    rows = rows.float()
    mean, total = rows.mean(dim=0), 0
    for part in rows.split(4096):
        part = (part - mean).double()
        total = total + part.T @ part
    values, vectors = torch.linalg.eigh(torch.as_tensor(total) / max(len(rows), 1))
    k = min(count, *rows.shape)
    directions = vectors.flip(1)[:, :k].T
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return Components(mean, (directions * largest.sign()).float(), values.flip(0)[:k].clamp(min=0).float())


@dataclass(frozen=True)
class PatchColours:
    """One picture, and the colour of each of its patches."""

    shown: np.ndarray  # the picture at a whole multiple of what the network saw, as `attention.enlarged` makes it
    colours: np.ndarray  # [h, w, 3] float32 in 0 .. 1: the three components
    foreground: np.ndarray  # [h, w] bool: everything where no threshold was given


def patch_colours(
    backbone: Backbone,
    images: Iterable[np.ndarray],
    *,
    size: int = 480,
    foreground: float | None = None,
) -> tuple[list[PatchColours], list[float]]:
    """The last layer's patches in the three first components of all pictures' patches together, as red, green, blue;
    and each component's share of the variance. images: uint8 [H, W, 3] RGB, read when their turn comes.

    foreground: patches whose first component, moved to 0 .. 1, is below it are left out, and the components are
    those of the rest. The component's sign says nothing: the side that has less of the pictures' borders is kept.
    """
    if foreground is not None and not 0 < foreground < 1:
        raise UserError(f"foreground must lie between 0 and 1, e.g. 0.5; received {foreground:g}.")
    shown: list[np.ndarray] = []
    maps: list[Tensor] = []  # [h, w, D] each
    for image in images:
        picture = resize_to_patches(image, size, backbone.patch)
        shown.append(enlarged(image, picture))
        maps.append(_patches(backbone, picture))
        if sum(map(Tensor.numel, maps)) > MAX_NUMBERS:
            raise UserError(
                f"The patches of {len(maps)} pictures take more than {MAX_NUMBERS * 4 / 2**30:.0f} GiB, and not all "
                "are there yet: give fewer pictures, or a smaller size."
            )
    if not maps:
        raise UserError("None of the pictures could be read.")
    rows = torch.cat([each.flatten(0, 1) for each in maps])
    kept = _foreground(rows, maps, foreground) if foreground is not None else torch.ones(len(rows), dtype=torch.bool)
    found = components(rows[kept], 3)
    colours = torch.zeros(len(rows), 3)
    colours[kept, : len(found.directions)] = unit_range(found.of(rows[kept]))
    spread = rows[kept].var(dim=0, correction=0).sum()
    share = (found.variance / spread.clamp(min=1e-12)).tolist()
    places = [each.shape[0] * each.shape[1] for each in maps]
    return [
        PatchColours(picture, colour.reshape(*each.shape[:2], 3).numpy(), mask.reshape(each.shape[:2]).numpy())
        for picture, each, colour, mask in zip(shown, maps, colours.split(places), kept.split(places), strict=True)
    ], share


def unit_range(values: Tensor, clipped: float = CLIPPED) -> Tensor:
    """[N, k] -> [N, k] in 0 .. 1, each column by itself; the outermost share of rows is clipped, or one patch would
    take all the range."""
    ordered = values.sort(dim=0).values
    last = len(values) - 1
    low, high = ordered[round(clipped * last)], ordered[round((1 - clipped) * last)]
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def _foreground(rows: Tensor, maps: Sequence[Tensor], threshold: float) -> Tensor:
    """Which rows lie above the threshold along the first component, turned so that borders lie low. bool [N]"""
    first = unit_range(components(rows, 1).of(rows))[:, 0]
    border = torch.cat([_border(each.shape[0], each.shape[1]).flatten() for each in maps])
    if border.any() and not border.all() and first[border].mean() > first[~border].mean():
        first = 1 - first
    kept = first >= threshold
    if not kept.any():
        raise UserError(f"No patch is left above a foreground threshold of {threshold:g}: take a lower one.")
    return kept


def _border(h: int, w: int) -> Tensor:
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def _patches(backbone: Backbone, picture: np.ndarray) -> Tensor:
    """[h, w, D] float32 on the CPU: the last layer's map."""
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1))[None]
    with evaluating(backbone):
        device = next(backbone.parameters()).device
        return backbone.features(normalize(torch.from_numpy(planes).to(device)))[0].patches[0].float().cpu()
