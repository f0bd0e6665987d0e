"""Weighted nearest neighbours (Appendix F.1): how good frozen features are, with nothing to train and nothing
to tune.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import CLASS_FOLDERS, DatasetSource, described, labelled_pair
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import VAL, EvalContext, Extracted, Scores, Source, full_precision
from dino_ssl.evals.pixels import raw_pixels_of
from dino_ssl.models.backbone import Backbone

KS = (10, 20, 100, 200)  # Appendix F.1; 20 is the one that the paper reports
MEMORY_ROWS = 65536  # training pictures compared at once, for a chunk of test pictures: 64 MB of similarities


def nearest_neighbours(
    memory: Tensor, queries: Tensor, k: int, *, memory_rows: int = MEMORY_ROWS
) -> tuple[Tensor, Tensor]:
    """Cosine similarities [Q, k] and rows [Q, k] of the k nearest of memory [N, D] to queries [Q, D], best
    first.

    Float32 on purpose: at temperature .07 a similarity that is off by bfloat16's .004 moves a vote by 6 %.
    Between equal similarities the order is not defined; copies of one picture are the only ones that meet it.
    """
    with full_precision(queries.device):
        queries = F.normalize(queries.float(), dim=1)
        best = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, len(memory), memory_rows):
            block = F.normalize(memory[start : start + memory_rows].to(queries.device).float(), dim=1)
            similarity, found = (queries @ block.T).topk(min(k, len(block)), dim=1)
            best, rows = torch.cat([best, similarity], 1), torch.cat([rows, found + start], 1)
            best, keep = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, keep)
    return best, rows


def knn_votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """Each neighbour votes for its label with weight exp(similarity / temperature). [Q, k], [Q, k] -> [Q,
    classes]
    """
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
    """Top-1 and top-5 accuracy in percent: {"20-NN": 61.2, "20-NN top-5": 93.0, ...} for every k.

    Labels may be any integers; negative means unlabelled: such a picture neither votes nor counts. A k above
    the number of training pictures takes all of them. With fewer than five classes (or k below five) top-5
    looks at as many as there are. Between classes of equal votes the smaller label goes first, classes
    without any vote included.
    """
    _check(train_features, train_labels, test_features, test_labels, k)
    train_features, train_labels = _labelled(train_features, train_labels)
    test_features, test_labels = _labelled(test_features, test_labels)
    if not len(train_labels) or not len(test_labels):
        raise UserError(
            f"k-NN needs labelled pictures on both sides, but {len(train_labels)} of the training and "
            f"{len(test_labels)} of the test pictures have a label.\n{CLASS_FOLDERS}"
        )
    names, numbers = torch.cat([train_labels, test_labels]).unique(return_inverse=True)
    memory, truth = numbers[: len(train_labels)].to(device), numbers[len(train_labels) :].to(device)
    hits = {n: torch.zeros(2, dtype=torch.int64) for n in k}
    for start in range(0, len(test_features), chunk):
        queries = test_features[start : start + chunk].to(device)
        similarity, rows = nearest_neighbours(train_features, queries, max(k))
        for n in k:
            votes = knn_votes(similarity[:, :n], memory[rows[:, :n]], len(names), temperature)
            guesses = votes.sort(dim=1, descending=True, stable=True).indices[:, : min(5, n)]
            correct = (guesses == truth[start : start + chunk, None]).cpu()
            hits[n] += torch.stack([correct[:, 0].sum(), correct.any(1).sum()])
    percent = {n: (100 * hits[n].double() / len(test_labels)).tolist() for n in k}
    return {f"{n}-NN{kind}": percent[n][i] for n in k for i, kind in enumerate(("", " top-5"))}


@dataclass(frozen=True, kw_only=True)
class KNN:
    """Weighted k-NN accuracy of frozen features: nothing to train, nothing to tune."""

    name: ClassVar[str] = "knn"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("TRAIN", "Folder of class folders whose pictures vote; `scenes` draws pictures."),
        VAL,
    )
    paper: ClassVar[str] = "Tables 2 and 10, Appendix F.1"
    examples: ClassVar[str] = """\
  dino eval knn runs/photos photos/                    one folder: a part of every class is held back
  dino eval knn runs/photos photos_train/ photos_val/
  dino eval knn dino_vits16 photos/ --json             a released network; figures for a script
  dino eval knn timm:resnet18 photos/ --k 5 20"""

    k: tuple[int, ...] = KS
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """Of the votes (Appendix F.1)."""
    size: int | None = None
    """Side in pixels of what the network sees; without it, what it was trained on."""
    val_fraction: float = 0.2
    """Share of every class that is asked about, where there is no VAL."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise UserError(f"--k needs numbers of at least 1; got {' '.join(map(str, self.k)) or 'none'}.")
        check_range(self, "temperature", above=0)
        check_range(self, "size", least=1)
        check_range(self, "val_fraction", above=0, below=1)

    def bind(self, sources: Sequence[DatasetSource], context: EvalContext) -> "BoundKNN":
        with context.progress("looking at the pictures") as done:
            train, val = labelled_pair(*sources, val_fraction=self.val_fraction, progress=done)
        return BoundKNN(self, train, val, context)


@dataclass(frozen=True)
class BoundKNN:
    """The evaluator: the settings with the pictures, and where it works."""

    settings: KNN
    train: ImageDataset
    val: ImageDataset
    context: EvalContext
    name: str = "knn"

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        return {"train": described(self.train), "val": described(self.val)}

    def __call__(self, backbone: Backbone) -> Scores:
        """{"20-NN": percent, "20-NN top-5": percent, ...}, the same on every rank."""
        size = self.settings.size
        return self._score(
            self.context.extract(backbone, self.train, size=size, label="features of the pictures that vote"),
            self.context.extract(backbone, self.val, size=size, label="features of the pictures asked about"),
        )

    def pixel_reference(self) -> Scores:
        """The same vote of raw pixels."""
        return self._score(*raw_pixels_of(self.train, self.val, context=self.context))

    def _score(self, train: Extracted, val: Extracted) -> Scores:
        accuracies = accuracy_of(
            train, val, self.settings.k, temperature=self.settings.temperature, device=self.context.device
        )
        return Scores(dict(sorted(accuracies.items(), key=lambda item: "top-5" in item[0])))


def accuracy_of(train: Extracted, test: Extracted, k: Sequence[int] = KS, **options) -> dict[str, float]:
    """`knn_accuracy` of extracted features."""
    for which, side in (("training", train), ("test", test)):
        if side.labels is None:
            raise UserError(f"k-NN needs labels, and the {which} pictures have none.\n{CLASS_FOLDERS}")
    labels = [side.labels for side in (train, test) if side.labels is not None]
    return knn_accuracy(train.features, labels[0], test.features, labels[1], k, **options)


def _labelled(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that have a label; without a copy of gigabytes where all have."""
    known = labels >= 0
    return (features, labels) if known.all() else (features[known], labels[known])


def _check(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: Sequence[int]) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise UserError(
            "k-NN expected features [N, D] and [M, D] of one width, "
            f"received {list(train.shape)} and {list(test.shape)}. Extract both with the same backbone."
        )
    if len(train) != len(train_labels) or len(test) != len(test_labels):
        raise UserError(
            "k-NN expected one label per feature, "
            f"received {len(train_labels)} for {len(train)} and {len(test_labels)} for {len(test)}."
        )
    if not k or min(k) < 1:
        raise UserError(f"k-NN expected neighbours of at least 1, received k = {list(k)}.")
