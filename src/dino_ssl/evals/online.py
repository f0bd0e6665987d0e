"""Accuracy measured during training: it shows progress and selects the best checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import check_range
from dino_ssl.evals.accuracy import classifier_accuracy, majority_class_accuracy
from dino_ssl.evals.base import EvalContext, PreparedEval, Scores, reference_scores
from dino_ssl.evals.knn import KNN
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.heads import Network


class PreparedOnlineEval(NamedTuple):
    """The online evaluation of one method."""

    name: str
    measure: Callable[[], Scores]
    references: Callable[[Callable[[], Backbone]], Mapping[str, Mapping[str, float]]]
    """Returns the reference scores, given a function that builds the network with random weights on the device."""


@dataclass(frozen=True, kw_only=True)
class OnlineEval:
    """Accuracy on labeled images during training: weighted k-NN, or the method's own classifier if it trains one."""

    every_epochs: float = 1.0
    """Epochs between two evaluations; 0 disables them."""
    k: int = 20
    """Neighbors that vote (Appendix F.1 reports 20)."""
    size: int | None = None
    """Side of the center crop in pixels; default: the size of the global crops."""
    val_fraction: float = 0.1
    """Fraction of every class that is held out for validation if no validation set is given."""
    max_train_images: int = 50_000
    """Maximum number of training images that vote, evenly spaced; more images cost time and change little."""
    batch_size: int = 64
    """Images per forward pass."""

    def __post_init__(self) -> None:
        check_range(self, "val_fraction", prefix="online_eval.", above=0, below=1)
        check_range(self, "every_epochs", prefix="online_eval.", least=0)
        check_range(self, "k", "size", "max_train_images", "batch_size", prefix="online_eval.", least=1)

    def prepare(
        self,
        backbone: Backbone,
        classifier: Network | None,
        train: ImageDataset,
        val: ImageDataset,
        context: EvalContext,
    ) -> PreparedOnlineEval:
        """Prepare the accuracy of a method's classifier if it has one, otherwise k-NN on its backbone."""
        if classifier is not None:
            return PreparedOnlineEval(
                "accuracy",
                lambda: classifier_accuracy(classifier, val, self.size or context.size, context),
                lambda build: {"majority_class": majority_class_accuracy(train, val)},
            )
        knn = self.prepare_knn(train, val, context)
        return PreparedOnlineEval(knn.name, lambda: knn(backbone), lambda build: reference_scores(knn, build))

    def prepare_knn(self, train: ImageDataset, val: ImageDataset, context: EvalContext) -> PreparedEval:
        """Prepare the k-NN evaluation, with at most `max_train_images` training images."""
        if len(train) > self.max_train_images:
            train = train.subset(np.linspace(0, len(train) - 1, self.max_train_images).round().astype(np.int64))
        return KNN(k=(self.k,), size=self.size).prepare_datasets(train, val, context)
