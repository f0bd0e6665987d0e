"""Evaluations that a training run repeats on a schedule: the `evals` of a Run."""

import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dino_ssl.config import type_name
from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals import import_all
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, RunDatasets
from dino_ssl.models.backbone import Backbone
from dino_ssl.schedules import Clock

import_all()  # a Run in JSON names evaluations by class


@dataclass(frozen=True, kw_only=True)
class ScheduledEval:
    """An evaluation of the network during training: the arguments of `dino eval` without the checkpoint."""

    evaluation: Evaluation
    """The evaluation and its protocol."""
    sources: tuple[str | DatasetConfig, ...]
    """Its data, in the order of the command line: folders, or `scenes`."""
    every_epochs: float = 0
    """Interval in epochs, starting before the first step; 0: only at the end."""

    def __post_init__(self) -> None:
        known = self.evaluation.sources
        required = sum(source.required for source in known)
        if not required <= len(self.sources) <= len(known):
            expected = " ".join(source.name if source.required else f"[{source.name}]" for source in known)
            sources = " ".join(map(_source_text, self.sources)) or "nothing"
            raise UserError(f"{self.evaluation.name} expected {expected}; got {sources}.")
        check_range(self, "every_epochs", least=0, below=math.inf)

    @property
    def label(self) -> str:
        """Name of its scores in metrics and reports: `retrieval roxford5k --multiscale`."""
        kind = type_name(type(self.evaluation))
        name = kind if ":" in kind else self.evaluation.name
        return shlex.join([name, *map(_source_text, self.sources), *_flags(self.evaluation)])

    def __str__(self) -> str:
        return f"{self.label} --every-epochs {self.every_epochs:g}" if self.every_epochs else self.label


class PreparedScheduledEval(NamedTuple):
    """A scheduled evaluation whose data is open."""

    label: str
    every_epochs: float
    evaluation: PreparedEval


def check_labels_differ(evals: Sequence[ScheduledEval]) -> None:
    """Raise UserError if two evaluations have the same name in the metrics."""
    labels = [scheduled.label for scheduled in evals]
    if duplicate := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"`evals` contains an evaluation twice: {duplicate}. Remove one of them.")


def prepare_all(
    evals: Sequence[ScheduledEval], context: EvalContext, backbone: Backbone, run_datasets: RunDatasets
) -> list[PreparedScheduledEval]:
    """Open the data of every evaluation before training. Raise UserError if one does not fit its data or backbone."""
    prepared = []
    for scheduled in evals:
        try:
            sources = scheduled.sources or scheduled.evaluation.run_sources(run_datasets)
            evaluation = scheduled.evaluation.prepare(sources, context)
            evaluation.validate(backbone)
        except UserError as error:
            raise UserError(f'`evals` "{scheduled.label}" is not possible: {error}') from error
        prepared.append(PreparedScheduledEval(scheduled.label, scheduled.every_epochs, evaluation))
    return prepared


def is_due(every_epochs: float, clock: Clock) -> bool:
    """Return True if the epoch that just ended passed a multiple of `every_epochs` (0: never), or was the last."""
    if clock.step == clock.steps or not every_epochs:
        return clock.step == clock.steps
    return math.floor(clock.epoch / every_epochs) > math.floor((clock.epoch - 1) / every_epochs)


def _source_text(source: str | DatasetConfig) -> str:
    return source if isinstance(source, str) else source.spec


def _flags(settings: Any) -> Iterator[str]:
    """Yield the settings that differ from their defaults, as command line flags."""
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(field.default, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}"
            yield from map(str, value if isinstance(value, tuple) else [value])
