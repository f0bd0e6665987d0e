"""How fast a run's step is here, and where its time goes: real training steps on noise, which nobody keeps."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dino_ssl.models.heads import Network
from dino_ssl.presets.benchmark_step import BenchmarkStep, benchmark_step
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, peak_memory, synchronize
from dino_ssl.schedules import Clock

CLASSES = 10
"""Of the noise, where a method learns labels."""
CLOCK = Clock(1001, 10, 10**6)
"""Late enough that the prototypes move, and no end of an epoch."""
REST = "backward pass, clipping"
ORDER = (
    "views to the device",
    "teacher's forward pass",
    "student's forward pass",
    "forward pass",
    "heads and loss",
    REST,
    "optimizer",
    "teacher's and center's update",
)
"""The parts of a step as they come."""


@dataclass(frozen=True)
class StepSpeed:
    """What a step took."""

    batch: int
    times: list[float]
    """Seconds of each step, after one to warm up."""
    peak: int
    """Bytes: of the card, or of this process."""
    spent: dict[str, float]
    """Seconds of one further step by part; it waits for the device after each, and may be slower for it."""

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds


class Stopwatch:
    """Time by part. A part inside another is not counted in the outer one, so that the parts add up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        yield
        self._turn()
        self._open.pop()

    def on(self, thing: Any, method: str, name: str) -> None:
        """Counts the calls of thing.method as this part from now on."""
        inner: Callable[..., Any] = getattr(thing, method)

        def timed(*args: Any, **options: Any) -> Any:
            with self(name):
                return inner(*args, **options)

        setattr(thing, method, timed)

    def _turn(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.spent[self._open[-1]] = self.spent.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@dataclass(frozen=True)
class TimedRuntime(Runtime):
    watch: Stopwatch | None = None

    def to_device(self, values: Tensor) -> Tensor:
        assert self.watch is not None
        with self.watch("views to the device"):
            return super().to_device(values)


def step_speed(run: Run, rt: Runtime, batch: int, steps: int, progress: Progress) -> StepSpeed:
    """Takes one training step of `batch` pictures to warm up, so many that count, and one by part."""
    run = replace(run, optim=replace(run.optim, batch_size=batch))
    tried, times = benchmark_step(run, rt, batch, CLASSES), []
    for number in range(steps + 1):
        progress(number, steps + 2)
        times.append(tried.step(CLOCK))
    peak = peak_memory(rt.device)
    progress(steps + 1, steps + 2)
    return StepSpeed(batch, times[1:], peak, _by_part(tried))


def _by_part(tried: BenchmarkStep) -> dict[str, float]:
    rt, method = tried.rt, tried.state.method
    watch = Stopwatch(rt.device)
    for name, network in method.named_children():
        if isinstance(network, Network):
            named = f"{name}'s forward pass" if name in ("teacher", "student") else "forward pass"
            watch.on(network, "features", named)
    for name in ("forward", "look_ahead"):
        watch.on(method, name, "heads and loss")
    watch.on(tried.state.optimizer, "step", "optimizer")
    watch.on(method, "after_step", "teacher's and center's update")
    timed = TimedRuntime(rt.device, rt.precision, rt.rank, rt.world_size, rt.optimized, watch=watch)
    with watch(REST):
        replace(tried, rt=timed).step(CLOCK)
    return {name: watch.spent[name] for name in ORDER if name in watch.spent}
