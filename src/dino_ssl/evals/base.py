"""The interface of every evaluation, and the context that it runs in.

An `Evaluation` is a frozen dataclass of settings: its fields are the protocol. `prepare` opens and validates the data
and returns a `PreparedEval`, a function of a backbone. A new evaluation is one class, inside or outside the package.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import DatasetSource, labeled_pair
from dino_ssl.errors import UserError, check_range
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import StartProgress, no_progress

Autocast = Callable[[], AbstractContextManager]
"""Returns the autocast context of the forward pass; `runtime` chooses the precision."""
CPU = torch.device("cpu")


def check_finite(name: str, *values: Tensor) -> None:
    """Raise UserError if a value is NaN or infinite: ordinary scores could be computed from the others."""
    if not all(bool(tensor.isfinite().all()) for tensor in values):
        raise UserError(f"{name} contain NaN or infinity: the training of this network has probably diverged.")


class Source(NamedTuple):
    """A positional argument of an evaluation: a folder, a file, or `scenes`."""

    name: str
    help: str
    required: bool = True


class Scores(dict[str, float]):
    """Scores by name, in display order; in percent unless the name states another unit."""

    def __init__(self, values: Mapping[str, float], details: Mapping[str, Any] | None = None) -> None:
        super().__init__(values)
        self.details = dict(details or {})
        """JSON data that explains the scores: per query, per object, the selected hyperparameters."""


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """Device, data loading and output settings that are not part of a protocol."""

    device: torch.device = CPU
    """Device of the backbone."""
    workers: int = 0
    """Worker processes that decode images."""
    batch_size: int = 64
    """Images per forward pass."""
    size: int = 224
    """Image size in pixels at which the backbone is evaluated if the protocol fixes no size."""
    autocast: Autocast = nullcontext
    progress: StartProgress = no_progress
    """`with context.progress("features") as progress: progress(3, 100)`."""
    cache: Path | None = None
    """Folder of cached features; None disables the cache."""
    out: Path | None = None
    """Folder for files that an evaluation writes, for example masks; None writes none."""


@dataclass(frozen=True, kw_only=True)
class PreparedEval:
    """An evaluation with its data opened and validated: call it with a backbone on the context's device."""

    name: str
    data: Mapping[str, Mapping[str, Any]]
    """JSON description of the data by source: number of images, fingerprint."""
    score: Callable[[Backbone], Scores]
    """Returns the same scores on every rank."""
    references: Mapping[str, Callable[[], Scores]] = field(default_factory=dict)
    """Return scores to compare with that need no network, such as `raw_pixels`."""
    score_reference: Callable[[Backbone], Scores] | None = None
    """`score` without output files; needed only if `score` writes some."""
    validate: Callable[[Backbone], object] = lambda backbone: None
    """Raises UserError if the evaluation is not defined for this backbone."""
    size: int | None = None
    """Side of the network's input in pixels, to be printed; None if images differ in it."""

    def __call__(self, backbone: Backbone) -> Scores:
        """Evaluate a backbone."""
        self.validate(backbone)
        return self.score(backbone)


class RunDatasets(NamedTuple):
    """The images of a training run, from which an evaluation takes those that are not given."""

    train: ImageDataset
    val: ImageDataset | None
    voters: ImageDataset  # the training images that vote in the online evaluation


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """Settings of an evaluation: a subclass is a frozen dataclass whose fields are the protocol and the flags."""

    name: ClassVar[str]
    """Name in results and in `dino eval NAME`."""
    sources: ClassVar[tuple[Source, ...]]
    """Positional arguments after the checkpoint, in order."""
    paper: ClassVar[str] = ""
    """Table and section of the paper that the protocol follows."""
    examples: ClassVar[str] = ""
    """Command lines for --help."""

    @abstractmethod
    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open and validate the data. Raise UserError with the expected layout if it does not fit."""

    def run_sources(self, run: RunDatasets) -> tuple[ImageDataset, ...]:
        """Return the sources if none are given. Raise UserError if the images of the run do not fit."""
        return (run.train,) if run.val is None else (run.train, run.val)


@dataclass(frozen=True, kw_only=True)
class LabeledEvaluation(Evaluation):
    """An evaluation that learns from labeled images and is scored on others with the same classes."""

    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "TRAIN", "Folder of class folders to learn from, or `scenes`; default: the run's images.", required=False
        ),
        Source("VAL", "Folder of class folders to score; default: a part of every class of TRAIN.", required=False),
    )

    size: int | None = None
    """Side of the crops in pixels; default: the size at which the run evaluates its network."""
    val_fraction: float = 0.1
    """Fraction of every class that is held out for validation if VAL is not given."""

    def __post_init__(self) -> None:
        check_range(self, "size", least=1)
        check_range(self, "val_fraction", above=0, below=1)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open the labeled images."""
        with context.progress("reading the datasets") as progress:
            train, val = labeled_pair(*sources, val_fraction=self.val_fraction, progress=progress)
        return replace(self.prepare_datasets(train, val, context), size=self.size or context.size)

    def run_sources(self, run: RunDatasets) -> tuple[ImageDataset, ...]:
        """Return the training and validation set. Raise UserError if they have no labels."""
        if run.train.labels is None:
            raise UserError(
                f"{self.name} needs labels, and the images of the run have none. Expected folders of labeled images; "
                "two-crop-retrieval evaluates images without labels."
            )
        return super().run_sources(run)

    @abstractmethod
    def prepare_datasets(self, train: ImageDataset, val: ImageDataset, context: EvalContext) -> PreparedEval:
        """Prepare the evaluation of two labeled datasets with the same classes."""


def reference_scores(prepared: PreparedEval, build: Callable[[], Backbone] | None) -> dict[str, Scores]:
    """Return the evaluation's own reference scores (raw pixels) and those of random weights.

    build: Builds the network with random weights on the context's device; None omits them.
    """
    references = {name: measure() for name, measure in prepared.references.items()}
    if build is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = build()
        references["random_weights"] = (prepared.score_reference or prepared)(backbone)
    return references


def below_references(values: Mapping[str, float], references: Mapping[str, Mapping[str, float]]) -> str:
    """Return in one line which scores are below which reference scores; an empty string if none is.

    The effective rank is no score: that of raw pixels or noise is high, and means nothing.
    """
    lines = []
    for name, scores in references.items():
        if below := [k for k, value in values.items() if k != "effective rank" and value < scores.get(k, -math.inf)]:
            lines.append(f"Below {name.replace('_', ' ')}: {', '.join(below)}.")
    return " ".join(lines)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Use eval mode and inference mode inside; restore the mode of every submodule afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast, TF32 and bfloat16 matmuls inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
