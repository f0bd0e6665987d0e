"""Curves on disk: metrics.jsonl, one JSON object a line, and the same for TensorBoard."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from dino_ssl.files import atomic_write, read_lines, write_errors

METRICS = "metrics.jsonl"


class Log:
    """Appends to a run's curves. On resume, what lies beyond the resumed step is taken away first."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS
        if self._path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= step and step > 0]
            atomic_write(self._path, lambda aside: aside.write_text("".join(map(_line, kept))))
        self._file = self._path.open("a", buffering=1)
        self._board = _Board(folder / "tensorboard", step)

    def write(self, step: int, values: dict[str, Any], under: str = "") -> None:
        """under: what TensorBoard calls the figures together. Raises UserError where the disk is full."""
        with write_errors(self._path):
            self._file.write(_line({"step": step, **values}))
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("epoch", "time"):
                    self._board.add(f"{under}/{name}".lstrip("/"), value, step)
            self._board.flush()

    def close(self) -> None:
        """What a full disk does not take is lost: every line is on it already, and who closes has more to say."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


class _Board:
    """TensorBoard's file, written in this thread: tensorboardX's own writer has one of its own, which a full disk ends,
    and whoever writes next then waits for it for ever."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2 as proto
        from tensorboardX.summary import scalar

        self._proto: Any = proto  # its names are made when it is imported
        self._scalar = scalar
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
            if step:  # what lies beyond was written by a run that was cut off
                self._write(step + 1, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        self._write(step, summary=self._scalar(name, value))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **what))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics; a line torn by a kill is left out."""
    return [line for line in read_lines(folder / METRICS) if "step" in line]


def _line(values: dict[str, Any]) -> str:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain) + "\n"
