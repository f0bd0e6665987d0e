"""Multinomial logistic regression, solved: the problem is convex, and a certificate says how near the optimum is.

So a figure is the problem's and not the solver's, and any other exact solver gives the same. The authors used
cyanure; this is torch.optim.LBFGS, which needs no further package.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.progress import Progress

ROWS = 8192  # pictures whose logits are in memory at once: 66 MB for 1000 classes


def logistic_loss(
    weights: Tensor, features: Tensor, labels: Tensor, decay: float, *, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    """(1/n) sum of -log softmax(x W)_y + decay / 2 |W|^2, and its gradient. [D, C], [N, D], [N] -> [], [D, C]

    In the weights' precision. Rank r takes rows r, r + world, ...; every rank gives the same.
    """
    mine = torch.arange(distributed.rank(), len(labels), distributed.world_size())
    loss, gradient = weights.new_zeros(1), torch.zeros_like(weights)
    for part in mine.split(rows):
        x, y = features[part].to(weights), labels[part].to(weights.device)[:, None]
        log_p = (x @ weights).log_softmax(1)
        loss -= log_p.gather(1, y).sum() / len(labels)
        residual = log_p.exp().scatter_add_(1, y, log_p.new_full(y.shape, -1))
        gradient.addmm_(x.T, residual, alpha=1 / len(labels))
    loss, gradient = distributed.all_reduce_sum(loss), distributed.all_reduce_sum(gradient)
    return loss.squeeze() + decay / 2 * weights.square().sum(), gradient.add(weights, alpha=decay)


class Fit(NamedTuple):
    """A solved logistic regression."""

    weights: Tensor  # [D, C] float64
    loss: float
    gap: float
    """The loss is at most this much above the least there is."""
    evaluations: int


def fit_logistic(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N], 0 .. classes - 1
    classes: int,
    decay: float,
    *,
    tolerance: float = 1e-4,
    most: int = 5000,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Fit:
    """The weights of least loss, to `tolerance` of the loss: L-BFGS with strong Wolfe line searches, in float64.

    `decay` makes the loss strongly convex: f(w) - min f <= |gradient|^2 / (2 decay). That bound is what stops, not
    the size of a step. No intercept. Weights where a class has no picture stay what the penalty makes them.
    """
    if torch.device(device).type == "mps":
        device = "cpu"  # Apple's GPUs have no float64
    weights = torch.zeros(features.shape[1], classes, dtype=torch.float64, device=device)
    solver = torch.optim.LBFGS(
        [weights], max_iter=10, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    evaluations, gaps = 0, []

    def closure() -> Tensor:
        nonlocal evaluations
        loss, weights.grad = logistic_loss(weights, features, labels, decay)
        evaluations += 1
        gaps.append(float(weights.grad.square().sum()) / (2 * decay))
        if progress is not None:
            progress(_percent(gaps, tolerance * float(loss)), 100)
        return loss

    best = float("inf")
    with torch.no_grad():
        while True:
            loss = float(closure())
            if gaps[-1] <= tolerance * loss or loss >= best or evaluations >= most:
                return Fit(weights, loss, gaps[-1], evaluations)
            best = loss
            solver.step(closure)


def _percent(gaps: list[float], wanted: float) -> int:
    """How much of the way the gap has come, in orders of magnitude."""
    first, least = max(gaps[0], wanted), max(min(gaps), wanted)
    return round(100 * math.log(first / least) / math.log(first / wanted)) if 0 < wanted < first else 100
