"""Curves on disk: metrics.jsonl, one JSON object a line, and the same for TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

from dino.files import read_lines, write_whole

METRICS = "metrics.jsonl"


class Log:
    """Appends to a run's curves. On resume, what lies beyond the resumed step is taken away first."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._path = folder / METRICS
        if self._path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= step and step > 0]
            write_whole(self._path, lambda aside: aside.write_text("".join(map(_line, kept))))
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, Any], under: str = "") -> None:
        """under: what TensorBoard calls the figures together."""
        self._file.write(_line({"step": step, **values}))
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("epoch", "time"):
                self._board.add_scalar(f"{under}/{name}".lstrip("/"), value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics; a line torn by a kill is left out."""
    return [line for line in read_lines(folder / METRICS) if "step" in line]


def _line(values: dict[str, Any]) -> str:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain) + "\n"
