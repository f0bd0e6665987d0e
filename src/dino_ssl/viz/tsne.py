"""Exact t-SNE (van der Maaten and Hinton 2008) for Appendix H and Fig. 11.

Appendix H embeds the mean feature of each class: 30 principal components, perplexity 20, learning rate 200, 5000
iterations. Exact means all pairs: memory and time grow with N squared, which suits a few thousand points.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.progress import Progress
from dino_ssl.viz.pca import principal_components

MAX_POINTS = 5000
"""A matrix of all pairs takes 100 MB, and about six of them exist at once."""
EXAGGERATION, EARLY_ITERATIONS = 12.0, 250
"""Factor of P in the first iterations, and their number, at most a quarter of all."""
TINY = 1e-12


def tsne(
    features: Tensor, *, perplexity: float = 20.0, iterations: int = 1000, progress: Progress = lambda done, total: None
) -> tuple[Tensor, float]:
    """Embed features [N, D] as points [N, 2], deterministically: the start is the first two principal components.

    Returns the centered points and their KL(P || Q). perplexity: effective number of neighbors, limited to (N - 1) / 3.
    The learning rate is N / 5, at most 200 as in the paper with its 1000 classes; 60 points reach a divergence of 0.97
    with 200, and 0.57 with 12.
    """
    count = len(features)
    if not (4 <= count <= MAX_POINTS and perplexity >= 1 and iterations >= 1):
        raise UserError(
            f"t-SNE needs 4 to {MAX_POINTS} points, not {count}, and `perplexity` and `iterations` at least 1."
        )
    target = affinities(features.float(), min(perplexity, (count - 1) / 3))
    points = principal_components(features, 2).project(features.float())
    points = F.pad(points, (0, 2 - points.shape[1]))  # features of one dimension give one component
    points = 1e-4 * points / points.std().clamp(min=TINY)
    velocity, gains = torch.zeros_like(points), torch.ones_like(points)
    for step in range(iterations):
        early = step < min(EARLY_ITERATIONS, iterations // 4)
        gradient = kl_gradient(target * EXAGGERATION if early else target, points)
        turned = gradient.sign() != velocity.sign()  # the authors' adaptive gains: larger while the direction stays
        gains = torch.where(turned, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - min(200, count / 5) * gains * gradient
        points = points + velocity
        points = points - points.mean(dim=0)
        progress(step + 1, iterations)
    return points, kl(target, points)


def affinities(features: Tensor, perplexity: float) -> Tensor:
    """Return P [N, N] of features [N, D], symmetric with sum 1: P = (P(j | i) + P(i | j)) / 2N."""
    conditional = conditionals(features, perplexity)
    return (conditional + conditional.T) / (2 * len(features))


def conditionals(features: Tensor, perplexity: float, steps: int = 64) -> Tensor:
    """Return P(j | i) = softmax_j(-b_i |x_i - x_j|^2) [N, N] with entropy ln(perplexity), by bisection of log b_i."""
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance = distance / distance.mean().clamp(min=TINY)  # the same P for features of any scale
    distance.fill_diagonal_(float("inf"))
    distance = distance - distance.min(dim=1, keepdim=True).values  # so that the nearest does not underflow
    low = torch.full((len(features), 1), -20.0, device=features.device)
    high = torch.full_like(low, 40.0)
    for _ in range(steps):
        middle = (low + high) / 2
        row = torch.softmax(-distance * middle.exp(), dim=1)
        wide = torch.special.entr(row).sum(dim=1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return torch.softmax(-distance * ((low + high) / 2).exp(), dim=1)


def kl(target: Tensor, points: Tensor) -> float:
    """Return KL(P || Q) of P = target [N, N] and Q, the normalized Student kernel of points [N, 2]."""
    kernel = student_kernel(points)
    q = (kernel / kernel.sum()).clamp(min=TINY)
    return float((torch.special.xlogy(target, target) - target * q.log()).sum())


def kl_gradient(target: Tensor, points: Tensor) -> Tensor:
    """Return d KL / d y_i = 4 sum_j (P_ij - Q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2): [N, 2]."""
    kernel = student_kernel(points)
    pull = (target - kernel / kernel.sum()) * kernel
    return 4 * (pull.sum(dim=1, keepdim=True) * points - pull @ points)


def student_kernel(points: Tensor) -> Tensor:
    """Return 1 / (1 + |y_i - y_j|^2) [N, N], 0 on the diagonal."""
    squared = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (1 / (1 + squared)).fill_diagonal_(0)


def class_means(features: Tensor, labels: Sequence[str | None]) -> tuple[Tensor, list[str]]:
    """Return the mean feature of each class [C, D] and the sorted class names, without unlabeled rows (App. H)."""
    names = sorted({label for label in labels if label is not None})
    rows = torch.tensor([-1 if label is None else names.index(label) for label in labels])
    return torch.stack([features[rows == number].mean(dim=0) for number in range(len(names))]), names
