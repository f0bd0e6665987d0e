"""t-SNE (van der Maaten and Hinton 2008), exact: points in the plane whose near neighbours are those of the features.

Appendix H and Fig. 11: the mean feature of each class, 30 principal components, perplexity 20, learning rate 200, 5000
iterations. Exact means all pairs: memory and time grow with N squared, good for a few thousand points.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.viz.pca import components

MAX_POINTS = 5000
"""All pairs of so many points take 100 MB, and some six such tables are there at once."""
TINY = 1e-12


class Embedded(NamedTuple):
    points: Tensor  # [N, 2], centered
    divergence: list[float]  # KL(P || Q) at the start, every `EVERY` iterations, and at the end; without exaggeration
    perplexity: float  # that was taken


EVERY = 50


def tsne(
    features: Tensor,
    *,
    perplexity: float = 20.0,
    learning_rate: float | None = None,
    iterations: int = 1000,
    exaggeration: float = 12.0,
    exaggerated: int = 250,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Features [N, D] -> points [N, 2]. It starts from the first two principal components: no chance is in it.

    perplexity: neighbours that count; at most (N - 1) / 3 is taken. learning_rate: N / 5 without it, at most 200: the
    paper's at its 1000 classes; 60 points end at KL .97 with 200, at .57 with 12. exaggeration: P is so many times
    larger in the first `exaggerated` iterations, at most a quarter of them, so that clusters form early.
    """
    count = len(features)
    if not 4 <= count <= MAX_POINTS:
        raise UserError(f"t-SNE draws 4 to {MAX_POINTS} points, and {count} came: give more, or fewer of them.")
    if not (perplexity >= 1 and iterations >= 1):
        raise UserError(f"t-SNE needs perplexity and iterations of at least 1; received {perplexity:g}, {iterations}.")
    perplexity = min(perplexity, (count - 1) / 3)
    target = affinities(features.float(), perplexity)
    rate = min(200.0, count / 5) if learning_rate is None else learning_rate
    points = components(features, 2).of(features.float())
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))  # features of one number lie on a line
    points = 1e-4 * points / points.std().clamp(min=TINY)
    speed, gains = torch.zeros_like(points), torch.ones_like(points)
    divergence = [kl(target, points)]
    early = min(exaggerated, iterations // 4)
    for step in range(iterations):
        gradient = kl_gradient(target * exaggeration if step < early else target, points)
        turned = gradient.sign() != speed.sign()  # the authors' gains: grow while the direction stays
        gains = torch.where(turned, gains + 0.2, gains * 0.8).clamp(min=0.01)
        speed = (0.5 if step < early else 0.8) * speed - rate * gains * gradient
        points = points + speed
        points = points - points.mean(dim=0)
        if (step + 1) % EVERY == 0 or step + 1 == iterations:
            divergence.append(kl(target, points))
            progress(step + 1, iterations)
    if not math.isfinite(divergence[-1]):
        raise UserError(f"t-SNE flew apart at learning rate {rate:g}: take a smaller one, or leave it out.")
    return Embedded(points, divergence, perplexity)


def affinities(features: Tensor, perplexity: float, steps: int = 64) -> Tensor:
    """P [N, N], symmetric, of sum 1: how near the features [N, D] are, each row's width set to the perplexity.

    P(j | i) = softmax_j(-b_i |x_i - x_j|^2), the entropy of each row ln(perplexity) by bisection of log b_i; then
    P = (P(j | i) + P(i | j)) / 2N.
    """
    conditional = conditionals(features, perplexity, steps)
    return (conditional + conditional.T) / (2 * len(features))


def conditionals(features: Tensor, perplexity: float, steps: int = 64) -> Tensor:
    """P(j | i) [N, N]: rows of sum 1 and entropy ln(perplexity), 0 on the diagonal."""
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance = distance / distance.mean().clamp(min=TINY)  # the same P for features of any scale
    distance.fill_diagonal_(float("inf"))
    distance = distance - distance.min(dim=1, keepdim=True).values  # the nearest at 0: nothing underflows for it
    low = torch.full((len(features), 1), -20.0, device=features.device)
    high = torch.full_like(low, 40.0)
    for _ in range(steps):
        middle = (low + high) / 2
        row = torch.softmax(-distance * middle.exp(), dim=1)
        wide = torch.special.entr(row).sum(dim=1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return torch.softmax(-distance * ((low + high) / 2).exp(), dim=1)


def kl(target: Tensor, points: Tensor) -> float:
    """KL(P || Q), Q of Student's kernel 1 / (1 + |y_i - y_j|^2) over all pairs."""
    kernel = student(points)
    q = (kernel / kernel.sum()).clamp(min=TINY)
    return float((torch.special.xlogy(target, target) - target * q.log()).sum())


def kl_gradient(target: Tensor, points: Tensor) -> Tensor:
    """d KL / d y_i = 4 sum_j (P_ij - Q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2): [N, 2]."""
    kernel = student(points)
    pull = (target - kernel / kernel.sum()) * kernel
    return 4 * (pull.sum(dim=1, keepdim=True) * points - pull @ points)


def student(points: Tensor) -> Tensor:
    """1 / (1 + squared distance) [N, N], 0 on the diagonal."""
    x, y = points.unbind(dim=1)
    squared = (x[:, None] - x[None]).square() + (y[:, None] - y[None]).square()
    return (1 / (1 + squared)).fill_diagonal_(0)


def class_means(features: Tensor, labels: Sequence[str | None]) -> tuple[Tensor, list[str]]:
    """The mean feature of each class, by name: [C, D] and the names (Appendix H). Rows without a label are left out."""
    names = sorted({label for label in labels if label is not None})
    rows = torch.tensor([-1 if label is None else names.index(label) for label in labels])
    return torch.stack([features[rows == number].mean(dim=0) for number in range(len(names))]), names


def same_label(points: Tensor, labels: Sequence[str | None]) -> float:
    """How many labelled points have one of the same label nearest to them in the plane, in percent."""
    distance = torch.cdist(points, points).fill_diagonal_(float("inf"))
    nearest = distance.argmin(dim=1).tolist()
    hits = [labels[near] == label for near, label in zip(nearest, labels, strict=True) if label is not None]
    return 100 * sum(hits) / max(len(hits), 1)
