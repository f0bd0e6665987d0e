"""A schedule is a value that is a function: Clock in, number out.

    lr = Warmup(10, Cosine(5e-4, 1e-6))
    lr(Clock(step=0, steps_per_epoch=100, epochs=100))   # 0.0

Steps are optimizer steps, counted from 0. Where the authors' code and a textbook differ (the warm-up reaches its
top on its last step, a cosine ends one step short of its last value) this follows the code, whose numbers are
the reference.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Clock(NamedTuple):
    """A point of a training run."""

    step: int
    """Optimizer steps taken before this one, 0 .. steps - 1."""
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, clock: Clock) -> float:
        return self.value


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` at the first step towards `stop`, which the step after the last would reach."""

    start: float
    stop: float

    def __call__(self, clock: Clock) -> float:
        return _cosine(self, clock.step, clock.steps)


@dataclass(frozen=True)
class Warmup:
    """A straight line from `start` to the top of `then` over the first epochs, then `then` over what is left."""

    epochs: float
    """Length of the warm-up in epochs; a fraction is allowed, and 0 is none. At most the whole run is used."""
    then: Cosine | Constant
    start: float = 0.0

    def __call__(self, clock: Clock) -> float:
        warm = min(round(self.epochs * clock.steps_per_epoch), clock.steps)
        top = self.then.value if isinstance(self.then, Constant) else self.then.start
        if clock.step < warm:
            return self.start + (top - self.start) * clock.step / max(1, warm - 1)
        if isinstance(self.then, Constant):
            return top
        return _cosine(self.then, clock.step - warm, clock.steps - warm)


@dataclass(frozen=True)
class EpochRamp:
    """A straight line in whole epochs: `start` in epoch 0, `stop` from epoch `epochs - 1` on (Sec. 3.2, tau_t)."""

    start: float
    stop: float
    epochs: int
    """Epochs that the ramp takes; 0 is `stop` at once. A run shorter than the ramp just ends on its way up."""

    def __call__(self, clock: Clock) -> float:
        if clock.epoch >= self.epochs:
            return self.stop
        return self.start + (self.stop - self.start) * clock.epoch / max(1, self.epochs - 1)


Schedule = Constant | Cosine | Warmup | EpochRamp


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """The same schedule with every value but a cosine's last multiplied: the linear scaling rule scales the peak
    of the learning rate and leaves its floor alone (Sec. 3.2)."""
    match schedule:
        case Constant(value):
            return Constant(value * factor)
        case Cosine(start, stop):
            return Cosine(start * factor, stop)
        case Warmup(epochs, Constant(value), start):
            return Warmup(epochs, Constant(value * factor), start)
        case Warmup(epochs, Cosine(top, stop), start):
            return Warmup(epochs, Cosine(top * factor, stop), start)
        case EpochRamp(start, stop, epochs):
            return EpochRamp(start * factor, stop * factor, epochs)
    raise TypeError(f"expected a schedule, got {schedule!r}")


def _cosine(curve: Cosine, step: int, steps: int) -> float:
    return curve.stop + 0.5 * (curve.start - curve.stop) * (1 + math.cos(math.pi * step / max(1, steps)))
