"""Weighted k-nearest-neighbor classification of frozen features (Appendix F.1): no training, no hyperparameter search.

Shapes: N training images (the memory), M test images (the queries), D feature dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import CLASS_FOLDERS
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, LabeledEvaluation, PreparedEval, RunDatasets, Scores
from dino_ssl.evals.features import ImageFeatures, prepare_on_features
from dino_ssl.evals.nearest import top_k

KS = (10, 20, 100, 200)  # Appendix F.1; the paper reports 20


def knn_votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """Appendix F.1: each neighbor votes for its label with exp(cosine / temperature); [M, k], [M, k] -> [M, C]."""
    votes = similarity.new_zeros(len(similarity), classes)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp())


def knn_accuracy(
    train_features: Tensor,  # [N, D]
    train_labels: Tensor,  # [N]
    test_features: Tensor,  # [M, D]
    test_labels: Tensor,  # [M]
    k: Sequence[int] = KS,
    temperature: float = 0.07,
    chunk: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in percent: {"20-NN": 61.2, "20-NN top-5": 93.0, ...} for every k.

    Labels are arbitrary integers; images with a negative label are ignored. Of several k, those above N are omitted; a
    single one uses all N images. Top-5 uses
    min(5, k, C) guesses. Classes with equal votes are ranked by ascending label, including classes without votes.
    """
    train_features, train_labels = train_features[train_labels >= 0], train_labels[train_labels >= 0]
    test_features, test_labels = test_features[test_labels >= 0], test_labels[test_labels >= 0]
    if not len(train_labels) or not len(test_labels):
        counts = f"{len(train_labels)} training images and {len(test_labels)} test images"
        raise UserError(f"k-NN expected labeled training and test images; {counts} have a label.\n{CLASS_FOLDERS}")
    k = [n for n in k if n <= len(train_labels)] or [min(k)]
    classes, class_indices = torch.cat([train_labels, test_labels]).unique(return_inverse=True)
    memory, truth = (part.to(device) for part in class_indices.split([len(train_labels), len(test_labels)]))
    hits = {n: torch.zeros(2, dtype=torch.int64) for n in k}
    for start in range(0, len(test_features), chunk):
        queries = test_features[start : start + chunk].to(device)
        similarity, rows = top_k(queries, train_features, max(k))
        for n in k:
            votes = knn_votes(similarity[:, :n], memory[rows[:, :n]], len(classes), temperature)
            guesses = votes.sort(dim=1, descending=True, stable=True).indices[:, : min(5, n)]
            correct = (guesses == truth[start : start + chunk, None]).cpu()
            hits[n] += torch.stack([correct[:, 0].sum(), correct.any(1).sum()])
    percent = {n: (100 * hits[n].double() / len(test_labels)).tolist() for n in k}
    return {f"{n}-NN{suffix}": percent[n][i] for i, suffix in enumerate(("", " top-5")) for n in k}


@dataclass(frozen=True, kw_only=True)
class KNN(LabeledEvaluation):
    """Weighted k-NN accuracy of frozen features: no training and no hyperparameter search."""

    name: ClassVar[str] = "knn"
    paper: ClassVar[str] = "Tables 2 and 10, Appendix F.1"
    examples: ClassVar[str] = """\
  dino eval knn runs/photos                            the run's own images: the accuracy that the run printed
  dino eval knn runs/photos photos_train/ photos_val/
  dino eval knn dino_vits16 photos/                    one folder: a part of every class is held out
  dino eval knn dino_vits16 photos/ --k 5 20 --json    scores as JSON"""

    k: tuple[int, ...] = KS
    """Numbers of neighbors that vote."""
    temperature: float = 0.07
    """Temperature of the votes (Appendix F.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k:
            raise UserError("`k` needs at least one number of neighbors, for example 20.")
        check_range(self, "k", least=1)
        check_range(self, "temperature", above=0)

    def run_sources(self, run: RunDatasets) -> tuple[ImageDataset, ...]:
        """Return the images that vote in the run, and the validation set."""
        return super().run_sources(run._replace(train=run.voters))

    def prepare_datasets(self, train: ImageDataset, val: ImageDataset, context: EvalContext) -> PreparedEval:
        """Prepare the evaluation of two labeled datasets with the same classes."""

        def score(train: ImageFeatures, val: ImageFeatures) -> Scores:
            tensors = train.features, train.labels, val.features, val.labels
            return Scores(knn_accuracy(*tensors, self.k, self.temperature, device=context.device))

        return prepare_on_features(self.name, {"train": train, "val": val}, score, context, self.size)
