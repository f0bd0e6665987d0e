"""Multinomial logistic regression, solved to a stated accuracy.

The problem is convex, so any exact solver gives the same result. The authors used cyanure; this is torch.optim.LBFGS.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.progress import Progress

ROWS = 8192  # images whose logits are in memory at once: 66 MB for 1000 classes


def logistic_loss(
    weights: Tensor, features: Tensor, labels: Tensor, decay: float, *, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    """Return (1/n) sum of -log softmax(x W)_y + decay / 2 |W|^2 and its gradient: [D, C], [N, D], [N] -> [], [D, C].

    Computed in the weights' precision. Rank r sums rows r, r + world size, ...; every rank returns the same.
    """
    shard = torch.arange(distributed.rank(), len(labels), distributed.world_size())
    loss, gradient = weights.new_zeros(1), torch.zeros_like(weights)
    for part in shard.split(rows):
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
    """Upper bound of the difference between the loss and its minimum."""
    evaluations: int
    """Evaluations of loss and gradient."""


def fit_logistic(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N], 0 .. classes - 1
    classes: int,
    decay: float,
    *,
    tolerance: float = 1e-4,
    max_evaluations: int = 5000,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Fit:
    """Minimize `logistic_loss` without intercept until the gap is at most `tolerance` times the loss.

    L-BFGS with strong Wolfe line searches in float64. The penalty makes the loss strongly convex, hence
    f(w) - min f <= |gradient|^2 / (2 decay): this bound is the stopping criterion.
    """
    if torch.device(device).type == "mps":
        device = "cpu"  # no float64
    weights = torch.zeros(features.shape[1], classes, dtype=torch.float64, device=device)
    solver = torch.optim.LBFGS(
        [weights], max_iter=10, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    gaps: list[float] = []

    def closure() -> Tensor:
        loss, weights.grad = logistic_loss(weights, features, labels, decay)
        gaps.append(float(weights.grad.square().sum()) / (2 * decay))
        if progress is not None:
            progress(len(gaps), 0)
        return loss

    best = float("inf")
    with torch.no_grad():
        while True:
            loss = float(closure())
            if gaps[-1] <= tolerance * loss or loss >= best or len(gaps) >= max_evaluations:
                return Fit(weights, loss, gaps[-1], len(gaps))
            best = loss
            solver.step(closure)
