"""Schedules: frozen dataclasses that map a Clock to a number.

    lr = Warmup(10, Cosine(5e-4, 1e-6))
    lr(Clock(step=0, steps_per_epoch=100, epochs=100))   # 0.0

Steps are optimizer steps, counted from 0. The end points follow the authors' code, whose numbers are the reference: the
warm-up reaches its peak on its last step, and a cosine ends one step before its final value.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Clock(NamedTuple):
    """A position in a training run."""

    step: int
    """Optimizer steps taken before this one, 0 .. steps - 1."""
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.step // self.steps_per_epoch

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.epochs


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` at the first step to `stop`, which the step after the last one would reach."""

    start: float
    stop: float

    def __call__(self, clock: Clock) -> float:
        """Return the value at this step."""
        return self.at(clock.step, clock.steps)

    def at(self, step: int, steps: int) -> float:
        """Return the value at a step of a cosine over `steps` steps."""
        return self.stop + 0.5 * (self.start - self.stop) * (1 + math.cos(math.pi * step / max(1, steps)))


@dataclass(frozen=True)
class Warmup:
    """A linear warm-up from `start` to the first value of `then`, which runs over the remaining steps."""

    epochs: float
    """Length of the warm-up in epochs, possibly fractional; at most the whole run."""
    then: Cosine
    start: float = 0.0

    def __call__(self, clock: Clock) -> float:
        """Return the value at this step."""
        warm = min(round(self.epochs * clock.steps_per_epoch), clock.steps)
        if clock.step < warm:
            return self.start + (self.then.start - self.start) * clock.step / max(1, warm - 1)
        return self.then.at(clock.step - warm, clock.steps - warm)


@dataclass(frozen=True)
class EpochRamp:
    """A linear ramp per epoch: `start` in epoch 0, `stop` from epoch `epochs - 1` on (Sec. 3.2, tau_t)."""

    start: float
    stop: float
    epochs: int
    """Length of the ramp in epochs; 0: `stop` from the first step."""

    def __call__(self, clock: Clock) -> float:
        """Return the value at this step."""
        if clock.epoch >= self.epochs:
            return self.stop
        return self.start + (self.stop - self.start) * clock.epoch / max(1, self.epochs - 1)


Schedule = Cosine | Warmup | EpochRamp
