"""Classification with few labels (Tables 10 and 12): logistic regression on frozen features of a labeled subset.

The regression is convex, so any exact solver gives the same result. The authors used cyanure; this is L-BFGS of torch.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import described, labeled_only
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, LabeledEvaluation, PreparedEval, Scores
from dino_ssl.evals.features import ImageFeatures, prepare_on_features
from dino_ssl.evals.knn import knn_accuracy
from dino_ssl.progress import Progress

ROWS = 8192  # images whose logits are in memory at once: 66 MB for 1000 classes


def sample_subset(
    labels: np.ndarray, *, share: float | None = None, per_class: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return sorted indices of a random subset of every class.

    A class of n images contributes round(share n) images, at least one, or `per_class` images. For equal seeds, a
    smaller subset is contained in a larger one. Images with a negative label are ignored.
    """
    rng, subset = np.random.default_rng(np.random.SeedSequence(seed)), []
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
        raise UserError(
            f"{file} lists {len(listed)} images; {len(missing)} of them are not in TRAIN ({', '.join(missing[:3])}). "
            f"Expected names such as {', '.join(names[:2])}, one per line."
        )
    return np.unique([indices[name] for name in listed])


def logistic_loss(
    weights: Tensor, features: Tensor, labels: Tensor, decay: float, *, sharded: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (1/n) sum of -log softmax(x W)_y + decay / 2 |W|^2 and its gradient: [D, C], [N, D], [N] -> [], [D, C].

    Computed in the weights' precision. Rank r sums rows r, r + world size, ...; every rank returns the same. Unless
    `sharded`, every rank sums all rows, with the rounding of a single rank.
    """
    rank, step = (distributed.rank(), distributed.world_size()) if sharded else (0, 1)
    shard = torch.arange(rank, len(labels), step)
    loss, gradient = weights.new_zeros(1), torch.zeros_like(weights)
    for part in shard.split(ROWS):
        x, y = features[part].to(weights), labels[part].to(weights.device)[:, None]
        log_p = (x @ weights).log_softmax(1)
        loss -= log_p.gather(1, y).sum() / len(labels)
        residual = log_p.exp().scatter_add_(1, y, log_p.new_full(y.shape, -1))
        gradient.addmm_(x.T, residual, alpha=1 / len(labels))
    if sharded:
        loss, gradient = distributed.all_reduce_sum(loss), distributed.all_reduce_sum(gradient)
    return loss.squeeze() + decay / 2 * weights.square().sum(), gradient.add(weights, alpha=decay)


class Fit(NamedTuple):
    """A solved logistic regression."""

    weights: Tensor  # [D, C] float64
    loss: float
    gap: float  # upper bound of the difference between the loss and its minimum
    evaluations: int  # of loss and gradient


def fit_logistic(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N], 0 .. classes - 1
    classes: int,
    decay: float,
    tolerance: float = 1e-4,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
    max_evaluations: int = 5000,
    *,
    sharded: bool = True,
) -> Fit:
    """Minimize `logistic_loss` without intercept until the gap is at most `tolerance` times the loss.

    L-BFGS with strong Wolfe line searches in float64. The penalty makes the loss strongly convex, hence
    f(w) - min f <= |gradient|^2 / (2 decay): this bound is the stopping criterion.
    """
    if torch.device(device).type == "mps":
        device = "cpu"  # no float64
    weights = torch.zeros(features.shape[1], classes, dtype=torch.float64, device=device)
    solver = torch.optim.LBFGS(
        [weights], max_iter=10, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    gaps: list[float] = []

    def closure() -> Tensor:
        loss, weights.grad = logistic_loss(weights, features, labels, decay, sharded=sharded)
        gaps.append(float(weights.grad.square().sum()) / (2 * decay))
        progress(len(gaps), 0)
        return loss

    best = float("inf")
    with torch.no_grad():
        while True:
            loss = float(closure())
            if gaps[-1] <= tolerance * loss or loss >= best or len(gaps) >= max_evaluations:
                return Fit(weights, loss, gaps[-1], len(gaps))
            best = loss
            solver.step(closure)


@dataclass(frozen=True, kw_only=True)
class LowShot(LabeledEvaluation):
    """Accuracy with few labels: logistic regression and k-NN on frozen features; mean and deviation over subsets."""

    name: ClassVar[str] = "low-shot"
    paper: ClassVar[str] = "Tables 10 and 12, Appendix A"
    examples: ClassVar[str] = """\
  dino eval low-shot runs/photos photos/                      1 % and 10 % of the labels, five subsets of each
  dino eval low-shot runs/photos photos/ --share 1 --per-class 1 5 20
  dino eval low-shot dino_vits16 imagenet/train imagenet/val --share --lists 1percent.txt 10percent.txt"""

    share: tuple[float, ...] = (0.01, 0.1)
    """Fractions of every class of TRAIN that are labeled, at least one image; 1 uses all labels (Table 10)."""
    per_class: tuple[int, ...] = ()
    """Numbers of labeled images per class; a smaller class is labeled completely."""
    lists: tuple[str, ...] = ()
    """Text files with the names of the labeled images, one per line: SimCLR's splits, as in Table 12. Give --share
    without numbers to use the lists alone."""
    subsets: int = 5
    """Random subsets of each size; the score is their mean."""
    seed: int = 0
    """Seed of the first subset; the next one uses the next seed."""
    regularization: float = 0.1
    """The penalty is this / (2 n) |W|^2, added to the mean loss of n images; scikit-learn calls its inverse C."""
    tolerance: float = 1e-4
    """Maximum relative difference between the loss and its minimum."""
    k: int = 20
    """Neighbors of the k-NN accuracy on the same subsets (Table 10); 0 skips k-NN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.share or self.per_class or self.lists):
            raise UserError("Low-shot needs labeled images: set `share`, `per_class` or `lists`.")
        check_range(self, "share", above=0, most=1)
        check_range(self, "per_class", "subsets", least=1)
        check_range(self, "seed", "k", least=0)
        check_range(self, "regularization", "tolerance", above=0)

    def prepare_datasets(self, train: ImageDataset, val: ImageDataset, context: EvalContext) -> PreparedEval:
        """Sample the subsets; only images of a subset are read."""
        train, val = labeled_only((train, val), "Low-shot")
        subsets = self.sample_subsets(train)
        used = np.unique(np.concatenate([part for parts in subsets.values() for part in parts]))
        rows = {name: [np.searchsorted(used, part) for part in parts] for name, parts in subsets.items()}
        score = partial(self._score, rows, len(train.classes), context)
        prepared = prepare_on_features(self.name, {"train": train.subset(used), "val": val}, score, context, self.size)
        return replace(prepared, data={"train": described(train), "val": described(val)})

    def sample_subsets(self, train: ImageDataset) -> dict[str, list[np.ndarray]]:
        """Return the image indices of every subset, by the name of its size: {"10 %": [indices, ...], ...}."""
        labels = np.asarray(train.labels)
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
        x, test = (F.normalize(each.features, dim=1) for each in (train, val))
        values, details, knn = {}, {}, f"{self.k}-NN"
        for name, parts in subsets.items():
            runs: list[dict[str, Any]] = []
            for number, part in enumerate(parts, 1):
                rows = torch.from_numpy(np.isin(train.indices.numpy(), part))
                data = x[rows], train.labels[rows], test, val.labels
                with context.progress(f"logistic regression, {name}, subset {number} of {len(parts)}") as progress:
                    runs.append(self._logistic(*data, classes, context.device, progress))
                if self.k:
                    runs[-1][knn] = knn_accuracy(*data, (self.k,), device=context.device)[knn]
            details[name] = runs
            titles = {"top-1": name} | ({knn: f"{name} {knn}"} if self.k else {})
            for metric, title in titles.items():
                accuracies = [run[metric] for run in runs]
                values[title] = statistics.mean(accuracies)
                if len(runs) > 1:
                    values[f"{title} spread"] = statistics.stdev(accuracies)
        return Scores(values, {"subsets": details})

    def _logistic(
        self, x: Tensor, y: Tensor, test: Tensor, truth: Tensor, classes: int, device: torch.device, progress: Progress
    ) -> dict[str, Any]:
        """Return the accuracy on the test images of a regression on the features x and labels y."""
        fit = fit_logistic(x, y, classes, self.regularization / len(x), self.tolerance, device, progress)
        hits = sum(
            int(((part.to(fit.weights) @ fit.weights).argmax(1).cpu() == labels).sum())
            for part, labels in zip(test.split(ROWS), truth.split(ROWS), strict=True)
        )
        top1 = 100 * hits / len(truth)
        return {"top-1": top1, "images": len(x), "loss": fit.loss, "gap": fit.gap, "evaluations": fit.evaluations}
