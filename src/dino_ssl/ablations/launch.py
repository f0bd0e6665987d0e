"""Train the runs of a study: several at a time, each in its own process, or one after another under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dino_ssl.ablations.results import FAILED, StudyRun
from dino_ssl.ablations.runner import LOCKED, RunJob, complete
from dino_ssl.config import to_dict
from dino_ssl.errors import UserError
from dino_ssl.files import write_json
from dino_ssl.metrics import METRICS
from dino_ssl.runtime import machine, start
from dino_ssl.signals import StopSignal
from dino_ssl.terminal import Terminal

POLL_SECONDS = 0.5

Pending = Sequence[tuple[StudyRun, RunJob]]


def run_parallel(pending: Pending, processes: int, terminal: Terminal) -> tuple[int | None, int]:
    """Run each job in its own process; return the signal that stopped them, if any, and the number of failures.

    A signal is forwarded, so that every process saves its state and exits; after a second one they exit immediately.
    """
    waiting, num_failed, forwarded = list(pending), 0, False
    running: dict[subprocess.Popen[bytes], tuple[StudyRun, int]] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn()
    bars = Progress(*columns, console=terminal.console, transient=True, disable=not terminal.is_tty)
    with StopSignal() as stop, bars:
        try:
            while running or (waiting and stop.number is None):
                while waiting and stop.number is None and len(running) < processes:
                    run, job = waiting.pop(0)
                    bar = bars.add_task(escape(run.label), total=job.run.optim.epochs, status="starting")
                    running[_start(run, job, processes)] = run, bar
                    if not terminal.is_tty:
                        terminal.print(f"{run.label}: starting; messages in {run.folder / 'log.txt'}")
                time.sleep(POLL_SECONDS)
                if stop.number is not None and not forwarded:
                    forwarded = True
                    _terminate(running)
                for process, (run, bar) in list(running.items()):
                    if (code := process.poll()) is None:
                        epoch, loss = _progress(run.folder)
                        bars.update(bar, completed=epoch, status=loss)
                        continue
                    del running[process]
                    bars.remove_task(bar)
                    state = final_state(run, code, stopping=stop.number is not None)
                    num_failed += state == "failed"
                    error = f": {run.error}" if state == "failed" else ""
                    done = len(pending) - len(waiting) - len(running)
                    style = {"done": "green", "failed": "red"}.get(state, "yellow")
                    terminal.print(f"{run.label}: {state}{error}  ({done} of {len(pending)})", style=style)
        finally:
            _terminate(running)
    return stop.number, num_failed


def _start(run: StudyRun, job: RunJob, processes: int) -> subprocess.Popen[bytes]:
    path = write_json(run.folder / "job.json", to_dict(job))
    with (run.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dino_ssl.ablations.runner", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads_per_run(processes))},
            start_new_session=True,  # Ctrl-C reaches only this process, which forwards it once
        )


def _terminate(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()


def _progress(folder: Path) -> tuple[float, str]:
    """Return the epoch and the loss of the last complete line of metrics.jsonl."""
    with suppress(OSError, ValueError, LookupError), (folder / METRICS).open() as file:
        row = json.loads(deque(file, maxlen=2)[0])
        return row["epoch"], f"loss {row['loss']:.2f}" if row.get("loss") else ""
    return 0, ""


def final_state(run: StudyRun, code: int, stopping: bool) -> str:
    """Return the state of a run whose process has ended; if it could not write its error, write failed.json."""
    if code == 0:
        return "done"
    if code == LOCKED:
        return "being trained by another process"
    if stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "stopped"
    if not run.error:
        reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            reason = "was killed, probably because memory was full"
        write_json(run.folder / FAILED, {"error": f"the process {reason}; its messages are in {run.folder}/log.txt"})
    return "failed"


def run_serial(pending: Pending, terminal: Terminal) -> tuple[int | None, int]:
    """Run one job after another on all ranks (torchrun); return the signal, if any, and the number of failures."""
    num_failed = 0
    for run, job in pending:
        terminal.print(run.label, style="bold")
        try:
            with start(job.run.precision) as rt:
                stopped = complete(job, rt, terminal)
            if stopped is not None:
                return stopped, num_failed
        except UserError as error:
            num_failed += 1
            terminal.print(f"failed: {error}", style="red")
    return None, num_failed


def threads_per_run(processes: int) -> int:
    """Return the threads of each of `processes` simultaneous runs; OMP_NUM_THREADS overrides it."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else max(1, machine().cores // processes)
