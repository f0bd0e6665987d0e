"""Statistics of the backbone's features during training: norm, spread and effective rank.

They use the features of the last forward pass, so that nothing is computed twice, and stay on the device.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dino_ssl.models.heads import l2_normalize


class FeatureStats:
    """A forward hook on the backbone that keeps the features of a step's first forward pass, over the global views.

    It references no module, so that a network with it can be copied.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._features: Tensor | None = None
        backbone.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep the features of the first forward pass in training mode."""
        if module.training and self._features is None:
            self._features = output.detach()

    def next_step(self) -> None:
        """Drop the features of the last step."""
        self._features = None

    def measure(self) -> dict[str, Tensor]:
        """Return the statistics as scalars on the device; empty without a forward pass."""
        return {} if self._features is None else feature_statistics(self._features)


@torch.no_grad()
def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """Return mean norm, directional spread (0: all equal, 1: zero mean) and effective rank of features [N, D]."""
    directions = l2_normalize(features)
    spread = (directions - directions.mean(0)).square().sum(1).mean().sqrt()
    return {
        "feature_norm": features.float().norm(dim=1).mean(),
        "feature_spread": spread,
        "feature_rank": effective_rank(directions),
    }


def effective_rank(features: Tensor) -> Tensor:
    """Return (trace C)^2 / |C|_F^2 of the covariance C of features [N, D], a scalar.

    The participation ratio of C's eigenvalues (Gao et al., 2017, "A theory of multineuronal dimensionality"): r if r
    eigenvalues are equal and the others 0, at most min(N - 1, D). It needs one matrix product and no singular values.
    Features of norm about 1 are expected; if they differ by less than a thousandth of it, the rank falls to 0.
    """
    centered = features.float() - features.float().mean(0)
    rows, width = centered.shape
    product = centered @ centered.T if rows <= width else centered.T @ centered  # the same nonzero eigenvalues
    return product.trace().square() / (product.square().sum() + (1e-6 * rows) ** 2)
