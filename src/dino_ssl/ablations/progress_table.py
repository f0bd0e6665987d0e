"""Progress of several runs at a time: a live table on a terminal, plain lines otherwise."""

import time
from collections.abc import Sequence
from typing import Any

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dino_ssl.ablations.job_pool import FINAL_STATES, Task
from dino_ssl.formatting import duration
from dino_ssl.terminal import Terminal

PLAIN_SECONDS = 60.0
"""Seconds between two plain lines about one run."""
STYLES = {"done": "green", "failed": "red", "stopped": "yellow", "locked": "yellow", "waiting": "dim"}
LABELS = {"locked": "being trained by another process", "evaluated": "training"}


class ProgressTable:
    """Context that shows tasks: `with ProgressTable(terminal, tasks) as table`, then `table.on_change(task)`."""

    def __init__(self, terminal: Terminal, tasks: Sequence[Task]) -> None:
        self.terminal, self.tasks = terminal, tasks
        self.printed_at: dict[str, float] = {}
        self.live = None
        if terminal.is_tty:
            self.live = Live(get_renderable=self._draw, console=terminal.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "ProgressTable":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def on_change(self, task: Task) -> None:
        """Print a task that has reached a final state; without a terminal also one that starts."""
        if task.state in FINAL_STATES:
            ended = sum(task.state in ("done", "failed") for task in self.tasks)
            error = f": {task.status['error']}" if task.state == "failed" else ""
            text = f"{task.name}: {LABELS.get(task.state, task.state)}{error}  ({ended} of {len(self.tasks)})"
            self.terminal.print(text, style=STYLES[task.state])
        elif task.state == "starting" and self.live is None:
            self.terminal.print(f"{task.name}: starting; messages in {task.log}")

    def on_tick(self) -> None:
        """Without a terminal, print a line about each training task once a minute."""
        if self.live is not None:
            return
        for task in self.tasks:
            printed_at = self.printed_at.setdefault(task.name, time.monotonic())
            if task.state == "training" and time.monotonic() - printed_at > PLAIN_SECONDS:
                self.printed_at[task.name] = time.monotonic()
                self.terminal.print(f"{task.name}: {_status(task)}")

    def _draw(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(width=24)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for task in self.tasks:
            fraction = task.fraction
            bar = "" if fraction is None else ProgressBar(total=1, completed=fraction, width=24)
            grid.add_row(Text(task.name), bar, Text(_status(task), style=STYLES.get(task.state, "")))
        return grid


def _status(task: Task) -> str:
    """Return `step 30/100  loss 5.31  20-NN 41.2 %  3 min left`, or the state before training."""
    status, label = task.status, LABELS.get(task.state, task.state)
    if task.state == "measuring":
        return f"measuring: {status['metric']}"
    if task.state not in ("training", "evaluated"):
        return label
    parts = [f"step {status['step']}/{status['steps']}"] if "step" in status else [label]
    if "loss" in status:
        parts.append(f"loss {status['loss']:.2f}")
    parts += [f"{name} {value:.1f} %" for name, value in list(status.get("values", {}).items())[:1]]
    if (seconds := task.seconds_left) is not None:
        parts.append(f"{duration(seconds)} left")
    return "  ".join(parts)
