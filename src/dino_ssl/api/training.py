"""One training session as a person sees it: the plan, the bar, the snapshots, the report.

`dino_ssl.training.train` says what happens; everything that is drawn, written for people, or asked lies here.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dino_ssl import distributed, files
from dino_ssl.api.live import TrainingProgress
from dino_ssl.collapse.checks import Finding
from dino_ssl.collapse.policy import CollapsePolicy, Decision, monitored
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import Diverged, UserError
from dino_ssl.evals.features import extract
from dino_ssl.events import Ended, EpochDone, EvalDone, EvalStarted, Evaluated, Event, Logged, Started
from dino_ssl.report.run_report import write_report
from dino_ssl.report.snapshots import choose_samples, save_snapshot, write_neighbors
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.terminal import Terminal
from dino_ssl.training import eval_context, train

SNAPSHOTS = 5
"""Checkpoints at which the attention of the sample pictures is kept."""
FIGURES = 4
"""How many figures of an evaluation are said."""
MAX_NEIGHBOUR_IMAGES = 5000
"""Pictures among which the report's nearest neighbours are searched."""


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
    evals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The last answers to the run's `evals`, by what was asked."""
    best: dict[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    collapse: str | None = None
    """What ended it, where it was to stop or to go back at a collapse, in words that say what to turn."""

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def run_session(
    run: Run,
    rt: Runtime,
    dataset: ImageDataset,
    terminal: Terminal,
    *,
    resume: bool = False,
    observe: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """Trains to the end, or until somebody asks to stop; writes snapshots and the report on the way.

    observe: shown every event before the session looks at it.
    """
    folder = Path(run.out)
    session = _Session(run, rt, dataset, terminal, folder, observe)
    try:
        outcome = session.outcome(session.watch(resume))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The device ran out of memory: {str(error).splitlines()[0]}\n"
            f"--optim.micro-batch auto takes the {run.optim.batch_size} pictures of a step in parts that fit; "
            "--recompute keeps less of each. Or lower --optim.batch-size."
        ) from error
    if rt.is_main:
        session.finish(outcome)
    distributed.barrier()
    return outcome


class _Session:
    def __init__(
        self,
        run: Run,
        rt: Runtime,
        dataset: ImageDataset,
        terminal: Terminal,
        folder: Path,
        observe: Callable[[Event], None],
    ) -> None:
        self.run, self.rt, self.dataset, self.terminal, self.folder = run, rt, dataset, terminal, folder
        self.observe = observe
        self.metrics: dict[str, float] = {}
        self.quality: dict[str, float] = {}
        self.evals: dict[str, dict[str, float]] = {}
        self.best: dict[str, Any] = {}
        self.reference_scores: Mapping[str, Mapping[str, float]] = {}
        self.samples: list[int] = []
        self.due: list[float] = []
        self.policy = CollapsePolicy(run, is_main=rt.is_main)
        self.collapsed: Decision | None = None

    def watch(self, resume: bool) -> Ended:
        """Follows the training to its end; after a collapse, once more from a healthy checkpoint."""
        while True:
            diverged = ended = None
            try:
                ended = self.follow(resume)
            except Diverged as error:
                if self.run.on_collapse != "rollback":
                    raise
                diverged = error
                self.policy.on_divergence(str(error).splitlines()[0])
            self.collapsed = self.policy.decide(ended)
            if self.collapsed is not None and self.collapsed.message:
                self.terminal.print(self.collapsed.message, style="bold yellow")
            if self.collapsed is not None and self.collapsed.run is not None:
                self.run, resume = self.collapsed.run, True
            elif ended is None:
                raise diverged or AssertionError("training ended without saying so")
            elif self.collapsed is not None and self.collapsed.back_to is not None:
                return ended._replace(clock=ended.clock._replace(step=self.collapsed.back_to), finished=False)
            else:
                return ended

    def follow(self, resume: bool) -> Ended:
        """Follows the training from its first event to its last."""
        run, terminal = self.run, self.terminal
        events = train(run, self.rt, self.dataset, resume=resume)
        with terminal.progress("preparing"):  # the floors of the accuracy are measured before the first step
            started = next(events)
        assert isinstance(started, Started)
        self.observe(started)
        self.begin(started, resume)
        for finding in self.policy.start(started):
            self.print_finding(finding)
        with TrainingProgress(terminal, started.clock, run.method.num_prototypes) as watch:
            for event in monitored(events, self.policy):
                if isinstance(event, Finding):
                    self.print_finding(event)
                    continue
                self.observe(event)
                match event:
                    case Logged(clock, metrics):
                        self.metrics = metrics
                        watch.logged(clock, metrics)
                    case Evaluated():
                        self.evaluated(event)
                        watch.resume()
                    case EvalStarted(_, name):
                        watch.busy(name)
                    case EvalDone():
                        self.measured(event)
                        watch.resume()
                    case EpochDone(clock, method):
                        watch.busy("snapshot")
                        self.epoch_done(clock, method)
                        watch.resume()
                    case Ended():
                        return event
        raise AssertionError("training ended without saying so")

    def print_finding(self, finding: Finding) -> None:
        self.terminal.print(str(finding), style="bold yellow" if finding.fatal else "yellow")

    def begin(self, started: Started, resume: bool) -> None:
        clock, self.reference_scores, self.best = started.clock, started.reference_scores, dict(started.best)
        self.samples = choose_samples(started.val_set or started.train_set)
        self.shown = started.val_set or started.train_set
        self.due = [clock.epochs * i / (SNAPSHOTS - 1) for i in range(SNAPSHOTS)]
        self.due = [epoch for epoch in self.due if epoch > clock.epoch]
        if not self.rt.is_main:
            return
        self.write_skipped({item.name: item.reason for item in self.dataset.skipped})
        if clock.step == 0:
            if (self.folder / "run.json").exists():  # of an attempt that saved nothing
                shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
            self.snapshot(started.method, 0)
        kept = "asked about" if self.run.val is not None else "held back"
        held = f", {len(started.val_set)} {kept}" if started.val_set else ""
        length = "1 epoch" if clock.epochs == 1 else f"{clock.epochs} epochs"
        begun = f"Going on at step {clock.step} of" if resume else f"Training {length},"
        self.terminal.print(f"{begun} {clock.steps} steps on {len(started.train_set)} pictures{held}; {self.folder}/")
        if self.reference_scores:
            references = ", ".join(
                f"{k.replace('_', ' ')} {_first(v)[1]:.1f} %" for k, v in self.reference_scores.items()
            )
            self.terminal.print(
                f"{_first(next(iter(self.reference_scores.values())))[0]} floors to rise above: {references}"
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
        references = "".join(f", {k.replace('_', ' ')} {_first(v)[1]:.1f}" for k, v in self.reference_scores.items())
        epoch = event.clock.step // event.clock.steps_per_epoch
        self.terminal.print(
            f"epoch {epoch}: {name} {value:.1f} %{references}{mark}", style="green" if event.is_best else None
        )

    def measured(self, event: EvalDone) -> None:
        self.evals[event.name] = event.values
        self.terminal.print(
            f"epoch {event.clock.step // event.clock.steps_per_epoch}: {_told(event.name, event.values)}"
        )

    def epoch_done(self, clock: Clock, method: Any) -> None:
        """Keeps snapshots when due."""
        epoch = clock.step // clock.steps_per_epoch
        if not self.rt.is_main or not self.due or epoch < self.due[0]:
            return
        self.due = [due for due in self.due if due > epoch]
        self.snapshot(method, epoch)
        write_report(self.folder, self.run)

    def snapshot(self, method: Any, epoch: float) -> None:
        save_snapshot(
            method.backbone,
            self.shown,
            self.samples,
            self.folder / "snapshots",
            epoch,
            self.run.views.size,
        )

    def write_skipped(self, skipped: dict[str, str]) -> None:
        lines = [json.dumps({"name": name, "reason": why}, ensure_ascii=False) + "\n" for name, why in skipped.items()]
        files.atomic_write(
            self.folder / "skipped.jsonl",
            lambda aside: aside.write_text("".join(lines), "utf-8", "backslashreplace"),
        )

    def outcome(self, ended: Ended) -> Outcome:
        if ended.finished:
            with self.terminal.progress("neighbours") as done:
                self.neighbours(ended.method.backbone, done)
        return Outcome(
            folder=self.folder,
            run=self.run,
            clock=ended.clock,
            finished=ended.finished,
            signal=ended.signal,
            metrics=self.metrics,
            quality=self.quality,
            evals=self.evals,
            best=self.best,
            baselines=self.reference_scores,
            skipped=ended.skipped,
            collapse=None if self.collapsed is None else str(self.collapsed.finding),
        )

    def neighbours(self, backbone: Any, done: Callable[[int, int], None]) -> None:
        """Nearest neighbours of the sample pictures, for the report; all ranks take part."""
        step = max(1, -(-len(self.shown) // MAX_NEIGHBOUR_IMAGES))
        kept = sorted({*range(0, len(self.shown), step), *self.samples})
        dataset = self.shown.subset(kept)
        context = replace(eval_context(self.run, self.rt), progress=lambda label: nullcontext(done))
        extracted = extract(backbone, dataset, context)
        if self.rt.is_main:
            read = set(extracted.indices.tolist())  # the others went bad since
            queries = [place for place in map(kept.index, self.samples) if place in read]
            if queries:
                write_neighbors(extracted, dataset, queries, self.folder / "snapshots")

    def finish(self, outcome: Outcome) -> None:
        """The last words: what came out, and where it lies."""
        self.write_skipped(outcome.skipped)
        write_report(self.folder, self.run)
        say = self.terminal.print
        if outcome.skipped:
            say(
                f"{len(outcome.skipped)} files were left out; {self.folder}/skipped.jsonl says why",
                style="yellow",
            )
        clock = outcome.clock
        if not outcome.finished:
            why = f" ({outcome.collapse.split(':')[0]})" if outcome.collapse else ""
            say(f"Stopped at step {clock.step} of {clock.steps}{why}; saved in {self.folder}/checkpoints/last.pt")
            say(f"Go on with:  dino train --resume {self.folder}")
            return
        if outcome.quality:
            name, value = _first(outcome.quality)
            best = f" (best {outcome.best['value']:.1f} % in epoch {outcome.best['epoch']:.0f})" if outcome.best else ""
            say(f"{name} {value:.1f} %{best}", style="bold")
        for asked, values in outcome.evals.items():
            say(_told(asked, values))
        say(f"Report     {outcome.report}")
        say(f"Backbone   {self.folder}/backbone.safetensors    in Python: dino_ssl.load({str(self.folder)!r})")


def _told(name: str, values: Mapping[str, float]) -> str:
    """`retrieval roxford5k: mAP easy 40.1, mAP medium 30.2, mAP hard 9.8`: what it names first."""
    return f"{name}: {', '.join(f'{key} {value:.1f}' for key, value in list(values.items())[:FIGURES])}"


def _first(values: Mapping[str, float]) -> tuple[str, float]:
    return next(iter(values.items()))
