"""Several commands at once, each in a process of its own that says how far it is in lines of JSON.

A signal is passed on to all of them, so that each saves and leaves; a second one makes them leave at once.
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

ENDS = {"done", "failed", "stopped", "elsewhere"}


@dataclass
class Task:
    """One command: what it is called, what it writes besides its lines, and what it said last."""

    name: str
    command: Sequence[str]
    log: Path
    state: str = "waiting"
    told: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    began_at: int | None = None
    """The step at which this process began to train."""

    def on_message(self, said: dict[str, Any]) -> None:
        self.state = str(said.pop("state"))
        self.told |= said
        if self.began_at is None and "step" in said:
            self.began, self.began_at = time.monotonic(), int(said["step"])

    @property
    def share(self) -> float | None:
        return self.told["step"] / self.told["steps"] if "step" in self.told else None

    @property
    def left(self) -> float | None:
        """Seconds of training that are left, at the speed so far."""
        if self.began_at is None or self.told["step"] <= self.began_at:
            return None
        speed = (self.told["step"] - self.began_at) / (time.monotonic() - self.began)
        return (self.told["steps"] - self.told["step"]) / speed


class JobPool:
    """Runs tasks, at most `processes` at a time, until all have ended or somebody asks to stop."""

    def __init__(self, tasks: Sequence[Task], processes: int, environment: dict[str, str]) -> None:
        self.tasks, self.processes, self.environment = list(tasks), processes, environment
        self.running: dict[subprocess.Popen[bytes], Task] = {}
        self.signal: int | None = None
        self._selector = selectors.DefaultSelector()
        self._rest: dict[int, bytes] = {}

    def work(self, changed: Callable[[Task], None], tick: Callable[[], None]) -> int | None:
        """Calls `changed` with a task whose state is another, and `tick` twice a second. Gives the signal, if one
        came."""
        waiting = list(self.tasks)
        with self._signals():
            while self.running or (waiting and self.signal is None):
                while waiting and self.signal is None and len(self.running) < self.processes:
                    task = waiting.pop(0)
                    self._start(task)
                    changed(task)
                for key, _ in self._selector.select(timeout=0.5):
                    self._read(key.fileobj, key.data, changed)  # pyright: ignore[reportArgumentType]
                tick()
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
                start_new_session=True,  # a Ctrl-C at the terminal reaches this process alone, which passes it on once
            )
        self.running[process] = task
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._rest[process.stdout.fileno()] = b""
        self._selector.register(process.stdout, selectors.EVENT_READ, process)

    def _read(self, stream: IO[bytes], process: subprocess.Popen[bytes], changed: Callable[[Task], None]) -> None:
        task = self.running[process]
        try:
            data = os.read(stream.fileno(), 65536)
        except BlockingIOError:
            return
        *lines, rest = (self._rest[stream.fileno()] + data).split(b"\n")
        self._rest[stream.fileno()] = rest
        before = task.state
        for text in lines:
            try:
                task.on_message(json.loads(text))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # of some library that writes to standard output
        if not data:
            self._selector.unregister(stream)
            stream.close()
            code = process.wait()
            del self.running[process]
            if task.state not in ENDS and self.signal is not None:
                task.state = "stopped"  # before or after training, where there is nothing to save
            elif task.state not in ENDS:
                task.on_message({"state": "failed", "error": _ended(code, task.log)})
        if task.state != before:
            changed(task)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(number: int, frame: Any) -> None:
            self.signal = number
            for process in self.running:
                process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for process in self.running:  # only where this process failed itself
                process.send_signal(signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)


def _ended(code: int, log: Path) -> str:
    """Why a process may have ended without a word."""
    if code == -signal.SIGKILL:
        return f"the process was killed, as a full memory does it; {log} has its last words"
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"the process ended {how}; {log} has its last words"
