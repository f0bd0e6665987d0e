"""`dino_ssl.classify`: the class of every image of a dataset, learned from a few labeled images.

Shapes: n labeled images, M images to classify, D feature dimensions, C classes.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.api.calls import Embedding, embed
from dino_ssl.data.dataset import ImageDataset, Skipped
from dino_ssl.data.sources import CLASS_FOLDERS, DatasetSource, open_dataset
from dino_ssl.errors import UserError, check_value
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.features import raw_pixels
from dino_ssl.evals.knn import knn_votes
from dino_ssl.evals.low_shot import ROWS, fit_logistic
from dino_ssl.evals.nearest import top_k
from dino_ssl.formatting import Summarized
from dino_ssl.loading import Checkpoint, open_checkpoint
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import Weights
from dino_ssl.progress import Progress, StartProgress, no_progress
from dino_ssl.runtime import Precision

Method = Literal["knn", "linear"]
Classifier = Callable[[Tensor], Tensor]
"""Features [M, D] -> probabilities of the classes [M, C]."""
MIN_K, MAX_K = 2, 20
"""Default numbers of neighbors: two, since one gives no confidence, to that of Appendix F.1."""
FOLDS = {"knn": 1000, "linear": 5}
"""Folds by which the accuracy is measured, at most one per labeled image."""
REGULARIZATION = 0.1  # of the low-shot evaluation


@dataclass(frozen=True, repr=False)
class Classification(Summarized):
    """Predicted classes of the readable images of a dataset, in its order."""

    names: list[str]
    labels: list[str]
    confidences: np.ndarray
    """[M] float32, 0 to 1: the label's share of the neighbors' votes (k-NN), or its probability (linear)."""
    runners_up: list[str]
    """The classes with the second highest probability."""
    classifier: str
    """`5-NN`: the number of neighbors that vote; or `linear`."""
    labeled: dict[str, int]
    """Number of labeled images of each class."""
    tested: int
    """Labeled images whose class has at least two."""
    accuracy: float
    """Percent of these that are classified correctly by the other labeled images: leave-one-out (k-NN) or 5-fold
    cross-validation (linear). nan if there are none."""
    references: dict[str, dict[str, float]]
    """{"raw_pixels": {"accuracy": percent}}: without a network; empty if the labeled images were given as features."""
    skipped: list[Skipped]
    """Images that could not be read."""

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        counts, accuracy = Counter(self.labels), f"{self.accuracy:.1f} % of {self.tested} labeled images"
        predicted = ", ".join(f"{name} {counts[name]}" for name in self.labeled)
        images, skipped = len(self.names), len(self.skipped)
        return {"images": images, "predicted": predicted, "accuracy": accuracy, "skipped": skipped}


def classify(
    checkpoint: str | Path | Backbone | Checkpoint,
    dataset: DatasetSource | Embedding,
    labels: DatasetSource | Embedding,
    *,
    method: Method = "knn",
    k: int | None = None,
    size: int | None = None,
    precision: Precision | None = None,
    batch_size: int = 64,
    workers: int = 0,
    partial: str | Path | None = None,
    progress: StartProgress = no_progress,
    device: str | torch.device | None = None,
    weights: Weights = "last",
    trust: bool = False,
) -> Classification:
    """Predict the class of every image from a few labeled ones: `classify("runs/x", "photos", "labeled")`.

    Args:
        checkpoint: A run folder, a file, a released network, timm:NAME, or a backbone.
        dataset: Images to classify, or the result of `embed`; their own labels, if any, are not used.
        labels: Labeled images: a folder of class folders, another dataset with labels, or the result of `embed`.
        method: "knn" (Appendix F.1), or "linear" for the logistic regression of the low-shot evaluation.
        k: Neighbors that vote. Default: a tenth of the median number of labeled images of a class, 2 to 20.
        size: Side of the center crop in pixels. Default: the size at which the run evaluates its network.
        precision: Of forward passes. Default: bfloat16 if the device supports it, otherwise float32.
        batch_size: Images per forward pass.
        workers: Worker processes that decode images.
        partial: Folder that keeps the features of the images, so that the same call resumes (see `embed`).
        progress: Shows progress.
        device: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
        weights: Those of a run's folder that are used.
        trust: Import a backbone class from outside the package that the checkpoint names, which runs its code.
    """
    check_value("k", k, least=1)
    if method not in FOLDS:
        raise UserError(f"`method` must be {' or '.join(FOLDS)}; got {method!r}.")
    loaded = open_checkpoint(checkpoint, device, weights=weights, trust=trust)
    options: Any = dict(size=size, precision=precision, batch_size=batch_size, workers=workers, device=device)

    def features_of(source: DatasetSource | Embedding, name: str, partial: str | Path | None = None) -> Embedding:
        if isinstance(source, Embedding):
            return source
        with progress(f"features of {name}") as show:
            return embed(loaded, source, partial=partial, progress=show, **options)

    labeled = labels if isinstance(labels, Embedding) else open_dataset(labels)
    known = features_of(labeled, "labeled images")
    counts = Counter(sorted(label for label in known.labels if label is not None))
    if len(counts) < 2:
        raise UserError(f"`labels` expected images of at least two classes; got {len(counts)}.\n{CLASS_FOLDERS}")
    classes, rows = list(counts), [row for row, label in enumerate(known.labels) if label is not None]
    x = torch.from_numpy(known.features[rows])
    y = torch.tensor([classes.index(str(known.labels[row])) for row in rows])
    k = k or min(max(MIN_K, round(statistics.median(counts.values()) / 10)), MAX_K)
    fit = functools.partial(fit_knn, k=k) if method == "knn" else fit_linear
    is_tested = y.bincount()[y] > 1

    def accuracy(features: Tensor) -> float:
        with progress("accuracy on the labeled images") as show:
            correct = cross_validate(fit, features, y, FOLDS[method], show)[is_tested]
        return 100 * correct.double().mean().item()

    own, references = accuracy(x), {}
    if isinstance(labeled, ImageDataset) and is_tested.any():
        pixels = raw_pixels(labeled, EvalContext(progress=progress)).features
        references = {"raw_pixels": {"accuracy": accuracy(pixels[rows])}}
    images = features_of(dataset, "images", partial)
    classifier = fit(x, y, len(classes))
    parts = [classifier(part).topk(2) for part in torch.from_numpy(images.features).split(ROWS)]
    confidences, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    best, second = ([classes[label] for label in column] for column in indices.T.tolist())
    return Classification(
        images.names,
        best,
        confidences[:, 0].float().numpy(),
        second,
        f"{k}-NN" if method == "knn" else method,
        dict(counts),
        int(is_tested.sum()),
        own,
        references,
        images.skipped,
    )


def fit_knn(x: Tensor, y: Tensor, classes: int, *, k: int) -> Classifier:
    """Return a classifier by the share of each class in the votes of the k nearest images."""

    def shares(features: Tensor) -> Tensor:
        similarity, rows = top_k(features, x, k)
        return F.normalize(knn_votes(similarity, y[rows], classes), p=1, dim=1)

    return shares


def fit_linear(x: Tensor, y: Tensor, classes: int) -> Classifier:
    """Return the softmax classifier of the logistic regression of l2-normalized features, minus their mean."""
    center = x.mean(0)  # it has no intercept, and features have much in common
    weights = fit_logistic(F.normalize(x - center, dim=1), y, classes, REGULARIZATION / len(y)).weights
    return lambda features: (F.normalize(features - center, dim=1).to(weights) @ weights).softmax(1)


def cross_validate(fit: Callable[..., Classifier], x: Tensor, y: Tensor, folds: int, progress: Progress) -> Tensor:
    """Return bool [n]: the class of the image is predicted by a classifier of the images outside its fold.

    The images of each class are spread evenly over the folds. With at least n folds, this is leave-one-out.
    """
    order = np.random.default_rng(0).permutation(len(y))
    order = torch.from_numpy(order[y.numpy()[order].argsort(kind="stable")])  # class by class
    correct, folds = torch.zeros(len(y), dtype=torch.bool), min(folds, len(y))
    for fold in range(folds):
        test = torch.zeros_like(correct).index_fill(0, order[fold::folds], True)
        correct[test] = fit(x[~test], y[~test], int(y.max()) + 1)(x[test]).argmax(1) == y[test]
        progress(fold + 1, folds)
    return correct
