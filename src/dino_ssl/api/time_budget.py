"""The time of a run that is planned by `minutes`: the number of epochs is corrected once, by the real speed.

The plan measures a few steps, at that minute. After the first epochs the time of an epoch is known, with its
evaluations and with whatever else the machine does.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dino_ssl import distributed
from dino_ssl.evals.scheduled import is_due
from dino_ssl.events import EpochDone, Event, Logged, Started
from dino_ssl.run import Run
from dino_ssl.schedules import Clock

EARLIEST, LATEST = 0.05, 0.15
"""Fractions of the time: the correction follows an evaluation after the first, or any epoch after the second."""
TOLERANCE = 0.03
"""A smaller relative change of the number of epochs is not worth a correction."""


@dataclass
class TimeBudget:
    """Measures a run against its time; call `update` with every event, on all ranks."""

    minutes: float
    fit: Callable[[int], Run]
    """Returns the run with another number of epochs, and with the schedules for it."""
    epochs: int | None = None
    """The number of epochs that fits into the time; None until it is known."""
    began: float = field(default_factory=lambda: time.monotonic())

    def update(self, event: Event, every_epochs: float) -> bool:
        """Return True if training must stop after this line of metrics, to resume with another number of epochs.

        every_epochs: epochs between two evaluations.
        """
        match event:
            case Started():
                self._start = time.monotonic()
            case EpochDone(clock) if self.epochs is None:
                self.epochs = distributed.run_on_rank0(lambda: self._epochs(clock, every_epochs))
            case Logged(clock):
                return self.epochs not in (None, clock.epochs)
        return False

    def _epochs(self, clock: Clock, every_epochs: float) -> int | None:
        """Return the number of epochs that fits into the time, at least one more; None if it is too early."""
        now, seconds = time.monotonic(), 60 * self.minutes
        spent = (now - self.began) / seconds
        if spent < EARLIEST or (spent < LATEST and not is_due(every_epochs, clock)):
            return None
        fitting = clock.epoch + round((self.began + seconds - now) * clock.epoch / (now - self._start))
        epochs = max(fitting, min(clock.epoch + 2, clock.epochs))  # training stops within the next epoch
        return clock.epochs if abs(epochs / clock.epochs - 1) < TOLERANCE else epochs
