"""Quality measured during training: it shows progress and selects the best checkpoint."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import check_range
from dino_ssl.evals.base import EvalContext, PreparedEval, Scores, evaluating
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.linear import accuracies
from dino_ssl.evals.two_crop_retrieval import MAX_IMAGES, TwoCropRetrieval
from dino_ssl.models.heads import Network
from dino_ssl.preprocessing import Preprocessing

MIN_HELD_OUT = 5
"""Images without labels that are held out at least: 10 queries. Smaller datasets hold out none."""


@dataclass(frozen=True, kw_only=True)
class OnlineEval:
    """Quality during training: weighted k-NN accuracy, or that of the method's classifier if it trains one.

    Without labels: two-crop retrieval.
    """

    every_epochs: float = 1.0
    """Epochs between two evaluations; 0 disables them."""
    k: int = 20
    """Neighbors that vote (Appendix F.1 reports 20)."""
    size: int | None = None
    """Side of the crops in pixels, of this and all later evaluations and features of the run; default: the size
    of the global crops."""
    val_fraction: float = 0.1
    """Fraction of every class that is held out for validation if no validation set is given. Without labels: of all
    images, at most 2,000, and none if these would be fewer than 5."""
    max_train_images: int = 50_000
    """Maximum number of training images that vote, evenly spaced; more images cost time and change little."""
    batch_size: int = 64
    """Images per forward pass."""

    def __post_init__(self) -> None:
        check_range(self, "val_fraction", prefix="online_eval.", above=0, below=1)
        check_range(self, "every_epochs", prefix="online_eval.", least=0)
        check_range(self, "k", "size", "max_train_images", "batch_size", prefix="online_eval.", least=1)

    def held_out_fraction(self, dataset: ImageDataset) -> float:
        """Return the fraction of a dataset that is held out if no validation set is given; 0 for none."""
        if not self.every_epochs:
            return 0.0
        if dataset.labels is not None:
            return self.val_fraction
        is_enough = round(self.val_fraction * len(dataset)) >= MIN_HELD_OUT
        return min(self.val_fraction, MAX_IMAGES / len(dataset)) if is_enough else 0.0

    def prepare(
        self, classifier: Network | None, train: ImageDataset, val: ImageDataset, context: EvalContext
    ) -> PreparedEval:
        """Prepare the accuracy of a method's classifier, k-NN on its backbone, or two-crop retrieval without labels."""
        if train.labels is None:
            return TwoCropRetrieval().prepare_dataset(val, context)
        if classifier is None:
            return self.prepare_knn(train, val, context)
        return PreparedEval(
            name="accuracy",
            data={},
            score=lambda backbone: classifier_accuracy(classifier, val, self.size or context.size, context),
            references={"majority_class": lambda: majority_class_accuracy(train, val)},
        )

    def prepare_knn(self, train: ImageDataset, val: ImageDataset, context: EvalContext) -> PreparedEval:
        """Prepare the k-NN evaluation, with at most `max_train_images` training images."""
        return KNN(k=(self.k,), size=self.size).prepare_datasets(self.voters(train), val, context)

    def voters(self, train: ImageDataset) -> ImageDataset:
        """Return at most `max_train_images` of the training images, evenly spaced."""
        return train.evenly_spaced(self.max_train_images)


def classifier_accuracy(classifier: Network, dataset: ImageDataset, size: int, context: EvalContext) -> Scores:
    """Return {"top-1": percent, "top-5": percent} of a network with one logit per class, the same on every rank."""
    transform = Preprocessing(size=size)

    def logits(images: Tensor) -> Tensor:
        with context.autocast():
            (out,) = classifier([transform.normalize(images.to(context.device, non_blocking=True))[None]])
        return out.float()[:, None]

    with evaluating(classifier), torch.random.fork_rng(devices=[]):  # data loaders draw a seed
        (top1,), (top5,) = accuracies(logits, 1, dataset, transform, context, "accuracy")
    return Scores({"top-1": top1, "top-5": top5})


def majority_class_accuracy(train: ImageDataset, val: ImageDataset) -> Scores:
    """Return the accuracy of always predicting the classes that are most frequent in `train`."""
    assert train.labels is not None
    assert val.labels is not None
    counts = np.bincount(train.labels[train.labels >= 0], minlength=len(train.classes))
    frequent = np.argsort(-counts, kind="stable")
    labels = val.labels[val.labels >= 0]
    return Scores({f"top-{n}": 100 * float(np.isin(labels, frequent[:n]).mean()) for n in (1, 5)})
