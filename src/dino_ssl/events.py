"""What happens while training, one type each: `training.train` yields them, whoever drives it matches on them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.methods.method import Method
from dino_ssl.schedules import Clock


class Started(NamedTuple):
    """Training is about to take its first step (or goes on from `clock.step`)."""

    clock: Clock
    method: Method
    train: ImageDataset
    val_set: ImageDataset | None
    baselines: Mapping[str, Mapping[str, float]]
    best: Mapping[str, Any]
    """The best evaluation so far: `name`, `value`, `epoch`; empty before the first."""


class Logged(NamedTuple):
    """Metrics, averaged over the steps since the last ones."""

    clock: Clock
    metrics: dict[str, float]


class Evaluated(NamedTuple):
    """The val-fraction pictures were asked about."""

    clock: Clock
    name: str
    values: dict[str, float]
    is_best: bool


class Measuring(NamedTuple):
    """One of the run's `evals` is about to be asked, which may take a while."""

    clock: Clock
    name: str


class Measured(NamedTuple):
    """One of the run's `evals` was asked."""

    clock: Clock
    name: str
    values: dict[str, float]


class EpochDone(NamedTuple):
    """A whole epoch is behind; the method may be looked at (not touched)."""

    clock: Clock
    method: Method


class Ended(NamedTuple):
    """All is saved. `finished` is False where a signal asked to stop."""

    clock: Clock
    method: Method
    finished: bool
    skipped: dict[str, str]
    """Files that were left out, with the reasons."""
    signal: int | None = None
    """What asked to stop, on this rank."""


Event = Started | Logged | Evaluated | Measuring | Measured | EpochDone | Ended
