"""Few labels (Tables 10 and 12): multinomial logistic regression on frozen features of 1 %, 10 % or a few per class."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import DatasetSource, described, labelled_alone, labelled_pair
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import VAL, EvalContext, Extracted, Scores, Source
from dino_ssl.evals.knn import knn_accuracy
from dino_ssl.evals.logistic import ROWS, fit_logistic
from dino_ssl.evals.pixels import raw_pixels_of
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import Progress


def sample_subset(
    labels: np.ndarray, *, share: float | None = None, per_class: int | None = None, seed: int = 0
) -> np.ndarray:
    """The numbers of a random part of every class, in order: round(share n) of its n pictures and at least one, or
    `per_class`. With one seed the smaller part lies in the larger one."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    chosen = []
    for kind in np.unique(labels[labels >= 0]):
        members = rng.permutation(np.flatnonzero(labels == kind))
        count = max(1, round(share * len(members))) if share is not None else per_class
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


def read_subset(names: Sequence[str], file: Path) -> np.ndarray:
    """The numbers of the pictures that a text file names, one a line, with or without their folders."""
    try:
        wanted = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a list of pictures' names, one a line: {error}") from error
    numbers = {name.rpartition("/")[2]: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    missing = [name for name in wanted if name not in numbers]
    if missing or not wanted:
        raise UserError(
            f"{file} names {len(wanted)} pictures, of which {len(missing)} are not in TRAIN"
            + (f" ({', '.join(missing[:3])}, ...)" if missing else "")
            + f". Expected names such as {', '.join(names[:2])}, one a line."
        )
    return np.unique([numbers[name] for name in wanted])


@dataclass(frozen=True, kw_only=True)
class LowShot:
    """Accuracy with few labels: logistic regression and k-NN on frozen features, mean and spread over subsets."""

    name: ClassVar[str] = "low-shot"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("TRAIN", "Folder of class folders that the labels are drawn from; `scenes` draws pictures."),
        VAL,
    )
    paper: ClassVar[str] = "Tables 10 and 12, Appendix A"
    examples: ClassVar[str] = """\
  dino eval low-shot runs/photos photos/                      1 % and 10 % of the labels, five subsets of each
  dino eval low-shot runs/photos photos/ --share 1 --per-class 1 5 20
  dino eval low-shot dino_vits16 imagenet/train imagenet/val --share --lists 1percent.txt 10percent.txt"""

    share: tuple[float, ...] = (0.01, 0.1)
    """Shares of every class of TRAIN whose labels are known, at least one picture; 1 is all of them (Table 10)."""
    per_class: tuple[int, ...] = ()
    """Numbers of pictures of every class whose labels are known."""
    lists: tuple[str, ...] = ()
    """Text files that name the pictures to use, one a line: SimCLR's splits, as in Table 12. --share alone, without
    numbers, draws none beside them."""
    subsets: int = 5
    """Random subsets of each share or number; the figure is their mean."""
    seed: int = 0
    """Of the first subset; the next has the next seed."""
    normalize: bool = True
    """Whether features have unit length before the regression, as in the paper."""
    regularization: float = 0.1
    """The penalty is this / (2 n) |W|^2 beside the mean loss of n pictures; scikit-learn calls its inverse C."""
    tolerance: float = 1e-4
    """How far above the least possible loss the solution may lie, as a part of it."""
    k: int = 20
    """Neighbours that vote, on the same pictures (Table 10); 0 leaves k-NN out."""
    val_fraction: float = 0.2
    """Share of every class that is asked about, where there is no VAL."""
    size: int | None = None
    """Side in pixels of what the network sees; without it, what it was trained on."""

    def __post_init__(self) -> None:
        if not (self.share or self.per_class or self.lists):
            raise UserError("Low-shot needs --share, --per-class or --lists: how many labels are known?")
        if any(not 0 < share <= 1 for share in self.share):
            raise UserError(f"--share needs shares above 0 and up to 1; got {' '.join(map(str, self.share))}.")
        if any(count < 1 for count in self.per_class):
            raise UserError(f"--per-class needs numbers of at least 1; got {' '.join(map(str, self.per_class))}.")
        check_range(self, "subsets", "size", least=1)
        check_range(self, "seed", "k", least=0)
        check_range(self, "regularization", "tolerance", above=0)
        check_range(self, "val_fraction", above=0, below=1)

    def bind(self, sources: Sequence[DatasetSource], context: EvalContext) -> "BoundLowShot":
        with context.progress("looking at the pictures") as done:
            pair = labelled_pair(*sources, val_fraction=self.val_fraction, progress=done)
        train, val = labelled_alone(pair, "Low-shot")
        return BoundLowShot(self, train, val, context, self.draw(train))

    def draw(self, train: ImageDataset) -> dict[str, list[np.ndarray]]:
        """The numbers of the pictures of every subset, by what the table calls it."""
        labels = np.asarray(train.labels)
        fewest = int(np.bincount(labels)[np.unique(labels)].min())
        if self.per_class and max(self.per_class) > fewest:
            raise UserError(f"--per-class {max(self.per_class)}: the smallest class of TRAIN has {fewest} pictures.")
        seeds = range(self.seed, self.seed + self.subsets)
        # all of the pictures are drawn in one way only
        drawn = {
            f"{100 * share:g} %": [
                sample_subset(labels, share=share, seed=seed) for seed in (seeds if share < 1 else seeds[:1])
            ]
            for share in self.share
        }
        drawn |= {
            f"{n} per class": [sample_subset(labels, per_class=n, seed=seed) for seed in seeds] for n in self.per_class
        }
        return drawn | {Path(file).stem: [read_subset(train.names, Path(file))] for file in self.lists}


@dataclass(frozen=True)
class BoundLowShot:
    """The evaluator: the settings with the pictures and the subsets of them, and where it works."""

    settings: LowShot
    train: ImageDataset
    val: ImageDataset
    context: EvalContext
    subsets: Mapping[str, list[np.ndarray]]
    name: str = "low-shot"

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        return {"train": described(self.train), "val": described(self.val)}

    @property
    def used(self) -> np.ndarray:
        """The pictures that are in any subset: no other one needs a feature."""
        return np.unique(np.concatenate([part for parts in self.subsets.values() for part in parts]))

    def __call__(self, backbone: Backbone) -> Scores:
        """{"1 %": mean top-1 in percent, "1 % spread": deviation over subsets, "1 % 20-NN": ..., ...}"""
        size, used = self.settings.size, self.train.subset(self.used)
        return self._score(
            self.context.extract(backbone, used, size=size, label="features of the pictures with labels"),
            self.context.extract(backbone, self.val, size=size, label="features of the pictures asked about"),
        )

    def pixel_reference(self) -> Scores:
        """The same asked of raw pixels."""
        return self._score(*raw_pixels_of(self.train.subset(self.used), self.val, context=self.context))

    def _score(self, known: Extracted, asked: Extracted) -> Scores:
        numbers = self.used[known.indices.numpy()]
        values, details = {}, {}
        for regime, parts in self.subsets.items():
            runs = []
            for which, part in enumerate(parts, 1):
                rows = torch.from_numpy(np.flatnonzero(np.isin(numbers, part)))
                with self.context.progress(f"logistic regression, {regime}, subset {which} of {len(parts)}") as done:
                    runs.append(self._subset(known, asked, rows, done))
            details[regime] = runs
            for name in [key for key in runs[0] if key in ("top-1", f"{self.settings.k}-NN")]:
                found = [run[name] for run in runs]
                title = regime if name == "top-1" else f"{regime} {name}"
                values[title] = statistics.mean(found)
                if len(found) > 1:
                    values[f"{title} spread"] = statistics.stdev(found)
        return Scores(values, {"subsets": details})

    def _subset(self, known: Extracted, asked: Extracted, rows: Tensor, done: Progress) -> dict[str, float]:
        """One regression, and one vote, on the pictures in these rows."""
        settings, sides = self.settings, (known, asked)
        assert known.labels is not None
        assert asked.labels is not None
        train, test = ((F.normalize(s.features, dim=1) if settings.normalize else s.features) for s in sides)
        labels = known.labels[rows]
        decay = settings.regularization / len(rows)
        fit = fit_logistic(
            train[rows],
            labels,
            len(self.train.classes),
            decay,
            tolerance=settings.tolerance,
            device=self.context.device,
            progress=done,
        )
        hits = sum(
            int(((x.to(fit.weights) @ fit.weights).argmax(1).cpu() == y).sum())
            for x, y in zip(test.split(ROWS), asked.labels.split(ROWS), strict=True)
        )
        result = {
            "top-1": 100 * hits / len(test),
            "images": len(rows),
            "loss": fit.loss,
            "gap": fit.gap,
            "evaluations": fit.evaluations,
        }
        if settings.k:
            name = f"{settings.k}-NN"
            vote = knn_accuracy(train[rows], labels, test, asked.labels, (settings.k,), device=self.context.device)
            result[name] = vote[name]
        return result
