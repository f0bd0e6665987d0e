"""Metrics on disk: metrics.jsonl, one JSON object per line, and the same values for TensorBoard."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from dino_ssl.files import atomic_write, read_lines, write_errors

METRICS = "metrics.jsonl"


class Log:
    """Appends to a run's metrics. On resume, lines after the resumed step are removed first."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS
        if self._path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= step and step > 0]
            atomic_write(self._path, lambda temporary: temporary.write_text("".join(map(_line, kept))))
        self._file = self._path.open("a", buffering=1)
        self._tensorboard = _TensorBoard(folder / "tensorboard", step)

    def write(self, step: int, values: dict[str, Any], group: str = "") -> None:
        """Write one line. group: prefix of the tags in TensorBoard. Raises UserError if the disk is full."""
        with write_errors(self._path):
            self._file.write(_line({"step": step, **values}))
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("epoch", "time"):
                    self._tensorboard.add(f"{group}/{name}".lstrip("/"), value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the files; an error of a full disk is ignored, since every line was flushed before."""
        for file in (self._file, self._tensorboard):
            with contextlib.suppress(OSError):
                file.close()


class _TensorBoard:
    """TensorBoard's event file, written in this thread.

    tensorboardX's own writer uses a thread, which dies if the disk is full; the next write then blocks forever.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2 as proto
        from tensorboardX.summary import scalar

        self._proto: Any = proto  # its names are created at import time
        self._scalar = scalar
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
            if step:  # discards what an interrupted run wrote after this step
                self._write(step + 1, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        self._write(step, summary=self._scalar(name, value))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **content))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return every complete line of a run's metrics."""
    return [line for line in read_lines(folder / METRICS) if "step" in line]


def _line(values: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"
