"""Several commands at a time, each in its own process that prints its progress as JSON lines.

A signal is forwarded to all processes, so that each saves its state and exits; after a second
signal they exit immediately.
"""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

FINAL_STATES = {"done", "failed", "stopped", "locked"}


@dataclass
class Task:
    """One command with its log file and its latest reported state."""

    name: str
    command: Sequence[str]
    log: Path
    state: str = "waiting"
    status: dict[str, Any] = field(default_factory=dict)
    """The latest value of every reported field."""
    started: tuple[float, int] | None = None
    """Time and step of the first report of this process with a step."""

    def on_message(self, message: dict[str, Any]) -> None:
        """Update state and status from one JSON line."""
        self.state = str(message.pop("state"))
        self.status |= message
        if self.started is None and "step" in message:
            self.started = (time.monotonic(), int(message["step"]))

    @property
    def fraction(self) -> float | None:
        """Finished fraction of the steps; None before the first report."""
        return self.status["step"] / self.status["steps"] if "step" in self.status else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds at the average speed; None before the second report."""
        if self.started is None or self.status["step"] <= self.started[1]:
            return None
        speed = (self.status["step"] - self.started[1]) / (time.monotonic() - self.started[0])
        return (self.status["steps"] - self.status["step"]) / speed


class JobPool:
    """Runs tasks, at most `processes` at a time, until all have ended or a signal arrives."""

    def __init__(self, tasks: Sequence[Task], processes: int, environment: dict[str, str]) -> None:
        self.tasks, self.processes, self.environment = list(tasks), processes, environment
        self.running: dict[subprocess.Popen[bytes], Task] = {}
        self.signal: int | None = None
        self._selector = selectors.DefaultSelector()
        self._partial: dict[int, bytes] = {}  # the last, unfinished line by file descriptor

    def run(self, on_change: Callable[[Task], None], on_tick: Callable[[], None]) -> int | None:
        """Run all tasks; return the number of the signal that stopped them, or None.

        on_change: called with a task whose state has changed. on_tick: called about twice per second.
        """
        waiting = list(self.tasks)
        with self._forward_signals():
            while self.running or (waiting and self.signal is None):
                while waiting and self.signal is None and len(self.running) < self.processes:
                    task = waiting.pop(0)
                    self._start(task)
                    on_change(task)
                for key, _ in self._selector.select(timeout=0.5):
                    self._read(key.fileobj, key.data, on_change)  # pyright: ignore[reportArgumentType]
                on_tick()
        return self.signal

    def _start(self, task: Task) -> None:
        task.state = "starting"
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            process = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which forwards it once
            )
        self.running[process] = task
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._partial[process.stdout.fileno()] = b""
        self._selector.register(process.stdout, selectors.EVENT_READ, process)

    def _read(self, stream: IO[bytes], process: subprocess.Popen[bytes], on_change: Callable[[Task], None]) -> None:
        task = self.running[process]
        state = task.state
        try:
            data = os.read(stream.fileno(), 65536)
        except BlockingIOError:
            return
        *lines, self._partial[stream.fileno()] = (self._partial[stream.fileno()] + data).split(b"\n")
        for text in lines:
            try:
                task.on_message(json.loads(text))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # output of another library
        if not data:
            self._selector.unregister(stream)
            stream.close()
            self._end(process, task)
        if task.state != state:
            on_change(task)

    def _end(self, process: subprocess.Popen[bytes], task: Task) -> None:
        code = process.wait()
        del self.running[process]
        if task.state in FINAL_STATES:
            return
        if self.signal is not None:
            task.state = "stopped"  # before or after training: there is nothing to save
        else:
            task.on_message({"state": "failed", "error": _exit_message(code, task.log)})

    @contextmanager
    def _forward_signals(self) -> Iterator[None]:
        def forward(number: int, frame: Any) -> None:
            self.signal = number
            self._terminate()

        previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._terminate()  # processes are left only after an exception
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _terminate(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGTERM)


def _exit_message(code: int, log: Path) -> str:
    """Return a message about a process that ended without reporting a final state."""
    if code == -signal.SIGKILL:
        reason = "was killed, probably because memory was full"
    else:
        reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the process {reason}; its last messages are in {log}"
