"""One training session as a person sees it: the plan, the bar, the snapshots, the report.

`dino.train.train` says what happens; everything that is drawn, written for people, or asked lies here.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dino import checkpoint, dist
from dino.analysis.health import diagnose
from dino.analysis.report import write_report
from dino.analysis.snapshots import choose_samples, snapshot, write_neighbours
from dino.config import edit, to_dict
from dino.data.pictures import Pictures
from dino.errors import UserError
from dino.evals.evaluator import extract
from dino.live import Watch
from dino.logs import read_metrics
from dino.models.vit import ViT
from dino.presets.plan import Plan, Reason, plan
from dino.runtime import Machine, Runtime
from dino.schedules import Clock
from dino.terminal import Terminal
from dino.train import Ended, EpochDone, Evaluated, Logged, Run, Started, read_run, train

SNAPSHOTS = 5
"""Checkpoints at which the attention of the sample pictures is kept."""
NEIGHBOUR_PICTURES = 5000
"""Pictures among which the report's nearest neighbours are searched."""
MAY_CHANGE = (
    "data.path",
    "knn.every_epochs",
    "knn.batch_size",
    "knn.k",
    "knn.max_memory",
    "optim.clip",
    "optim.lr",
    "optim.min_lr",
    "precision",
    "workers",
    "log_every",
    "save_minutes",
    "keep_every",
    "out",
)
"""Fields that a resumed run may change: how fast and how safely it trains and what it writes, not what it learns."""
ON_A_CPU = 60.0
"""Minutes that the plan fills on a CPU where nobody says otherwise."""

Change = Callable[[Run], Run]
"""What the person set themselves, applied to any Run."""


@dataclass(frozen=True)
class Outcome:
    """How a session ended."""

    folder: Path
    run: Run
    clock: Clock
    finished: bool
    signal: int | None = None
    """What asked it to stop, where it did not finish."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last ones that were logged."""
    quality: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""
    best: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


# -- what to train ---------------------------------------------------------------------------------------------------


def settle(
    pictures: Pictures,
    here: Machine,
    *,
    preset: Run | None,
    change: Change,
    minutes: float | None = None,
    world: int = 1,
) -> Plan:
    """The plan for these pictures and this machine, with what the person set in it.

    What is set is planned with: the number of epochs and the expected time are those of the run as it will be.
    """
    if preset is not None:
        first = plan(pictures, here, preset=change(preset), minutes=minutes, world=world)
        return _with_changes(first, preset, change)
    first = plan(pictures, here, minutes=minutes, world=world)
    asked = change(first.run)
    if asked == first.run:
        return first
    if asked.optim.epochs != first.run.optim.epochs:
        minutes = None
    elif minutes is None and here.device.type == "cpu":
        minutes = ON_A_CPU
    asked = change(_followed(first.run, asked))
    second = plan(pictures, here, preset=asked, minutes=minutes, world=world)
    known = {reason.name: reason for reason in second.reasons if reason.name != "recipe"}
    reasons = [known.pop(reason.name, reason) for reason in first.reasons]
    return _with_changes(Plan(second.run, [*reasons, *known.values()]), first.run, change)


def _followed(run: Run, asked: Run) -> Run:
    """The planned run where the person changed its length or its crops: what hangs on them follows."""
    epochs, size = asked.optim.epochs, asked.views.global_size
    if epochs != run.optim.epochs:
        warmup = min(run.optim.warmup_epochs, 0.1 * epochs)
        run = edit(run, optim=dict(warmup_epochs=warmup), knn=dict(every_epochs=max(1.0, epochs // 15)))
    if size != run.views.global_size and isinstance(run.backbone, ViT):
        run = edit(run, backbone=dict(image_size=size))
    return run


ROWS = {
    "method.out_dim": "K",
    "optim.batch_size": "batch",
    "optim.lr": "learning rate",
    "optim.epochs": "epochs",
    "workers": "workers",
    "precision": "precision",
}
"""Settings that have a row of their own in the plan."""


def _with_changes(planned: Plan, before: Run, change: Change) -> Plan:
    """The plan with what the person set: in the row of that setting, or in a row of its own below."""
    run = change(planned.run)
    reasons = {reason.name: reason for reason in planned.reasons}
    for name, old, value in differences(before, change(before)):
        if name.split(".")[0] not in ("out", "data"):
            row = ROWS.get(name, flag(name))
            reasons[row] = Reason(row, shown(value), f"you set it; the plan had {shown(old)}")
    return Plan(run, list(reasons.values()))


def differences(before: Run, after: Run) -> list[tuple[str, Any, Any]]:
    """(dotted field, old value, new value) of every setting that differs."""
    old, new = flat(to_dict(before)), flat(to_dict(after))
    return [(name, old.get(name), new.get(name)) for name in [*old, *(n for n in new if n not in old)]
            if old.get(name) != new.get(name)]  # fmt: skip


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of `to_dict` by their dotted names; a nested value's own name gives its type."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flat(item, prefix if name == "type" and prefix else f"{prefix}.{name}".lstrip("."))
    return found


def flag(name: str) -> str:
    """A dotted field as it is typed: optim.batch_size -> --optim.batch-size."""
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    """A setting as it is typed."""
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else f"{value}"
    )


def show_plan(terminal: Terminal, planned: Plan) -> None:
    rows = [(reason.name, reason.value, reason.why) for reason in planned.reasons]
    terminal.table("The plan", ("", "choice", "why"), rows)
    terminal.say()


# -- a run that is already there -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What lies in an output folder."""

    run: Run
    step: int
    steps: int

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def find(folder: Path) -> Found | None:
    """The run in a folder with the step it is saved at; None where nothing was saved yet.

    Raises UserError where the folder's name is taken by something that is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The run's folder {folder} is a file. Choose another one with --out.")
    if not (folder / "run.json").is_file() or not (folder / "checkpoints/last.pt").is_file():
        return None
    run = read_run(folder)
    described = json.loads((folder / "run.json").read_text())
    per_epoch = max(1, described["data"]["trained_on"] // run.optim.batch_size)
    saved = checkpoint.load(folder / "checkpoints/last.pt")
    return Found(edit(run, out=str(folder)), saved["step"], per_epoch * run.optim.epochs)


def resumed(found: Found, change: Change) -> Run:
    """The found run with what the person set again. Raises UserError where that would change what is learned."""
    folder = found.run.out
    if found.finished:
        raise UserError(
            f"The run in {folder} is finished: {found.step} of {found.steps} steps. Its report is {folder}/report.html.\n"
            "To train anew, choose another folder with --out."
        )
    run = change(found.run)
    refused = [item for item in differences(found.run, run) if item[0] not in MAY_CHANGE]
    if refused:
        listed = "\n".join(
            f"  {flag(name)} is {shown(old)} there, got {shown(new)}" for name, old, new in refused
        )
        raise UserError(
            f"The run in {folder} cannot go on with other settings of what it learns:\n{listed}\n"
            "Leave them away to go on, or start another run with --out."
        )
    return edit(run, out=folder)


# -- training, watched -----------------------------------------------------------------------------------------------


def run_session(
    run: Run, rt: Runtime, pictures: Pictures, terminal: Terminal, *, resume: bool = False
) -> Outcome:
    """Trains to the end, or until somebody asks to stop; writes snapshots and the report on the way."""
    folder = Path(run.out)
    session = _Session(run, rt, pictures, terminal, folder)
    try:
        with heard_signals() as heard:
            ended = session.watch(resume)
            outcome = session.outcome(ended, heard())
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The device ran out of memory: {str(error).splitlines()[0]}\n"
            f"Lower --optim.batch-size (it is {run.optim.batch_size}), --views.local or --method.out-dim."
        ) from error
    if rt.is_main:
        session.finish(outcome)
    dist.barrier()
    return outcome


class _Session:
    def __init__(self, run: Run, rt: Runtime, pictures: Pictures, terminal: Terminal, folder: Path) -> None:
        self.run, self.rt, self.pictures, self.terminal, self.folder = run, rt, pictures, terminal, folder
        self.metrics: dict[str, float] = {}
        self.quality: dict[str, float] = {}
        self.best: dict[str, Any] = {}
        self.baselines: dict[str, dict[str, float]] = {}
        self.samples: list[int] = []
        self.due: list[float] = []
        self.advice: list[str] = []

    def watch(self, resume: bool) -> Ended:
        """Follows the training from its first event to its last."""
        run, terminal = self.run, self.terminal
        events = train(run, self.rt, self.pictures, resume=resume)
        with terminal.progress("preparing"):  # the floors of the accuracy are measured before the first step
            started = next(events)
        assert isinstance(started, Started)
        self.begin(started, resume)
        with Watch(terminal, started.clock, run.method.out_dim) as watch:
            for event in events:
                match event:
                    case Logged(clock, metrics):
                        self.metrics = metrics
                        watch.logged(clock, metrics)
                    case Evaluated():
                        self.evaluated(event)
                        watch.resume()
                    case EpochDone(clock, method):
                        watch.busy("snapshot")
                        self.epoch_done(clock, method)
                        watch.resume()
                    case Ended():
                        return event
        raise AssertionError("training ended without saying so")

    def begin(self, started: Started, resume: bool) -> None:
        clock, self.baselines = started.clock, started.baselines
        self.samples = choose_samples(started.held_back or started.train)
        self.shown = started.held_back or started.train
        self.due = [clock.epochs * i / (SNAPSHOTS - 1) for i in range(SNAPSHOTS)]
        self.due = [epoch for epoch in self.due if epoch > clock.epoch]
        if not self.rt.is_main:
            return
        self.write_skipped({item.name: item.reason for item in self.pictures.skipped})
        if clock.step == 0:
            if (self.folder / "run.json").exists():  # of an attempt that saved nothing
                shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
            self.snapshot(started.method, 0)
        held = f", {len(started.held_back)} held back" if started.held_back else ""
        begun = f"Going on at step {clock.step} of" if resume else f"Training {clock.epochs} epochs,"
        self.terminal.say(
            f"{begun} {clock.steps} steps on {len(started.train)} pictures{held}; {self.folder}/"
        )
        if self.baselines:
            floors = ", ".join(
                f"{k.replace('_', ' ')} {_first(v)[1]:.1f} %" for k, v in self.baselines.items()
            )
            self.terminal.say(
                f"{_first(next(iter(self.baselines.values())))[0]} floors to rise above: {floors}"
            )

    def evaluated(self, event: Evaluated) -> None:
        self.quality = event.values
        name, value = _first(event.values)
        if event.is_best:
            self.best = {
                "name": name,
                "value": value,
                "epoch": event.clock.step / event.clock.steps_per_epoch,
            }
        mark = "  best so far" if event.is_best else ""
        floors = "".join(f", {k.replace('_', ' ')} {_first(v)[1]:.1f}" for k, v in self.baselines.items())
        epoch = event.clock.step // event.clock.steps_per_epoch
        self.terminal.say(
            f"epoch {epoch}: {name} {value:.1f} %{floors}{mark}", style="green" if event.is_best else None
        )

    def epoch_done(self, clock: Clock, method: Any) -> None:
        """Keeps snapshots when due, and warns when the curves look like a collapse."""
        epoch = clock.step // clock.steps_per_epoch
        if not self.rt.is_main or not self.due or epoch < self.due[0]:
            return
        self.due = [due for due in self.due if due > epoch]
        self.snapshot(method, epoch)
        advice = diagnose(read_metrics(self.folder), self.run.method.out_dim)
        for text in advice:
            if text.split(":")[0] not in self.advice:
                self.advice.append(text.split(":")[0])
                self.terminal.say(text, style="yellow")
        write_report(self.folder)

    def snapshot(self, method: Any, epoch: float) -> None:
        snapshot(
            method.backbone,
            self.shown,
            self.samples,
            self.folder / "snapshots",
            epoch,
            self.run.views.global_size,
        )

    def write_skipped(self, skipped: dict[str, str]) -> None:
        lines = [
            json.dumps({"name": name, "reason": why}, ensure_ascii=False) + "\n"
            for name, why in skipped.items()
        ]
        checkpoint.write_whole(
            self.folder / "skipped.jsonl",
            lambda aside: aside.write_text("".join(lines), "utf-8", "backslashreplace"),
        )

    def outcome(self, ended: Ended, number: int | None) -> Outcome:
        if ended.finished:
            with self.terminal.progress("neighbours") as done:
                self.neighbours(ended.method.backbone, done)
        return Outcome(
            folder=self.folder,
            run=self.run,
            clock=ended.clock,
            finished=ended.finished,
            signal=number,
            metrics=self.metrics,
            quality=self.quality,
            best=self.best,
            baselines=self.baselines,
            skipped=ended.skipped,
        )

    def neighbours(self, backbone: Any, done: Callable[[int, int], None]) -> None:
        """Nearest neighbours of the sample pictures among some thousands, for the report; all ranks take part."""
        step = max(1, -(-len(self.shown) // NEIGHBOUR_PICTURES))
        kept = sorted({*range(0, len(self.shown), step), *self.samples})
        pictures = self.shown.subset(kept)
        extracted = extract(
            backbone,
            pictures,
            size=self.run.views.global_size,
            device=self.rt.device,
            workers=self.run.workers,
            autocast=self.rt.autocast,
            progress=done,
        )
        if self.rt.is_main:
            queries = [kept.index(sample) for sample in self.samples]
            write_neighbours(extracted, pictures, queries, self.folder / "snapshots")

    def finish(self, outcome: Outcome) -> None:
        """The last words: what came out, and where it lies."""
        self.write_skipped(outcome.skipped)
        write_report(self.folder)
        say = self.terminal.say
        if outcome.skipped:
            say(
                f"{len(outcome.skipped)} files were left out; {self.folder}/skipped.jsonl says why",
                style="yellow",
            )
        clock = outcome.clock
        if not outcome.finished:
            say(
                f"Stopped at step {clock.step} of {clock.steps}; all is saved in {self.folder}/checkpoints/last.pt."
            )
            say(f"Go on with:  dino train --resume {self.folder}")
            return
        if outcome.quality:
            name, value = _first(outcome.quality)
            best = (
                f" (best {outcome.best['value']:.1f} % in epoch {outcome.best['epoch']:.0f})"
                if outcome.best
                else ""
            )
            say(f"{name} {value:.1f} %{best}", style="bold")
        say(f"Report     {outcome.report}")
        say(f"Backbone   {self.folder}/backbone.safetensors    in Python: dino.load({str(self.folder)!r})")


@contextmanager
def heard_signals() -> Iterator[Callable[[], int | None]]:
    """Remembers which signal came last, while somebody else's handler acts on it."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    os.set_blocking(theirs, False)
    try:
        before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    except ValueError:  # not the main thread: no signal comes here
        yield lambda: None
        return

    def heard() -> int | None:
        try:
            numbers = [n for n in os.read(ours, 4096) if n in (signal.SIGINT, signal.SIGTERM)]
        except BlockingIOError:
            return None
        return numbers[-1] if numbers else None

    try:
        yield heard
    finally:
        signal.set_wakeup_fd(before)
        os.close(ours)
        os.close(theirs)


def _first(values: dict[str, float]) -> tuple[str, float]:
    return next(iter(values.items()))
