"""Progress of training: a live bar with the main metrics on a terminal, plain lines otherwise."""

import math
import time
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dino_ssl.formatting import duration
from dino_ssl.schedules import Clock
from dino_ssl.terminal import QUIET_SECONDS, Terminal

SPEED_SECONDS = 60.0
"""Time constant in seconds of the moving average of the speed, which gives the remaining time."""


class TrainingProgress:
    """A context manager that shows epoch, step, loss, entropy, KL, feature rank, images/s and the remaining time."""

    def __init__(self, terminal: Terminal, clock: Clock, prototypes: int | None) -> None:
        self._terminal, self._clock = terminal, clock
        self._max_entropy = None if prototypes is None else math.log(prototypes)
        self._metrics: dict[str, float] = {}
        self._started = self._since = self._printed = time.monotonic()
        self._steps_per_s = 0.0
        self._activity = "starting"
        self._live = None
        if terminal.is_tty:
            self._live = Live(get_renderable=self._draw, console=terminal.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "TrainingProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, clock: Clock, metrics: dict[str, float]) -> None:
        """Show a line of metrics."""
        now = time.monotonic()
        steps, seconds = clock.step - self._clock.step, now - self._since
        if steps > 0 and seconds > 0:
            keep = math.exp(-seconds / SPEED_SECONDS) if self._steps_per_s else 0.0
            self._steps_per_s = keep * self._steps_per_s + (1 - keep) * steps / seconds
        self._clock, self._metrics, self._since, self._activity = clock, metrics, now, ""
        last = clock.step == clock.steps
        is_first_line = self._printed == self._started
        if self._live is None and (last or now - self._printed > QUIET_SECONDS or is_first_line):
            self._printed = now
            self._terminal.print("  ".join([self._epoch(), self._step(), *self._figures(), f"ETA {self._remaining()}"]))

    def pause(self, activity: str) -> None:
        """Show an activity other than training; its time is excluded from the speed."""
        self._activity = activity

    def resume(self) -> None:
        """Continue training after `pause`."""
        self._activity, self._since = "", time.monotonic()

    def _epoch(self) -> str:
        clock = self._clock
        return f"epoch {max(1, math.ceil(clock.step / clock.steps_per_epoch))}/{clock.epochs}"

    def _step(self) -> str:
        return f"step {self._clock.step}/{self._clock.steps}"

    def _remaining(self) -> str:
        return duration((self._clock.steps - self._clock.step) / self._steps_per_s) if self._steps_per_s else "-"

    def _figures(self) -> list[str]:
        metrics, figures = self._metrics, []
        if "loss" in metrics:
            figures.append(f"loss {metrics['loss']:.3f}")
        if "teacher_entropy" in metrics and self._max_entropy is not None:
            figures.append(f"teacher entropy {metrics['teacher_entropy']:.2f} of {self._max_entropy:.2f}")
        if "kl" in metrics:
            figures.append(f"KL {metrics['kl']:.2f}")
        if "feature_rank" in metrics:
            figures.append(f"rank {metrics['feature_rank']:.1f}")
        if "images_per_s" in metrics:
            figures.append(f"{metrics['images_per_s']:.0f} images/s")
        if "wait" in metrics:
            figures.append(f"{metrics['wait']:.0%} waiting for data")
        return figures

    def _draw(self) -> RenderableType:
        top = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            top.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=self._clock.steps, completed=self._clock.step)
        fraction = self._clock.step / max(1, self._clock.steps)
        times = f"{fraction:4.0%}  {duration(time.monotonic() - self._started)}, {self._remaining()} left"
        top.add_row(Text(self._epoch(), style="bold"), bar, times)
        bottom = Text("  ".join([self._step(), *self._figures()]), style="default", overflow="ellipsis", no_wrap=True)
        if self._activity:
            bottom.append(f"  {escape(self._activity)} …", style="dim")
        return Group(top, bottom)
