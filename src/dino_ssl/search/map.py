"""A map of images: points in the plane whose near neighbors are those of the features, by t-SNE.

Shapes: N images, M of them on the map, D feature dimensions.
"""

import importlib.util
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dino_ssl.errors import UserError, check_value, import_extra
from dino_ssl.progress import Progress, ignore_progress
from dino_ssl.search.clusters import floats
from dino_ssl.search.nearest import neighbors
from dino_ssl.terminal import logger
from dino_ssl.viz import tsne
from dino_ssl.viz.pca import principal_components

EXACT_POINTS = 500
"""Up to so many points, t-SNE compares all pairs, whose time grows with their square; above, openTSNE is faster."""
MAX_POINTS = 100_000
COMPONENTS = 30  # of exact t-SNE, as in Appendix H
EARLY_ITERATIONS, ITERATIONS, REPORT_ITERATIONS = 250, 500, 10
"""Of openTSNE, its defaults; between two reports of progress."""


class Layout(NamedTuple):
    """Positions of images on a map."""

    rows: np.ndarray
    """int64 [M]: the images, all or evenly spaced ones."""
    points: np.ndarray
    """float32 [M, 2]; only near neighbors have a meaning."""
    method: str


def lay_out(
    features: Any,
    *,
    perplexity: float = 30.0,
    max_points: int = MAX_POINTS,
    progress: Progress = ignore_progress,
) -> Layout:
    """Return the map of features [N, D], deterministically: the start is their first two principal components.

    Exact t-SNE for up to EXACT_POINTS images, openTSNE for more, and principal components for fewer than 4.

    Args:
        features: Unit rows: an array, or anything whose slices and selections are arrays.
        perplexity: Effective number of neighbors of a point, at most a third of the points.
        max_points: Of more images, so many evenly spaced ones are taken.
        progress: Called with the numbers of iterations done and of all.
    """
    check_value("perplexity", perplexity, least=1)
    check_value("max_points", max_points, least=1)
    if not len(features):
        raise UserError("The index has no images to draw.")
    exact = EXACT_POINTS
    if importlib.util.find_spec("openTSNE") is None:
        exact = tsne.MAX_POINTS
        if min(len(features), max_points) > exact:
            logger.warning(f'A map of {exact} evenly spaced images. For more: pip install "dino-ssl[search]".')
            max_points = exact
    count = min(len(features), max_points)
    rows = np.arange(count) * len(features) // count
    data = torch.from_numpy(floats(features, rows))
    if count < 4 or (data == data[0]).all():  # openTSNE ends the process if all points are equal
        return Layout(rows, _plane(data).numpy(), "principal components")
    if count <= exact:
        components = principal_components(data, COMPONENTS).project(data)
        points, _ = tsne.tsne(components, perplexity=perplexity, progress=progress)
        return Layout(rows, points.numpy(), "exact t-SNE")
    return Layout(rows, _open_tsne(data, perplexity, progress), "openTSNE")


def _plane(data: torch.Tensor) -> torch.Tensor:
    """Return the first two principal components, [M, 2]; 0 for those that do not exist."""
    points = principal_components(data, 2).project(data)
    return F.pad(points, (0, 2 - points.shape[1]))


def _open_tsne(data: torch.Tensor, perplexity: float, progress: Progress) -> np.ndarray:
    opentsne, affinity = (import_extra(f"openTSNE{module}", "search") for module in ("", ".affinity"))
    done, total = 0, EARLY_ITERATIONS + ITERATIONS

    def wait(compared: int, count: int) -> None:
        progress(0, total)  # the caller may cancel

    cosines, rows = neighbors(data.half().numpy(), min(round(3 * perplexity), len(data) - 1), wait)
    is_known = rows >= 0  # an approximate search may miss some: the nearest one takes their place
    cosines, rows = cosines.where(is_known, cosines[:, :1]), rows.where(is_known, rows[:, :1])
    distances = (2 - 2 * cosines).clamp(min=0).sqrt().double().numpy()
    index = import_extra("openTSNE.nearest_neighbors", "search").PrecomputedNeighbors(rows.numpy(), distances)
    start = _plane(data).double()
    start = (1e-4 * start / start.std().clamp(min=tsne.TINY)).numpy()
    embedding = opentsne.TSNEEmbedding(
        start, affinity.PerplexityBasedNN(knn_index=index, perplexity=perplexity), negative_gradient_method="fft"
    )

    def report(iteration: int, error: float, points: np.ndarray) -> None:
        progress(done + iteration, total)

    options: dict[str, Any] = dict(callbacks=[report], callbacks_every_iters=REPORT_ITERATIONS)
    embedding = embedding.optimize(EARLY_ITERATIONS, exaggeration=tsne.EXAGGERATION, momentum=0.5, **options)
    done = EARLY_ITERATIONS
    return np.asarray(embedding.optimize(ITERATIONS, momentum=0.8, **options), np.float32)
