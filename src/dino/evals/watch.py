"""The accuracy measured while training: what rises, and what the best checkpoint is chosen by."""

from dataclasses import dataclass

import numpy as np

from dino.data.pictures import Pictures
from dino.evals.evaluator import Site
from dino.evals.knn import KNN, BoundKNN


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Weighted k-NN accuracy of the backbone on pictures with labels, measured while training."""

    every_epochs: float = 1.0
    """Measure each time this many epochs have passed; 0 never."""
    k: int = 20
    """Neighbours that vote (Appendix F.1 reports 20)."""
    size: int | None = None
    """Side in pixels of the center crop that is shown to the backbone; None: the size of the global crops."""
    held_back: float = 0.1
    """Share of every class that is kept out of training and asked about."""
    max_memory: int = 50_000
    """Training pictures that vote, evenly spaced; more cost time and change the figure little."""
    batch_size: int = 64
    """Pictures per forward pass."""

    def bind(self, train: Pictures, held_back: Pictures, site: Site) -> BoundKNN:
        """The evaluator for these pictures; the site's size answers where the setting says None."""
        if len(train) > self.max_memory:
            train = train.subset(np.linspace(0, len(train) - 1, self.max_memory).round().astype(np.int64))
        return BoundKNN(KNN(k=(self.k,), size=self.size), train, held_back, site)
