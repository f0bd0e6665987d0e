"""Progress of training: a live bar with the main metrics on a terminal, plain lines otherwise."""

import math
import time
from collections.abc import Iterable

from rich.console import RenderableType
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from dino_ssl.formatting import duration
from dino_ssl.schedules import Clock
from dino_ssl.terminal import QUIET_SECONDS, LiveBars, Terminal, logger

COLUMNS = (
    TextColumn("[bold]{task.description}"),
    BarColumn(bar_width=None),
    TaskProgressColumn(),
    TimeElapsedColumn(),
    TextColumn("{task.fields[left]} left"),
)
METRICS = {
    "loss": "loss {:.3f}",
    "teacher_entropy": "teacher entropy {:.2f} of {ln_k:.2f}",
    "images_per_s": "{:.0f} images/s",
    "kl": "KL {:.2f}",
    "feature_rank": "rank {:.1f}",
    "wait": "{:.0%} waiting for data",
}
"""Metrics that are shown, and how. A narrow terminal shows the first ones."""


class TrainingProgress(LiveBars):
    """A context manager that shows epoch, remaining time, step and the main metrics."""

    def __init__(self, terminal: Terminal, clock: Clock, prototypes: int | None) -> None:
        """prototypes: K, for the maximum of the entropy."""
        self._figures, self._activity, self._score = [], "", ""  # first: the next line draws
        super().__init__(terminal, *COLUMNS, expand=True, refresh_per_second=4)
        self._first_step = clock.step
        self._ln_k = math.log(prototypes or math.nan)
        self._started, self._printed = time.monotonic(), -math.inf
        self._task = self.add_task("starting", total=clock.steps, completed=clock.step, left="-")

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, and below it as many metrics as fit into a line."""
        yield from super().get_renderables()
        figures, activity = self._figures, f"  {self._activity} …" if self._activity else ""
        while len(figures) > 1 and len("  ".join(figures) + activity) > self.console.width:
            figures = figures[:-1]
        yield Text("  ".join(figures), overflow="ellipsis", no_wrap=True).append(activity, style="dim")

    def show(self, clock: Clock, metrics: dict[str, float]) -> None:
        """Show a line of metrics; the remaining time includes evaluations."""
        now = time.monotonic()
        left = duration((now - self._started) / (clock.step - self._first_step) * (clock.steps - clock.step))
        epoch = f"epoch {max(1, math.ceil(clock.step / clock.steps_per_epoch))}/{clock.epochs}"
        figures = (text.format(metrics[name], ln_k=self._ln_k) for name, text in METRICS.items() if name in metrics)
        score = [self._score] if self._score else []
        self._figures, self._activity = [f"step {clock.step}/{clock.steps}", *score, *figures], ""
        self.update(self._task, description=epoch, completed=clock.step, left=left)
        if self.disable and (clock.step == clock.steps or now - self._printed > QUIET_SECONDS):
            self._printed = now
            logger.info("  ".join([epoch, f"ETA {left}", *self._figures]))

    def show_score(self, score: str) -> None:
        """Show the online evaluation with the next lines of metrics."""
        self._score = score

    def show_activity(self, activity: str) -> None:
        """Show an activity other than training, until the next line of metrics."""
        self._activity = activity
        self.refresh()
