"""Averages of metrics between two log lines, with the values of the schedules and where the time went."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.objectives import h
from dino_ssl.schedules import Clock, Schedule


class Meter:
    """Metrics between two log lines: sums that stay on the device, and the time spent waiting for data."""

    def __init__(
        self,
        schedules: Mapping[str, Schedule],
        world_size: int,
        measure: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Start the first window.

        schedules: logged by these names. measure: further scalars (on the device), evaluated once per log line.
        """
        self._schedules, self._world_size, self._measure = schedules, world_size, measure
        self._started = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._images = 0, 0
        self._waited, self._since = 0.0, time.monotonic()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches and count the time until each is available as waiting for data."""
        batches = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def add(self, metrics: Mapping[str, Tensor], num_images: int) -> None:
        """Add one step's metrics to the sums."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._images += num_images

    def is_finite(self, *, all_ranks: bool = False) -> bool:
        """Return whether the losses since the last log line are finite, on this rank or on all; synchronizes."""
        loss = self._sums.get("loss")
        return loss is None or bool(torch.isfinite(distributed.all_reduce_sum(loss) if all_ranks else loss))

    def close(self, clock: Clock) -> dict[str, float]:
        """Return the averages over steps and ranks, with the schedules' values, and start the next window.

        Scalars are averaged. A vector of shares that sum to 1 becomes the number in use, exp of its entropy.
        """
        measured = {} if self._measure is None else self._measure()
        values = {name: value / max(1, self._steps) for name, value in self._sums.items()} | dict(measured)
        flat = distributed.all_reduce_mean(torch.cat([value.float().flatten() for value in values.values()]))
        parts = flat.split([value.numel() for value in values.values()])
        scalars = torch.stack([part[0] if part.numel() == 1 else h(part).exp() for part in parts])
        metrics = dict(zip(values, scalars.tolist(), strict=True))  # the only device synchronization
        seconds = time.monotonic() - self._since
        metrics |= {
            **{name: schedule(clock) for name, schedule in self._schedules.items()},
            "images_per_s": self._world_size * self._images / seconds,
            "wait": self._waited / seconds,
            "time": time.monotonic() - self._started,
        }
        self._reset()
        return metrics
