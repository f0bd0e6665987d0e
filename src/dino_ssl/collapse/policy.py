"""The reaction of a training session to a collapse: warn, stop, or roll back.

Warn: report each finding once. Stop: a fatal finding in `LINES` consecutive lines ends the training, whose state is
saved. Roll back: as stop, and the last healthy checkpoint is restored.
"""

import os
import shutil
import time
from pathlib import Path

from dino_ssl import checkpoint, distributed
from dino_ssl.collapse.checks import Finding, check_config
from dino_ssl.collapse.monitor import LINES, Monitor
from dino_ssl.events import Logged, Started
from dino_ssl.files import append_jsonl, atomic_write, link_or_copy
from dino_ssl.metrics import read_metrics
from dino_ssl.models.pretrained import EXPORTS
from dino_ssl.models.weights import backbone_weights, save_backbone
from dino_ssl.run import Run
from dino_ssl.state import is_good_loss

HEALTHY_LINES = 2 * LINES
"""Healthy lines after a checkpoint until it counts as healthy: a collapse begins before it is detected."""
HEALTH = "health.jsonl"
"""Findings and rollbacks of a run, one per line: step, name, message, time."""


class CollapsePolicy:
    """Monitors a run and decides when it ends; call it on all ranks. Findings are returned on rank 0 only."""

    def __init__(self, run: Run, started: Started, *, is_main: bool) -> None:
        """Replay the metrics of earlier sessions. started: the first event of training."""
        clock = started.clock
        self.run, self.is_main, self.folder = run, is_main, Path(run.out)
        self.monitor = Monitor(run.method.num_prototypes, run, clock.steps_per_epoch)
        self.step, self.fatal = clock.step, None
        self._reported: set[str] = set()
        self._fatal_lines, self._healthy_lines = 0, 0
        self._last = self.folder / "checkpoints/last.pt"
        self._pending, self._healthy = (self._last.with_name(f"{name}.pt") for name in ("pending", "healthy"))
        self._seen, self.config_findings = _modified(self._last), []
        if not is_main:
            return
        for row in read_metrics(self.folder) if clock.step else []:
            if row["step"] <= clock.step:
                self.monitor.update(row)
        if not clock.step:
            for path in (self.folder / HEALTH, self._healthy):
                path.unlink(missing_ok=True)
        self._pending.unlink(missing_ok=True)
        self.config_findings = self._new(check_config(run, clock.steps_per_epoch, len(started.train_set)))

    def update(self, event: Logged) -> tuple[list[Finding], bool]:
        """Return the new findings after a line of metrics, and True if training must end (equal on all ranks)."""
        self.step = event.clock.step
        fatal, new = None, []
        if self.is_main:
            findings = self.monitor.update({"step": self.step, **event.metrics})
            new = self._new(findings)
            fatal = next((finding for finding in findings if finding.fatal), None)
            if self.run.on_collapse == "rollback" and not self.monitor.in_grace_period(self.step):
                is_good = is_good_loss(event.metrics.get("loss"), self.run.method.num_prototypes)
                self._track_checkpoint(healthy=fatal is None and is_good)
            self._fatal_lines = 0 if fatal is None else self._fatal_lines + 1
        if self.run.on_collapse == "warn":
            return new, False
        self.fatal = distributed.run_on_rank0(lambda: fatal if self._fatal_lines >= LINES else None)
        return new, self.fatal is not None

    def roll_back(self, *, diverged: bool = False) -> tuple[str, int | None]:
        """Restore the last healthy checkpoint and export its backbone, on rank 0; return a message and its step.

        diverged: without a healthy one, `last.pt` is used, from which training computed a good loss.
        """
        message, step, kind = "There is no healthy checkpoint to roll back to.", None, "last healthy"
        if self._healthy.is_file():
            atomic_write(self._last, lambda part: shutil.copyfile(self._healthy, part))
        else:
            kind = "last good"
        if self._healthy.is_file() or (diverged and self._last.is_file()):
            saved = checkpoint.load(self._last)
            step, weights = saved["step"], backbone_weights(saved, self._last, "teacher")
            path = self.folder / EXPORTS["last"]
            save_backbone(self.run.backbone, weights, path, self.run.preprocessing)
            message = f"Rollback from step {self.step} to step {step}, the {kind} checkpoint."
        self._write("Rollback", message)
        return message, step

    def _track_checkpoint(self, *, healthy: bool) -> None:
        """Keep a saved checkpoint as the healthy one after `HEALTHY_LINES` healthy lines."""
        if not healthy:
            self._pending.unlink(missing_ok=True)
        elif self._pending.exists():
            self._healthy_lines += 1
            if self._healthy_lines >= HEALTHY_LINES:
                os.replace(self._pending, self._healthy)
        elif (modified := _modified(self._last)) != self._seen:
            self._seen, self._healthy_lines = modified, 0
            link_or_copy(self._last, self._pending)

    def _new(self, findings: list[Finding]) -> list[Finding]:
        """Return the findings that were not reported before, and write them for the report."""
        new = [finding for finding in findings if finding.name not in self._reported]
        for finding in new:
            self._reported.add(finding.name)
            self._write(finding.name, f"{finding.message} {finding.suggestion}")
        return new

    def _write(self, name: str, message: str) -> None:
        row = {"step": self.step, "name": name, "message": message, "time": time.time()}
        append_jsonl(self.folder / HEALTH, row)


def _modified(path: Path) -> int:
    """Return the modification time in ns; 0 if there is no file."""
    return path.stat().st_mtime_ns if path.exists() else 0
