"""Is what is trained alive? Numbers for a line of metrics, beside the method's own. Nothing here waits for the device.

They look at the features of the batch that was trained on last, as its forward pass made them: nothing is computed
twice, and between two lines nothing is computed at all.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dino_ssl.objectives import l2_normalize


class FeatureStats:
    """Keeps a hold of the backbone's latest features, and measures them when a line is written."""

    def __init__(self, backbone: nn.Module) -> None:
        self._latest = _Latest()
        backbone.register_forward_hook(self._latest)

    def next_step(self) -> None:
        """Another batch comes: its first pass, over the global views, is what counts."""
        self._latest.features = None

    def measure(self) -> dict[str, Tensor]:
        """Scalars on the device: of the features, and the method's own vitals."""
        features = self._latest.features
        return {} if features is None else feature_statistics(features)


class _Latest:
    """A forward hook; it holds no module, so that a network may be copied with it."""

    features: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training and self.features is None:
            self.features = output.detach()


@torch.no_grad()
def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """[N, D] -> the features' mean length, their spread in direction (0: all alike; 1: their mean is 0), and rank."""
    directions = l2_normalize(features)
    spread = (directions - directions.mean(0)).square().sum(1).mean().sqrt()
    return {
        "feature_norm": features.float().norm(dim=1).mean(),
        "feature_spread": spread,
        "feature_rank": effective_rank(directions),
    }


def effective_rank(features: Tensor) -> Tensor:
    """(trace C)^2 / |C|_F^2 of the covariance C of features [N, D]: how many directions they fill.

    The participation ratio of C's eigenvalues (Gao et al., 2017, "A theory of multineuronal dimensionality"): r where r
    eigenvalues are equal and the rest 0, at most min(N - 1, D). It needs one matrix product and no singular values;
    Features of
    length about 1 are expected; where they differ by less than a thousandth of it, the rank falls to 0.
    """
    centered = features.float() - features.float().mean(0)
    rows, width = centered.shape
    product = centered @ centered.T if rows <= width else centered.T @ centered  # the same nonzero eigenvalues
    return product.trace().square() / (product.square().sum() + (1e-6 * rows) ** 2)
