"""Masks of the objects in images by a network without labels, on the grid of patches."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from dino_ssl.discovery.methods import TAU, lost, maskcut, tokencut
from dino_ssl.discovery.regions import Found, soft_mask
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.attention_maps import attention_rows, require_attention, top_mass_mask
from dino_ssl.evals.base import evaluating, full_precision
from dino_ssl.models.backbone import Attentive, Backbone

MaskMethod = Literal["tokencut", "maskcut", "lost", "attention"]
MIN_PATCHES = 3
"""An image with fewer patches has no second eigenvector to cut it by."""


@dataclass(frozen=True, kw_only=True)
class ObjectMasks:
    """Settings of a method that finds objects without labels."""

    method: MaskMethod = "tokencut"
    """tokencut, maskcut (several objects) and lost compare the patches; attention is the mask of the [CLS] token's
    attention (Fig. 4)."""
    layer: int = -1
    """Block whose keys or attention are used: 0 is the first, -1 the last."""
    feature: Literal["keys", "queries", "values"] = "keys"
    """Features of the patches that tokencut, maskcut and lost compare; a network without attention has only its last
    feature map."""
    center: bool = True
    """Subtract the mean over the patches of the image from the features, which networks trained on few images need.
    The published methods do not."""
    tau: float | None = None
    """Cosine above which two patches are similar. Default: 0.2 for tokencut, 0.15 for maskcut, as published."""
    objects: int = 3
    """Largest number of objects that maskcut finds in an image."""
    attention_head: int | None = None
    """Head of the attention, counted from 0. Default: the mean of all."""
    mass: float = 0.6
    """Share of the attention that the mask of the method attention holds."""

    def __post_init__(self) -> None:
        check_range(self, "tau", least=-1, below=1)
        check_range(self, "objects", least=1, most=254)  # numbers of objects in a mask
        check_range(self, "attention_head", least=0)
        check_range(self, "mass", above=0, most=1)

    def find(self, backbone: Backbone, images: Tensor) -> list[Found]:
        """Return the objects of each image: normalized [B, 3, H, W] on the network's device, sides of whole patches."""
        grid = images.shape[-2] // backbone.patch, images.shape[-1] // backbone.patch
        if grid[0] * grid[1] < MIN_PATCHES:
            return [Found(np.zeros((0, *grid), bool), np.zeros((0, *grid), np.float32))] * len(images)
        with evaluating(backbone), full_precision(images.device):
            if self.method == "attention":
                return self._attention(require_attention(backbone), images, grid)
            features = patch_features(backbone, images, self.feature, self.layer)
            features = features - features.mean(1, keepdim=True) if self.center else features
            if self.method == "lost":
                return lost(features, grid)
            tau = TAU[self.method] if self.tau is None else self.tau
            return (
                tokencut(features, grid, tau)
                if self.method == "tokencut"
                else maskcut(features, grid, tau, self.objects)
            )

    def _attention(self, backbone: Attentive, images: Tensor, grid: tuple[int, int]) -> list[Found]:
        rows = attention_rows(backbone, images, [0], self.layer)[:, 0].cpu().numpy()  # [B, heads, N]
        head, count = self.attention_head, rows.shape[1]
        if head is not None and head >= count:
            raise UserError(f"`attention_head` must be in 0 .. {count - 1} for this network; got {head}.")
        maps = rows.mean(1) if head is None else rows[:, head]
        found = []
        for values, mask in zip(maps, top_mass_mask(maps, self.mass), strict=True):
            threshold = np.nextafter(values[mask].min(), -1, dtype=values.dtype)
            values, mask = values.reshape(grid), mask.reshape(grid)
            found.append(Found(mask[None], soft_mask(values, float(threshold), mask)[None]))
        return found


def patch_features(backbone: Backbone, images: Tensor, kind: str = "keys", layer: int = -1) -> Tensor:
    """Return the keys (queries, values) of the patches over all heads, or a ConvNet's feature map: [B, h w, D]."""
    if not isinstance(backbone, Attentive):
        return backbone.features(images)[0].patches.flatten(1, 2)
    projected: Tensor = getattr(backbone.projections(images, layer), kind)
    return projected[:, :, 1 + backbone.registers :].transpose(1, 2).flatten(2)
