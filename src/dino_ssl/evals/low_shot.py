"""Classification with few labels (Tables 10 and 12): logistic regression on frozen features of a labeled subset."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import DatasetSource, described, labelled_alone, labelled_pair
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import VAL, EvalContext, Evaluation, PreparedEval, Scores, Source
from dino_ssl.evals.features import ImageFeatures
from dino_ssl.evals.knn import knn_accuracy
from dino_ssl.evals.logistic import ROWS, fit_logistic
from dino_ssl.evals.pixels import prepare_on_features
from dino_ssl.progress import Progress


def sample_subset(
    labels: np.ndarray, *, share: float | None = None, per_class: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return sorted indices of a random subset of every class.

    A class of n images contributes round(share n) images, at least one, or `per_class` images. For equal seeds, a
    smaller subset is contained in a larger one. Images with a negative label are ignored.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    subset = []
    for label in np.unique(labels[labels >= 0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(members))) if share is not None else per_class
        subset.append(members[:count])
    return np.sort(np.concatenate(subset))


def read_subset(names: Sequence[str], file: Path) -> np.ndarray:
    """Return the indices of the images that a text file lists, one name per line, with or without folders."""
    try:
        listed = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a list of image names, one per line: {error}") from error
    indices = {name.rpartition("/")[2]: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    missing = [name for name in listed if name not in indices]
    if missing or not listed:
        examples = f" ({', '.join(missing[:3])}, ...)" if missing else ""
        raise UserError(
            f"{file} lists {len(listed)} images; {len(missing)} of them are not in TRAIN{examples}. "
            f"Expected names such as {', '.join(names[:2])}, one per line."
        )
    return np.unique([indices[name] for name in listed])


@dataclass(frozen=True, kw_only=True)
class LowShot(Evaluation):
    """Accuracy with few labels: logistic regression and k-NN on frozen features; mean and deviation over subsets."""

    name: ClassVar[str] = "low-shot"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("TRAIN", "Folder of class folders from which labeled images are sampled; `scenes` generates images."),
        VAL,
    )
    paper: ClassVar[str] = "Tables 10 and 12, Appendix A"
    examples: ClassVar[str] = """\
  dino eval low-shot runs/photos photos/                      1 % and 10 % of the labels, five subsets of each
  dino eval low-shot runs/photos photos/ --share 1 --per-class 1 5 20
  dino eval low-shot dino_vits16 imagenet/train imagenet/val --share --lists 1percent.txt 10percent.txt"""

    share: tuple[float, ...] = (0.01, 0.1)
    """Fractions of every class of TRAIN that are labeled, at least one image; 1 uses all labels (Table 10)."""
    per_class: tuple[int, ...] = ()
    """Numbers of labeled images per class."""
    lists: tuple[str, ...] = ()
    """Text files with the names of the labeled images, one per line: SimCLR's splits, as in Table 12. Give --share
    without numbers to use the lists alone."""
    subsets: int = 5
    """Random subsets of each size; the score is their mean."""
    seed: int = 0
    """Seed of the first subset; the next one uses the next seed."""
    normalize: bool = True
    """Normalize features to unit length before the regression, as in the paper."""
    regularization: float = 0.1
    """The penalty is this / (2 n) |W|^2, added to the mean loss of n images; scikit-learn calls its inverse C."""
    tolerance: float = 1e-4
    """Maximum relative difference between the loss and its minimum."""
    k: int = 20
    """Neighbors of the k-NN accuracy on the same subsets (Table 10); 0 skips k-NN."""
    val_fraction: float = 0.2
    """Fraction of every class that is held out for validation if VAL is not given."""
    size: int | None = None
    """Side of the center crop in pixels; default: the size that the network was trained at."""

    def __post_init__(self) -> None:
        if not (self.share or self.per_class or self.lists):
            raise UserError("Low-shot needs labeled images: set `share`, `per_class` or `lists`.")
        check_range(self, "share", above=0, most=1)
        check_range(self, "per_class", "subsets", "size", least=1)
        check_range(self, "seed", "k", least=0)
        check_range(self, "regularization", "tolerance", above=0)
        check_range(self, "val_fraction", above=0, below=1)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open the labeled images and sample the subsets."""
        with context.progress("reading the datasets") as progress:
            pair = labelled_pair(*sources, val_fraction=self.val_fraction, progress=progress)
        train, val = labelled_alone(pair, "Low-shot")
        subsets = self.sample_subsets(train)
        used = np.unique(np.concatenate([part for parts in subsets.values() for part in parts]))
        rows = {name: [np.searchsorted(used, part) for part in parts] for name, parts in subsets.items()}
        data, datasets = {"train": described(train), "val": described(val)}, (train.subset(used), val)
        score = partial(self._score, rows, len(train.classes), context)
        return prepare_on_features(self.name, data, datasets, score, context, self.size)

    def sample_subsets(self, train: ImageDataset) -> dict[str, list[np.ndarray]]:
        """Return the image indices of every subset, by the name of its size: {"10 %": [indices, ...], ...}."""
        labels = np.asarray(train.labels)
        smallest = int(np.bincount(labels)[np.unique(labels)].min())
        if self.per_class and max(self.per_class) > smallest:
            raise UserError(
                f"`per_class` must be at most {smallest}, the size of the smallest class of TRAIN; "
                f"got {max(self.per_class)}."
            )
        seeds = range(self.seed, self.seed + self.subsets)
        subsets = {}
        for share in self.share:  # there is only one subset of all images
            share_seeds = seeds if share < 1 else seeds[:1]
            subsets[f"{100 * share:g} %"] = [sample_subset(labels, share=share, seed=seed) for seed in share_seeds]
        for n in self.per_class:
            subsets[f"{n} per class"] = [sample_subset(labels, per_class=n, seed=seed) for seed in seeds]
        return subsets | {Path(file).stem: [read_subset(train.names, Path(file))] for file in self.lists}

    def _score(
        self,
        subsets: Mapping[str, list[np.ndarray]],
        classes: int,
        context: EvalContext,
        train: ImageFeatures,
        val: ImageFeatures,
    ) -> Scores:
        """Return {"1 %": mean top-1, "1 % spread": standard deviation over subsets, "1 % 20-NN": ..., ...}."""
        if self.normalize:
            train, val = (f._replace(features=F.normalize(f.features, dim=1)) for f in (train, val))
        values, details = {}, {}
        for name, parts in subsets.items():
            runs: list[dict[str, Any]] = []
            for number, part in enumerate(parts, 1):
                rows = torch.from_numpy(np.flatnonzero(np.isin(train.indices.numpy(), part)))
                with context.progress(f"logistic regression, {name}, subset {number} of {len(parts)}") as progress:
                    runs.append(self._score_subset(train, val, rows, classes, context.device, progress))
            details[name] = runs
            for metric in [key for key in runs[0] if key in ("top-1", f"{self.k}-NN")]:
                title = name if metric == "top-1" else f"{name} {metric}"
                accuracies = [run[metric] for run in runs]
                values[title] = statistics.mean(accuracies)
                if len(runs) > 1:
                    values[f"{title} spread"] = statistics.stdev(accuracies)
        return Scores(values, {"subsets": details})

    def _score_subset(
        self,
        train: ImageFeatures,
        val: ImageFeatures,
        rows: Tensor,
        classes: int,
        device: torch.device,
        progress: Progress,
    ) -> dict[str, Any]:
        """Return the accuracies of one regression and one k-NN on the training features in `rows`."""
        assert train.labels is not None
        assert val.labels is not None
        x, y, decay = train.features[rows], train.labels[rows], self.regularization / len(rows)
        fit = fit_logistic(x, y, classes, decay, tolerance=self.tolerance, device=device, progress=progress)
        hits = sum(
            int(((part.to(fit.weights) @ fit.weights).argmax(1).cpu() == labels).sum())
            for part, labels in zip(val.features.split(ROWS), val.labels.split(ROWS), strict=True)
        )
        top1 = 100 * hits / len(val.labels)
        result = {"top-1": top1, "images": len(rows), "loss": fit.loss, "gap": fit.gap, "evaluations": fit.evaluations}
        if self.k:
            metric = f"{self.k}-NN"
            result[metric] = knn_accuracy(x, y, val.features, val.labels, (self.k,), device=device)[metric]
        return result
