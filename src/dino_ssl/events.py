"""Events of a training run: `training.train` yields them, the caller matches on their type."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.methods.method import Method
from dino_ssl.schedules import Clock


class Started(NamedTuple):
    """Training is ready for its first step, or for step `clock.step` of a resumed run."""

    clock: Clock
    method: Method
    train_set: ImageDataset
    val_set: ImageDataset | None
    reference_scores: Mapping[str, Mapping[str, float]]
    best: Mapping[str, Any]
    """The best online evaluation so far: `name`, `value`, `epoch`; empty before the first."""


class Logged(NamedTuple):
    """A line of metrics, averaged over the steps since the last one."""

    clock: Clock
    metrics: dict[str, float]


class Evaluated(NamedTuple):
    """The online evaluation on the validation set."""

    clock: Clock
    name: str
    values: dict[str, float]
    is_best: bool


class EvalStarted(NamedTuple):
    """One of the run's `evals` starts."""

    clock: Clock
    name: str


class EvalDone(NamedTuple):
    """One of the run's `evals` is done."""

    clock: Clock
    name: str
    values: dict[str, float]


class EpochDone(NamedTuple):
    """An epoch is complete. The method may be read, not changed."""

    clock: Clock
    method: Method


class Ended(NamedTuple):
    """Everything is saved. `finished` is False if training was stopped."""

    clock: Clock
    method: Method
    finished: bool
    skipped: dict[str, str]
    """Skipped files with the reasons."""
    signal: int | None = None
    """The signal that stopped training on this rank."""


Event = Started | Logged | Evaluated | EvalStarted | EvalDone | EpochDone | Ended
