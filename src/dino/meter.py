"""What a line of metrics is made of: averages over some steps, the schedules' values, and where the time went."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dino import dist
from dino.data.views import Batch
from dino.objectives import h
from dino.optim import Optim
from dino.schedules import Clock, Schedule
from dino.vitals import Vitals


class Meter:
    """Metrics between two log lines: sums that stay on the device, and where the time went."""

    def __init__(
        self, optim: Optim, schedules: Mapping[str, Schedule], world: int, vitals: Vitals | None = None
    ) -> None:
        """schedules: the method's own, by the names under which they are logged. vitals: measured at each line."""
        rates = {"lr": optim.lr_schedule(), "weight_decay": optim.weight_decay_schedule()}
        self._schedules, self._world, self._vitals = rates | dict(schedules), world, vitals
        self._began = time.monotonic()
        self._open()

    def _open(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._pictures = 0, 0
        self._waited, self._since = 0.0, time.monotonic()

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, and the time it took to get each on the account of the data."""
        batches = iter(batches)
        while True:
            asked = time.monotonic()
            item = next(batches, None)
            self._waited += time.monotonic() - asked
            if item is None:
                return
            if self._vitals is not None:
                self._vitals.next_step()
            yield item

    def add(self, metrics: dict[str, Tensor], batch: Batch) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._pictures += batch.views[0].shape[1]

    def is_finite(self, *, everywhere: bool = False) -> bool:
        """Whether the losses since the last line are numbers, of this rank or (asked by all) of every rank; waits for
        the device."""
        loss = self._sums.get("loss")
        return loss is None or bool(torch.isfinite(dist.total(loss) if everywhere else loss))

    def close(self, clock: Clock) -> dict[str, float]:
        """Averages over the window's steps and ranks, with the schedules' values; opens the next window.

        Scalars are averaged; a vector of shares that sum to 1 becomes the number of those in use, exp of its entropy.
        Vitals are of the last step.
        """
        measured = {} if self._vitals is None else self._vitals.measure()
        values = {name: value / max(1, self._steps) for name, value in self._sums.items()} | measured
        flat = dist.mean(torch.cat([value.float().flatten() for value in values.values()]))
        parts = flat.split([value.numel() for value in values.values()])
        scalars = torch.stack([part[0] if part.numel() == 1 else h(part).exp() for part in parts])
        metrics = dict(zip(values, scalars.tolist(), strict=True))  # the one place that waits for the device
        seconds = time.monotonic() - self._since
        metrics |= {
            **{name: schedule(clock) for name, schedule in self._schedules.items()},
            "images_per_s": self._world * self._pictures / seconds,
            "wait": self._waited / seconds,
            "time": time.monotonic() - self._began,
        }
        self._open()
        return metrics
