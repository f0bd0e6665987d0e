"""What a session does about a collapse: it says which one, and stops or goes back where the run asks for that.

Warn: each finding is said once. Stop: a grave one that stands for `LINES` lines ends the training, which is saved as it
is. Roll back: training goes on from the last checkpoint after which `MARGIN` lines were healthy, with milder settings
(`advice.relax`); after `ROLLBACKS` times, or where no milder setting helps, it ends there.
"""

import json
import os
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_ssl import checkpoint, distributed
from dino_ssl.api.resolve import flag
from dino_ssl.collapse.checks import Finding, advise, check_config, relax
from dino_ssl.collapse.monitor import LINES, Monitor
from dino_ssl.config import differences, format_value
from dino_ssl.events import Ended, Event, Logged, Started
from dino_ssl.files import atomic_write
from dino_ssl.metrics import read_metrics
from dino_ssl.models.weights import load_strict
from dino_ssl.run import Run
from dino_ssl.schedules import Clock
from dino_ssl.state import export_backbone
from dino_ssl.terminal import Terminal

MARGIN = 2 * LINES
"""Healthy lines after a checkpoint before it counts as one to go back to: a collapse begins before it shows."""
ROLLBACKS = 3
SAID = "health.jsonl"


@dataclass(frozen=True)
class Decision:
    """What ended an attempt, and what comes next."""

    finding: Finding
    step: int
    back_to: int | None = None
    """The step of the healthy checkpoint that lies in checkpoints/last.pt now."""
    run: Run | None = None
    """What to go on with; None where it ends."""


class CollapsePolicy:
    """Watches a run's lines on every rank; writes and speaks on the first one alone."""

    def __init__(self, run: Run, terminal: Terminal, *, is_main: bool) -> None:
        self.run, self.terminal, self.is_main = run, terminal, is_main
        self.folder = Path(run.out)
        self.rollbacks = 0
        self.said: set[str] = set()
        self._last = self.folder / "checkpoints/last.pt"
        self._pending, self._healthy = (self._last.with_name(f"{name}.pt") for name in ("pending", "healthy"))

    def begin(self, started: Started) -> None:
        """An attempt begins: what its settings give reason to fear, and what its curves so far have shown."""
        clock = started.clock
        self.monitor = Monitor(self.run.method.num_prototypes, self.run, clock.steps_per_epoch)
        self.step, self.grave = clock.step, None
        self._standing, self._lines, self._pending_since = 0, 0, None
        if not self.is_main:
            return
        for row in read_metrics(self.folder) if clock.step else []:
            if row["step"] <= clock.step:
                self.monitor.see(row)
        if not clock.step:
            for path in (self.folder / SAID, self._healthy):
                path.unlink(missing_ok=True)
        self._pending.unlink(missing_ok=True)
        self._seen = _stamp(self._last)
        if not self.rollbacks:
            for finding in check_config(self.run, clock.steps_per_epoch, len(started.train_set)):
                self._say(clock, finding)

    def line(self, event: Logged) -> bool:
        """Looks at a line of metrics. Gives whether training is to end, the same on every rank."""
        self.step = event.clock.step
        grave = None
        if self.is_main:
            found = self.monitor.see({"step": self.step, **event.metrics})
            for finding in found:
                self._say(event.clock, finding)
            grave = next((finding for finding in found if finding.grave), None)
            if self.run.on_collapse == "rollback" and self.monitor.judges(self.step):
                self._keep(healthy=grave is None)
            self._standing = 0 if grave is None else self._standing + 1
        if self.run.on_collapse == "warn":
            return False
        self.grave = distributed.run_on_rank0(lambda: grave if self._standing >= LINES else None)
        return self.grave is not None

    def diverged(self, message: str) -> None:
        """The loss stopped being a number, which ended the training."""
        self.grave = Finding("Divergence", message, advise("Divergence", self.run))

    def verdict(self, ended: Ended | None) -> Decision | None:
        """What comes after an attempt; None where no collapse ended it. ended: what it left, where it did."""
        if self.grave is None:
            return None
        finding = self.grave
        if self.run.on_collapse != "rollback":
            return Decision(finding, self.step)
        verdict = distributed.run_on_rank0(lambda: self._go_back(finding))
        if verdict.run is not None:
            self.run, self.rollbacks = verdict.run, self.rollbacks + 1
            self.said.clear()
        elif verdict.back_to is not None and ended is not None and self.is_main:
            load_strict(ended.method, checkpoint.load(self._last)["method"], str(self._last))
            export_backbone(self.run, ended.method.backbone, self.folder)
        return verdict

    def _go_back(self, finding: Finding) -> Decision:
        """Puts the last healthy checkpoint where training goes on from."""
        if not self._healthy.is_file():
            self._tell("There is no healthy checkpoint to go back to: it collapsed before one was saved.", finding)
            return Decision(finding, self.step)
        atomic_write(self._last, lambda aside: shutil.copyfile(self._healthy, aside))
        back_to = checkpoint.load(self._last)["step"]
        run = relax(self.run, finding.name) if self.rollbacks < ROLLBACKS else None
        went = f"Back from step {self.step} to step {back_to}, the last healthy checkpoint"
        if run is None:
            why = "no milder setting helps" if self.rollbacks < ROLLBACKS else f"after {ROLLBACKS} times it ends here"
            self._tell(f"{went}; {why}.", finding)
            return Decision(finding, self.step, back_to)
        changed = [
            f"{flag(name)} {format_value(new)} (was {format_value(old)})"
            for name, old, new in differences(self.run, run)
        ]
        self._tell(f"{went}; it goes on with {', '.join(changed)}.", finding)
        return Decision(finding, self.step, back_to, run)

    def _keep(self, *, healthy: bool) -> None:
        """A checkpoint that training saved becomes the healthy one once `MARGIN` healthy lines have followed."""
        self._lines += 1
        if not healthy:
            self._pending.unlink(missing_ok=True)
            self._pending_since = None
        elif self._pending_since is None:
            stamp = _stamp(self._last)
            if stamp != self._seen:
                _link(self._last, self._pending)
                self._seen, self._pending_since = stamp, self._lines
        elif self._lines - self._pending_since >= MARGIN:
            os.replace(self._pending, self._healthy)
            self._pending_since = None

    def _say(self, clock: Clock, finding: Finding) -> None:
        """Says a finding, once for each name, and keeps it for the report."""
        if finding.name in self.said:
            return
        self.said.add(finding.name)
        self.terminal.print(str(finding), style="bold yellow" if finding.grave else "yellow")
        self._write({"step": clock.step, "epoch": clock.step / clock.steps_per_epoch, "name": finding.name,
                     "said": f"{finding.seen} {finding.turn}"})  # fmt: skip

    def _tell(self, text: str, finding: Finding) -> None:
        self.terminal.print(text, style="bold yellow")
        self._write({"step": self.step, "name": finding.name, "said": text})

    def _write(self, row: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / SAID).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"time": time.time()}, ensure_ascii=False) + "\n")


def guarded(events: Generator[Event, bool | None], guard: CollapsePolicy) -> Iterator[Event]:
    """The events of training, which ends where the guard says so of a line."""
    answer = None
    with suppress(StopIteration):
        while True:
            event = events.send(answer)
            yield event
            answer = guard.line(event) if isinstance(event, Logged) else None


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _link(source: Path, target: Path) -> None:
    """A second name of the file, which costs nothing; a copy where the disk has no such names."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        atomic_write(target, lambda aside: shutil.copyfile(source, aside))
