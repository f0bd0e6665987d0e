"""LOST, TokenCut and MaskCut: the objects of images from the features of their patches, usually the last keys of a ViT.

Shapes: B images, N = h w patches, D dimensions. Features are [B, N, D]; each method returns one `Found` per image.
"""

import numpy as np
import torch
from torch import Tensor

from dino_ssl.discovery.regions import Found, component_at, soft_mask
from dino_ssl.discovery.spectral import binary_graph, second_eigenvector

Grid = tuple[int, int]
"""Rows and columns of patches."""
TAU = {"tokencut": 0.2, "maskcut": 0.15}
"""Cosine above which two patches are similar, as published."""
MAX_SEEDS = 100
"""Patches of the lowest degree that may expand LOST's seed, as published."""
MAX_OVERLAP, MIN_SHARE = 0.5, 0.01
"""MaskCut stops at an object that overlaps more with the previous one, or has no larger share of the patches."""


def lost(features: Tensor, grid: Grid) -> list[Found]:
    """LOST (Siméoni et al., 2021): the object is what correlates with the patches that correlate with few others.

    Two patches correlate if the product of their features is positive. The seed is the patch with the fewest others
    that correlate with it. It is expanded by those of the 100 patches of the lowest degree that correlate with it. The
    mask is the region around the seed of patches whose products with all of these have a positive sum.
    """
    products = features.float() @ features.float().mT
    degree = (products > 0).sum(-1) - (products.diagonal(dim1=1, dim2=2) > 0).long()
    order = degree.argsort(dim=-1, stable=True)  # of equal degrees the first patch
    found = []
    for product, ranked in zip(products, order, strict=True):
        candidates = ranked[:MAX_SEEDS]
        similar = candidates[product[ranked[0], candidates] > 0]
        sums = product[similar].sum(0).reshape(grid).cpu().numpy()
        mask = component_at(sums > 0, int(ranked[0]))
        found.append(_single(mask, soft_mask(sums, 0, mask)))
    return found


def tokencut(features: Tensor, grid: Grid, tau: float = TAU["tokencut"]) -> list[Found]:
    """TokenCut (Wang et al., 2022): the side of the normalized cut with the largest absolute eigenvector entry.

    The mask is the region around the patch of that entry among the patches on its side of the mean.
    """
    found = []
    for vector in _eigenvectors(features, tau):
        seed = int(np.abs(vector).argmax())
        vector = vector if vector[seed] > vector.mean() else -vector
        found.append(_single(*_cut(vector, seed, grid)))
    return found


def maskcut(features: Tensor, grid: Grid, tau: float = TAU["maskcut"], most: int = 3) -> list[Found]:
    """MaskCut (Wang et al., 2023): up to `most` objects, by TokenCut on the patches that no object has yet.

    The features of found patches are set to zero. A side with three or four corners of the image is the background.
    An image has no further object after one that overlaps with the one before or is tiny; pixels of two objects belong
    to the first.
    """
    masks: list[list[np.ndarray]] = [[] for _ in features]
    soft: list[list[np.ndarray]] = [[] for _ in features]
    active = list(range(len(features)))
    for number in range(most):
        free = torch.tensor(np.stack([_free(masks[i], grid) for i in active]), device=features.device)
        vectors = _eigenvectors(features[active] * free[..., None], tau)
        for i, vector in zip(list(active), vectors, strict=True):
            side = (vector > vector.mean()).reshape(grid)
            corners = int(side[[0, 0, -1, -1], [0, -1, 0, -1]].sum())
            is_background = corners >= 3 or not side.flat[np.abs(vector).argmax()]
            vector = -vector if is_background else vector
            mask, values = _cut(vector, int(vector.argmax()), grid)
            if number and (_iou(mask, masks[i][-1]) > MAX_OVERLAP or mask.mean() <= MIN_SHARE):
                active.remove(i)
                continue
            masks[i].append(mask & _free(masks[i], grid).reshape(grid))
            soft[i].append(np.where(masks[i][-1], values, np.minimum(values, 0.5)))
        if not active:
            break
    return [Found(np.stack(each), np.stack(values)) for each, values in zip(masks, soft, strict=True)]


def _eigenvectors(features: Tensor, tau: float) -> np.ndarray:
    """Return the second eigenvector of each graph [B, N]; on a CPU one by one, which its caches prefer."""
    parts = features.split(1 if features.device.type == "cpu" else len(features))
    return torch.cat([second_eigenvector(binary_graph(part, tau)) for part in parts]).cpu().numpy()


def _cut(vector: np.ndarray, seed: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the region of the seed among the entries above the mean, and the soft mask, [h, w] each."""
    values, mean = vector.reshape(grid), float(vector.mean())
    mask = component_at(values > mean, seed)
    return mask, soft_mask(values, mean, mask)


def _free(masks: list[np.ndarray], grid: Grid) -> np.ndarray:
    """Return the patches [h w] that are in none of the masks."""
    return ~np.any([np.zeros(grid, bool), *masks], axis=0).ravel()


def _iou(mask: np.ndarray, other: np.ndarray) -> float:
    return float((mask & other).sum() / max((mask | other).sum(), 1))


def _single(mask: np.ndarray, soft: np.ndarray) -> Found:
    return Found(mask[None], soft[None])
