"""Linear classifiers trained side by side: every forward pass and every matrix product serves them all.

Legend of the shapes: B pictures of a step on this rank, D width of the feature, T classifiers, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.evals.base import full_precision


class Heads:
    """T linear classifiers on one feature: softmax regression by SGD with momentum, each at rates of its own.

    All start from the same weights, N(0, 0.01), and biases of 0; so each becomes what it would be alone.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        lr: Sequence[float],  # [T], for the batch as it is
        weight_decay: Sequence[float],  # [T]
        *,
        momentum: float = 0.9,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        start = 0.01 * torch.randn(width, 1, classes, generator=torch.Generator().manual_seed(seed))
        start = torch.cat([start, torch.zeros(1, 1, classes)])  # the last row is the bias
        self.weights = start.repeat(1, len(lr), 1).to(device)  # [D + 1, T, C]
        self.velocity = torch.zeros_like(self.weights)
        self.lr, self.weight_decay = (torch.tensor(rates, device=device)[:, None] for rates in (lr, weight_decay))
        self.momentum = momentum

    def logits(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, T, C]: one matrix product whatever T. Float32 on purpose."""
        with full_precision(features.device):
            return (_with_one(features) @ self.weights.flatten(1)).unflatten(1, self.weights.shape[1:])

    def gradient(self, features: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """[B, D], [B], [B, T] of 0 and 1 -> [D + 1, T, C].

        The gradient, for each classifier, of the mean cross-entropy over its counted pictures on all ranks:
        x^T (softmax - one-hot) / n.
        """
        residual = self.logits(features).softmax(-1)
        residual[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        residual *= (counted / distributed.all_reduce_sum(counted.sum(0)).clamp(min=1))[..., None]
        with full_precision(features.device):
            own = _with_one(features).T @ residual.flatten(1)
        return distributed.all_reduce_sum(own).unflatten(1, self.weights.shape[1:])

    def step(self, features: Tensor, labels: Tensor, counted: Tensor, factor: float = 1.0) -> None:
        """v <- momentum v + gradient + decay w; w <- w - factor lr v, as torch.optim.SGD steps."""
        with torch.no_grad():
            gradient = self.gradient(features, labels, counted) + self.weight_decay * self.weights
            self.velocity.mul_(self.momentum).add_(gradient)
            self.weights -= factor * self.lr * self.velocity


def _with_one(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)


def class_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T, C], [B] -> [B, T]: how many classes come before the right one, of equal ones those with a smaller number.

    Where a classifier has left all bounds the right class comes last, instead of where NaN happens to compare to.
    """
    own = logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))
    classes = torch.arange(logits.shape[2], device=logits.device)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None, None]))
    return before.sum(2).masked_fill(~logits.isfinite().all(2), logits.shape[2])
