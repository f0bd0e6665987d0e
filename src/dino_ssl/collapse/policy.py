"""The reaction of a training session to a collapse: warn, stop, or roll back.

Warn: report each finding once. Stop: a fatal finding in `LINES` consecutive lines ends the training, whose state is
saved. Roll back: resume from the last healthy checkpoint with relaxed settings, at most `MAX_ROLLBACKS` times.
"""

import os
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_ssl import checkpoint, distributed
from dino_ssl.collapse.checks import (
    MAX_CENTER_MOMENTUM,
    METHOD_CHECKS,
    Finding,
    Setup,
    check_config,
    run_checks,
)
from dino_ssl.collapse.monitor import LINES, Monitor, divergence
from dino_ssl.config import differences, edit, format_value
from dino_ssl.events import Ended, Event, Logged, Started
from dino_ssl.files import append_jsonl, atomic_write
from dino_ssl.metrics import read_metrics
from dino_ssl.models.weights import load_strict
from dino_ssl.run import Run
from dino_ssl.state import export_backbone

HEALTHY_LINES = 2 * LINES
"""Healthy lines after a checkpoint until it counts as healthy: a collapse begins before it is detected."""
MAX_ROLLBACKS = 3
HEALTH = "health.jsonl"
"""Findings and decisions of a run, one per line: step, epoch, name, message, time."""


@dataclass(frozen=True)
class Decision:
    """The outcome of an attempt that a collapse ended."""

    finding: Finding
    message: str = ""
    """Description of the rollback, for the user."""
    back_to: int | None = None
    """Step of the healthy checkpoint that was restored as checkpoints/last.pt."""
    run: Run | None = None
    """The Run to resume with; None if training ends."""


class CollapsePolicy:
    """Monitors a run and decides; call it on all ranks. Findings are returned on rank 0 only."""

    def __init__(self, run: Run, *, is_main: bool) -> None:
        self.run, self.is_main = run, is_main
        self.folder = Path(run.out)
        self.rollbacks = 0
        self._reported: set[str] = set()
        self._last = self.folder / "checkpoints/last.pt"
        self._pending, self._healthy = (self._last.with_name(f"{name}.pt") for name in ("pending", "healthy"))

    def start(self, started: Started) -> list[Finding]:
        """Begin an attempt: return the findings about its settings, and replay the metrics of earlier sessions."""
        clock = started.clock
        self.monitor = Monitor(self.run.method.num_prototypes, self.run, clock.steps_per_epoch)
        self.step, self.fatal = clock.step, None
        self._fatal_lines, self._lines, self._pending_since = 0, 0, None
        if not self.is_main:
            return []
        for row in read_metrics(self.folder) if clock.step else []:
            if row["step"] <= clock.step:
                self.monitor.update(row)
        if not clock.step:
            for path in (self.folder / HEALTH, self._healthy):
                path.unlink(missing_ok=True)
        self._pending.unlink(missing_ok=True)
        self._seen = _modified(self._last)
        if self.rollbacks:
            return []
        findings = check_config(self.run, clock.steps_per_epoch, len(started.train_set))
        return self._new(findings, step=clock.step, epoch=clock.step / clock.steps_per_epoch)

    def update(self, event: Logged) -> tuple[list[Finding], bool]:
        """Return the new findings after a line of metrics, and True if training must end (equal on all ranks)."""
        self.step = event.clock.step
        fatal, new = None, []
        if self.is_main:
            findings = self.monitor.update({"step": self.step, **event.metrics})
            new = self._new(findings, step=self.step, epoch=self.step / event.clock.steps_per_epoch)
            fatal = next((finding for finding in findings if finding.fatal), None)
            if self.run.on_collapse == "rollback" and not self.monitor.in_grace_period(self.step):
                self._track_checkpoint(healthy=fatal is None)
            self._fatal_lines = 0 if fatal is None else self._fatal_lines + 1
        if self.run.on_collapse == "warn":
            return new, False
        self.fatal = distributed.run_on_rank0(lambda: fatal if self._fatal_lines >= LINES else None)
        return new, self.fatal is not None

    def on_divergence(self, message: str) -> None:
        """Record that a loss that is not finite ended the attempt."""
        self.fatal = divergence(message, self.run)

    def decide(self, ended: Ended | None) -> Decision | None:
        """Return the decision after an attempt; None if no collapse ended it.

        ended: the last event of the attempt; None after an error.
        """
        if self.fatal is None:
            return None
        finding = self.fatal
        if self.run.on_collapse != "rollback":
            return Decision(finding)
        decision = distributed.run_on_rank0(lambda: self._roll_back(finding))
        if decision.run is not None:
            self.run, self.rollbacks = decision.run, self.rollbacks + 1
            self._reported.clear()
        elif decision.back_to is not None and ended is not None and self.is_main:
            load_strict(ended.method, checkpoint.load(self._last)["method"], str(self._last))
            export_backbone(self.run, ended.method.backbone, self.folder)
        return decision

    def _roll_back(self, finding: Finding) -> Decision:
        """Restore the last healthy checkpoint."""
        decision = Decision(finding, "There is no healthy checkpoint to resume from: training ends.")
        if self._healthy.is_file():
            atomic_write(self._last, lambda part: shutil.copyfile(self._healthy, part))
            back_to = checkpoint.load(self._last)["step"]
            run = relax(self.run, finding) if self.rollbacks < MAX_ROLLBACKS else None
            if run is not None:
                changes = (
                    f"`{name}` {format_value(new)} (was {format_value(old)})"
                    for name, old, new in differences(self.run, run)
                )
                then = f"training resumes with {', '.join(changes)}"
            elif self.rollbacks < MAX_ROLLBACKS:
                then = "training ends, since no change of these settings helps"
            else:
                then = f"training ends after {MAX_ROLLBACKS} rollbacks"
            message = f"Rollback from step {self.step} to step {back_to}, the last healthy checkpoint; {then}."
            decision = Decision(finding, message, back_to, run)
        self._write(step=self.step, name=finding.name, message=decision.message)
        return decision

    def _track_checkpoint(self, *, healthy: bool) -> None:
        """Keep a saved checkpoint as the healthy one after `HEALTHY_LINES` healthy lines."""
        self._lines += 1
        if not healthy:
            self._pending.unlink(missing_ok=True)
            self._pending_since = None
        elif self._pending_since is None:
            modified = _modified(self._last)
            if modified != self._seen:
                _link(self._last, self._pending)
                self._seen, self._pending_since = modified, self._lines
        elif self._lines - self._pending_since >= HEALTHY_LINES:
            os.replace(self._pending, self._healthy)
            self._pending_since = None

    def _new(self, findings: list[Finding], *, step: int, epoch: float) -> list[Finding]:
        """Return the findings that were not reported before, and write them for the report."""
        new = [finding for finding in findings if finding.name not in self._reported]
        for finding in new:
            self._reported.add(finding.name)
            self._write(step=step, epoch=epoch, name=finding.name, message=f"{finding.message} {finding.suggestion}")
        return new

    def _write(self, **row: Any) -> None:
        append_jsonl(self.folder / HEALTH, row | {"time": time.time()})


def relax(run: Run, finding: Finding) -> Run | None:
    """Return the run with settings that collapse less easily; None if a required part of the method is missing.

    The learning rate is halved. After a uniform collapse the teacher temperature is lowered by a quarter, after a
    divergence gradients are clipped at 1 or less, a teacher that is not updated gets momentum 0.99, and a slow center
    0.9.
    """
    if any(cause.fatal for cause in run_checks(METHOD_CHECKS, Setup(run))):
        return None
    run = edit(run, optim=dict(lr=run.optim.lr / 2, min_lr=min(run.optim.min_lr, run.optim.lr / 2)))
    method: Any = run.method
    changes: dict[str, float] = {}
    if finding.name == "Divergence":
        run = edit(run, optim=dict(clip_grad=min(run.optim.clip_grad or 1.0, 1.0)))
    if finding.name == "Teacher not updated" and hasattr(method, "momentum"):
        changes["momentum"] = 0.99
    if finding.name == "Uniform collapse":
        names = ("teacher_temp", "warmup_teacher_temp")
        changes |= {name: 0.75 * getattr(method, name) for name in names if hasattr(method, name)}
    if getattr(method, "center_momentum", 0) > MAX_CENTER_MOMENTUM:
        changes["center_momentum"] = 0.9
    return edit(run, method=changes)


def monitored(events: Generator[Event, bool | None], policy: CollapsePolicy) -> Iterator[Event | Finding]:
    """Yield the events of training, and new findings after the line that shows them; end training if needed."""
    stop = None
    with suppress(StopIteration):
        while True:
            event = events.send(stop)
            yield event
            stop = None
            if isinstance(event, Logged):
                findings, stop = policy.update(event)
                yield from findings


def _modified(path: Path) -> int:
    """Return the modification time in ns; 0 if there is no file."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _link(source: Path, target: Path) -> None:
    """Hard-link the file; copy it if the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        atomic_write(target, lambda part: shutil.copyfile(source, part))
