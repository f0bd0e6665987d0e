"""Training as it is watched: a live bar and one line of figures, or plain lines where nobody watches."""

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

MEMORY_SECONDS = 60.0
"""The time left follows from the speed of about the last minute."""


class TrainingProgress:
    """Epoch, step, loss, entropy, KL, rank, images/s, waiting, time left: `with TrainingProgress(...) as watch`."""

    def __init__(self, terminal: Terminal, clock: Clock, prototypes: int | None) -> None:
        self._terminal, self._clock = terminal, clock
        self._top = None if prototypes is None else math.log(prototypes)
        self._metrics: dict[str, float] = {}
        self._began = self._since = self._said = time.monotonic()
        self._rate = 0.0  # steps/s
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

    def logged(self, clock: Clock, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        steps, seconds = clock.step - self._clock.step, now - self._since
        if steps > 0 and seconds > 0:
            keep = math.exp(-seconds / MEMORY_SECONDS) if self._rate else 0.0
            self._rate = keep * self._rate + (1 - keep) * steps / seconds
        self._clock, self._metrics, self._since, self._activity = clock, metrics, now, ""
        last = clock.step == clock.steps
        if self._live is None and (last or now - self._said > QUIET_SECONDS or self._said == self._began):
            self._said = now
            self._terminal.print("  ".join([self._epoch(), self._step(), *self._figures(), f"ETA {self._left()}"]))

    def busy(self, what: str) -> None:
        """Something else than training goes on; its time does not count against the speed."""
        self._activity = what

    def resume(self) -> None:
        self._activity, self._since = "", time.monotonic()

    def _epoch(self) -> str:
        clock = self._clock
        return f"epoch {max(1, math.ceil(clock.step / clock.steps_per_epoch))}/{clock.epochs}"

    def _step(self) -> str:
        return f"step {self._clock.step}/{self._clock.steps}"

    def _left(self) -> str:
        return duration((self._clock.steps - self._clock.step) / self._rate) if self._rate else "-"

    def _figures(self) -> list[str]:
        got = self._metrics
        shown = []
        if "loss" in got:
            shown.append(f"loss {got['loss']:.3f}")
        if "teacher_entropy" in got and self._top is not None:
            shown.append(f"teacher entropy {got['teacher_entropy']:.2f} of {self._top:.2f}")
        if "kl" in got:
            shown.append(f"KL {got['kl']:.2f}")
        if "feature_rank" in got:
            shown.append(f"rank {got['feature_rank']:.1f}")
        if "images_per_s" in got:
            shown.append(f"{got['images_per_s']:.0f} images/s")
        if "wait" in got:
            shown.append(f"{got['wait']:.0%} waiting for data")
        return shown

    def _draw(self) -> RenderableType:
        top = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            top.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=self._clock.steps, completed=self._clock.step)
        share = self._clock.step / max(1, self._clock.steps)
        times = f"{share:4.0%}  {duration(time.monotonic() - self._began)}, {self._left()} left"
        top.add_row(Text(self._epoch(), style="bold"), bar, times)
        below = Text("  ".join([self._step(), *self._figures()]), style="default", overflow="ellipsis", no_wrap=True)
        if self._activity:
            below.append(f"  {escape(self._activity)} …", style="dim")
        return Group(top, below)
