"""Metrics of a run: averages between two log lines, and metrics.jsonl with the same values for TensorBoard."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.files import atomic_write, json_line, read_lines, write_errors
from dino_ssl.objectives import h
from dino_ssl.schedules import Clock, Schedule

METRICS = "metrics.jsonl"


class Meter:
    """Metrics between two log lines: sums that stay on the device, and the time spent waiting for data."""

    def __init__(
        self,
        schedules: Mapping[str, Schedule],
        world_size: int,
        measure: Callable[[], Mapping[str, Tensor]] = dict,
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
        """Return True if the losses since the last log line are finite, on this rank or on all; synchronizes."""
        loss = self._sums.get("loss")
        return loss is None or bool(torch.isfinite(distributed.all_reduce_sum(loss) if all_ranks else loss))

    def close(self, clock: Clock) -> dict[str, float]:
        """Return the averages over steps and ranks, with the schedules' values, and start the next window.

        Scalars are averaged. A vector of shares that sum to 1 becomes the number in use, exp of its entropy.
        """
        values = {name: value / max(1, self._steps) for name, value in self._sums.items()} | dict(self._measure())
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


class Log:
    """Appends to a run's metrics, on rank 0. On resume, lines after the resumed step are removed first."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS
        if not distributed.is_rank0():
            return
        from tensorboardX.event_file_writer import EventsWriter  # the others use a thread, which a full disk blocks

        if self._path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= step and step > 0]
            text = "".join(map(_line, kept))
            atomic_write(self._path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))
        self._file = self._path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        with write_errors(folder):
            (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(folder / "tensorboard/events"))
            if step:  # discards what an interrupted run wrote after this step
                self._write_event(step + 1, {"session_log": {"status": "START"}})

    def write(self, clock: Clock, values: Mapping[str, Any], group: str = "") -> None:
        """Write one line. group: prefix of the tags in TensorBoard. Raises UserError if the disk is full."""
        if not distributed.is_rank0():
            return
        with write_errors(self._path):
            self._file.write(_line({"step": clock.step, "epoch": clock.step / clock.steps_per_epoch, **values}))
            scalars = [
                {"tag": f"{group}/{name}".lstrip("/"), "simple_value": value}
                for name, value in values.items()
                if isinstance(value, int | float) and name != "time"
            ]
            self._write_event(clock.step, {"summary": {"value": scalars}})
            self._events.flush()

    def _write_event(self, step: int, content: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        """Close the files; an error of a full disk is ignored, since every line was flushed before."""
        for file in (self._file, self._events) if distributed.is_rank0() else ():
            with contextlib.suppress(OSError):
                file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return every complete line of a run's metrics: numbers or None by name, and `eval`."""
    lines = read_lines(folder / METRICS)
    return [line for line in lines if type(line.get("step")) is int and all(map(_is_metric, line.items()))]


def _is_metric(item: tuple[str, Any]) -> bool:
    name, value = item
    if name == "epoch" and value is None:
        return False
    return isinstance(value, str) if name == "eval" else value is None or type(value) in (int, float)


def _line(values: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json_line(finite)
