"""Terminal output: messages, tables, progress bars; plain lines if the output is a file or a pipe.

In a Jupyter notebook, the bars of a terminal are one output that is updated in place; messages are plain lines.

The library logs its messages to `logger`, on rank 0. They are printed inside `Terminal.show_log`.

Results go to standard output. With JSON output, standard output holds one JSON object and nothing else; messages go to
standard error. Only rank 0 prints.
"""

import importlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from dino_ssl.formatting import for_terminal
from dino_ssl.progress import Progress

logger = logging.getLogger("dino_ssl")
STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}
"""Style of a logged message by level."""
QUIET_SECONDS = 10
"""Seconds between two plain lines of one progress."""
REFRESH_SECONDS = 0.25
"""Seconds between two updates of a bar in a notebook."""
EMPTY = {"text/plain": ""}
"""The output of a notebook without bars."""


def is_rank0() -> bool:
    """Return True if this process prints. Works before a process group exists."""
    return os.environ.get("RANK", "0") == "0"


logger.addFilter(lambda record: is_rank0())


@dataclass
class Terminal:
    """The output of a command: messages, tables and progress."""

    json: bool = False
    quiet: bool = False
    rewrite: Callable[[str], str] = lambda text: text
    """Applied to every message; the command line writes field names as flags."""
    console: Console = field(init=False)
    notebook: Any = field(init=False, default=None)
    """IPython's handle of the output that shows the bars; None outside of a notebook."""

    def __post_init__(self) -> None:
        quiet, in_notebook = self.quiet or not is_rank0(), Console().is_jupyter
        plain = False if in_notebook else None  # rich would make each message an output of its own
        out = Console(stderr=self.json, quiet=quiet, highlight=False, force_jupyter=plain, force_terminal=plain)
        if in_notebook and not quiet:
            self.notebook = importlib.import_module("IPython.display").display(EMPTY, raw=True, display_id=True)
        if not out.is_terminal and "COLUMNS" not in os.environ:
            out.width = 120  # of a file; rich would take 80
        self.console = out

    @property
    def is_tty(self) -> bool:
        """True if a terminal shows the output, so that bars can be drawn."""
        return self.console.is_terminal and not self.console.quiet

    @property
    def shows_bars(self) -> bool:
        """True in a terminal and in a notebook."""
        return self.is_tty or self.notebook is not None

    def print(self, text: str = "", style: str | None = None) -> None:
        """Print a message literally; brackets are not markup."""
        self.console.print(_plain_text(self.rewrite(text)), style=style, soft_wrap=not self.is_tty)

    @contextmanager
    def show_log(self) -> Iterator[None]:
        """Print what the library logs inside; `extra={"style": ...}` of a message is its style."""
        handler, level, propagate = _LogHandler(self), logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a title and a table; long cells wrap, except in the first column."""
        self.print(title, style="bold")
        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(columns):
            style = "" if i else "cyan"
            table.add_column(column, no_wrap=i == 0, header_style="dim", style=style, overflow="fold")
        for row in rows:
            table.add_row(*(_plain_text(self.rewrite(cell)) for cell in row))
        self.console.print(table)

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """Show a progress bar, or a line every ten seconds."""
        if not self.shows_bars:
            yield self._progress_lines(label)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with LiveBars(self, *columns) as bar:
            task = bar.add_task(escape(label), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)

    def _progress_lines(self, label: str) -> Progress:
        last = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > QUIET_SECONDS:
                last = time.monotonic()
                self.print(f"{label}: {done} of {total}" if total else f"{label}: {done}")

        return show


class LiveBars(ProgressBar):
    """Progress bars that are drawn only if the terminal shows bars, and removed at the end."""

    def __init__(self, terminal: Terminal, *columns: ProgressColumn, **options: Any) -> None:
        self._notebook, self._drawn = terminal.notebook, -math.inf
        super().__init__(*columns, console=terminal.console, transient=True, disable=not terminal.shows_bars, **options)

    def start(self) -> None:
        """Start to draw; in a notebook, rich would need ipywidgets and a thread."""
        if self._notebook is None:
            super().start()

    def update(self, *args: Any, **options: Any) -> None:
        """Change a task."""
        super().update(*args, **options, refresh=self._notebook is not None)

    def refresh(self) -> None:
        """Draw, in a notebook at most every REFRESH_SECONDS."""
        if self._notebook is None:
            super().refresh()
        elif time.monotonic() - self._drawn > REFRESH_SECONDS:
            self._drawn = time.monotonic()
            self._notebook.update(self)

    def stop(self) -> None:
        """Remove the bars."""
        if self._notebook is None:
            super().stop()
        else:
            self._notebook.update(EMPTY, raw=True)


class _LogHandler(logging.Handler):
    """Prints log messages on a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.print(record.getMessage(), style=getattr(record, "style", STYLES.get(record.levelno)))


def _plain_text(text: str) -> str:
    """Escape markup and control characters, and replace the undecodable bytes of file names."""
    return escape(for_terminal(text))


@contextmanager
def command_output(
    as_json: bool, rewrite: Callable[[str], str] = lambda text: text
) -> Iterator[tuple[Terminal, Callable[[dict[str, Any]], None]]]:
    """Yield the terminal of a command and the function that prints its result.

    With as_json, everything else that writes to standard output, libraries included, is redirected to standard error.
    """
    out, terminal = sys.stdout, Terminal(json=as_json, rewrite=rewrite)

    def print_result(result: dict[str, Any]) -> None:
        if as_json and is_rank0():
            print(json.dumps(result, ensure_ascii=False), file=out, flush=True)

    with redirect_stdout(sys.stderr if as_json else out), terminal.show_log():
        yield terminal, print_result
