"""What a person sees while several rows run: a line for each on a terminal, plain lines where nobody watches."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dino_ssl.ablations.job_pool import Task
from dino_ssl.formatting import duration
from dino_ssl.terminal import Terminal

PLAIN_SECONDS = 60.0
"""Seconds between two plain lines about one row."""
COLOURS = {"done": "green", "failed": "red", "stopped": "yellow", "elsewhere": "yellow", "waiting": "dim"}
WORDS = {"elsewhere": "another process is at it", "evaluated": "training"}


class ProgressTable:
    """`with ProgressTable(terminal, tasks) as board`: then `board.changed(task)` and `board.tick()`."""

    def __init__(self, terminal: Terminal, tasks: Sequence[Task]) -> None:
        self.terminal, self.tasks = terminal, tasks
        self.said: dict[str, float] = {}
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

    def changed(self, task: Task) -> None:
        """A task is in another state. What ended is said for good."""
        if task.state in ("done", "failed", "stopped", "elsewhere"):
            place = Counter(one.state in ("done", "failed") for one in self.tasks)[True]
            end = f": {task.told['error']}" if task.state == "failed" else ""
            word = WORDS.get(task.state, task.state)
            self.terminal.print(f"{task.name}: {word}{end}  ({place} of {len(self.tasks)})", style=COLOURS[task.state])
        elif task.state == "starting" and self.live is None:
            self.terminal.print(f"{task.name}: begins; its messages go to {task.log}")

    def tick(self) -> None:
        if self.live is not None:
            return
        for task in self.tasks:
            last = self.said.setdefault(task.name, time.monotonic())
            if task.state == "training" and time.monotonic() - last > PLAIN_SECONDS:
                self.said[task.name] = time.monotonic()
                self.terminal.print(f"{task.name}: {_words(task)}")

    def _draw(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(width=24)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for task in self.tasks:
            bar = ProgressBar(total=1, completed=task.share or 0, width=24) if task.share is not None else Text("")
            grid.add_row(Text(task.name), bar, Text(_words(task), style=COLOURS.get(task.state, "")))
        return grid


def _words(task: Task) -> str:
    told, word = task.told, WORDS.get(task.state, task.state)
    if task.state == "measuring":
        return f"measuring: {told.get('what', '')}"
    if task.state not in ("training", "evaluated"):
        return word
    parts = [f"step {told['step']}/{told['steps']}"] if "step" in told else [word]
    parts += [f"loss {told['loss']:.2f}"] if "loss" in told else []
    values = told.get("values") or {}
    parts += [f"{name} {value:.1f} %" for name, value in list(values.items())[:1]]
    parts += [f"{duration(task.left)} left"] if task.left is not None else []
    return "  ".join(parts)
