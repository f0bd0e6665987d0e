"""Linear classifiers trained in parallel: one forward pass and one matmul serve all of them.

Shapes: B images of a step on this rank, D feature dimensions, T classifiers, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.evals.base import full_precision


class LinearHeads:
    """T softmax classifiers on one feature, each with its own learning rate and weight decay, trained by SGD.

    All start from the same weights, N(0, 0.01), and zero biases, so each equals the classifier trained alone.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        lr: Sequence[float],  # [T], for the actual batch size
        weight_decay: Sequence[float],  # [T]
        *,
        momentum: float = 0.9,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        initial = 0.01 * torch.randn(width, 1, classes, generator=torch.Generator().manual_seed(seed))
        initial = torch.cat([initial, torch.zeros(1, 1, classes)])  # the last row is the bias
        self.weights = initial.repeat(1, len(lr), 1).to(device)  # [D + 1, T, C]
        self.velocity = torch.zeros_like(self.weights)
        self.lr, self.weight_decay = (torch.tensor(values, device=device)[:, None] for values in (lr, weight_decay))
        self.momentum = momentum

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of every classifier in float32: [B, D] -> [B, T, C]."""
        with full_precision(features.device):
            return (_append_one(features) @ self.weights.flatten(1)).unflatten(1, self.weights.shape[1:])

    def gradient(self, features: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return x^T (softmax - one-hot) / n of every classifier: [B, D], [B], [B, T] -> [D + 1, T, C].

        It is the gradient of the mean cross-entropy over the n images of all ranks for which the bool mask is set.
        """
        residual = self.logits(features).softmax(-1)
        residual[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        residual *= (mask / distributed.all_reduce_sum(mask.sum(0)).clamp(min=1))[..., None]
        with full_precision(features.device):
            gradient = _append_one(features).T @ residual.flatten(1)
        return distributed.all_reduce_sum(gradient).unflatten(1, self.weights.shape[1:])

    def step(self, features: Tensor, labels: Tensor, mask: Tensor, factor: float = 1.0) -> None:
        """Update as torch.optim.SGD does: v <- momentum v + gradient + decay w; w <- w - factor lr v.

        mask: as in `gradient`. factor: the learning rate schedule, relative to the peak.
        """
        with torch.no_grad():
            gradient = self.gradient(features, labels, mask) + self.weight_decay * self.weights
            self.velocity.mul_(self.momentum).add_(gradient)
            self.weights -= factor * self.lr * self.velocity


def _append_one(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)


def class_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of the true class, 0 for the largest logit: [B, T, C], [B] -> [B, T].

    Equal logits are ranked by ascending class. A classifier with non-finite logits ranks the true class last.
    """
    true_logits = logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))
    classes = torch.arange(logits.shape[2], device=logits.device)
    before = (logits > true_logits) | ((logits == true_logits) & (classes < labels[:, None, None]))
    return before.sum(2).masked_fill(~logits.isfinite().all(2), logits.shape[2])
