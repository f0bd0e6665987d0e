"""The accuracy measured while training: what rises, and what the best checkpoint is chosen by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import check_range
from dino_ssl.evals.accuracy import Accuracy
from dino_ssl.evals.base import EvalContext, Scores, reference_scores
from dino_ssl.evals.knn import KNN, BoundKNN
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.heads import Network


class Trainable(Protocol):
    """What is being trained, as far as an evaluation sees it. Every method is one."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def classifier(self) -> Network | None:
        """A network that gives a number for each class, where labels are learned."""
        ...


class BoundOnlineEval(NamedTuple):
    """What is measured of a learner, ready to be called as often as one likes."""

    name: str
    measure: Callable[[], Scores]
    references: Callable[[Callable[[], Backbone]], Mapping[str, Mapping[str, float]]]
    """Given what builds the network with random weights on the device: what the figures must rise above."""


@dataclass(frozen=True, kw_only=True)
class OnlineEval:
    """The accuracy on pictures with labels, measured while training: of weighted k-NN on the backbone's features, or
    of the classifier itself where the method trains one."""

    every_epochs: float = 1.0
    """Measure each time this many epochs have passed; 0 never."""
    k: int = 20
    """Neighbours that vote (Appendix F.1 reports 20)."""
    size: int | None = None
    """Side in pixels of the center crop that is shown to the backbone; None: the size of the global crops."""
    val_fraction: float = 0.1
    """Share of every class that is kept out of training and asked about, where there are no pictures for that."""
    max_memory: int = 50_000
    """Training pictures that vote, evenly spaced; more cost time and change the figure little."""
    batch_size: int = 64
    """Pictures per forward pass."""

    def __post_init__(self) -> None:
        check_range(self, "val_fraction", prefix="online_eval.", above=0, below=1)
        check_range(self, "every_epochs", prefix="online_eval.", least=0)
        check_range(self, "k", "size", "max_memory", "batch_size", prefix="online_eval.", least=1)

    def on(self, learner: Trainable, train: ImageDataset, asked: ImageDataset, context: EvalContext) -> BoundOnlineEval:
        """What is measured of this learner while it learns: its classifier's accuracy, or its features' by k-NN."""
        if (classifier := learner.classifier) is not None:
            accuracy = Accuracy(train, asked, self.size or context.size, context)
            return BoundOnlineEval(accuracy.name, lambda: accuracy(classifier), lambda build: accuracy.references())
        knn = self.bind(train, asked, context)
        return BoundOnlineEval(knn.name, lambda: knn(learner.backbone), lambda build: reference_scores(knn, build))

    def bind(self, train: ImageDataset, val_set: ImageDataset, context: EvalContext) -> BoundKNN:
        """The k-NN evaluator for these pictures; the site's size answers where the setting says None."""
        if len(train) > self.max_memory:
            train = train.subset(np.linspace(0, len(train) - 1, self.max_memory).round().astype(np.int64))
        return BoundKNN(KNN(k=(self.k,), size=self.size), train, val_set, context)
