"""A training session: training with progress, snapshots of attention maps, collapse handling and the report."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dino_ssl import distributed
from dino_ssl.api.training_progress import TrainingProgress
from dino_ssl.collapse.checks import Finding
from dino_ssl.collapse.policy import CollapsePolicy, Decision, monitored
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import Diverged, UserError
from dino_ssl.evals.features import extract
from dino_ssl.events import Ended, EpochDone, EvalDone, EvalStarted, Evaluated, Event, Logged, Started
from dino_ssl.files import atomic_write
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import Progress
from dino_ssl.report.run_report import write_report
from dino_ssl.report.snapshots import choose_samples, save_snapshot, write_neighbors
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.terminal import Terminal
from dino_ssl.training import train
from dino_ssl.training_evals import eval_context

NUM_SNAPSHOTS = 5
"""Epochs, evenly spaced, at which the attention maps of the sample images are saved."""
MAX_PRINTED_VALUES = 4
"""Values of an evaluation that are printed."""
MAX_NEIGHBOR_IMAGES = 5000
"""Images in which the report's nearest neighbors are searched."""


@dataclass(frozen=True)
class Outcome:
    """The result of a training session."""

    folder: Path
    run: Run
    clock: Clock
    finished: bool
    signal: int | None = None
    """The signal that stopped it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last line of metrics."""
    quality: dict[str, float] = field(default_factory=dict)
    """The last online evaluation."""
    evals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The last results of the run's `evals` by label."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best online evaluation: `name`, `value`, `epoch`."""
    reference_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Skipped files with the reasons."""
    collapse: str | None = None
    """The collapse that ended training, with a suggestion."""

    @property
    def report(self) -> Path:
        """The HTML report."""
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
    """Train until the end or a signal; write snapshots and the report.

    observe: called with every event first. Raises UserError if the device runs out of memory.
    """
    session = _Session(run, rt, dataset, terminal, observe)
    try:
        outcome = session.outcome(session.train(resume))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The device ran out of memory: {str(error).splitlines()[0]}\n"
            f"Set `optim.micro_batch` to auto for gradient accumulation over the {run.optim.batch_size} images of a "
            "step, set `grad_checkpointing`, or lower `optim.batch_size`."
        ) from error
    if rt.is_main:
        session.finish(outcome)
    distributed.barrier()
    return outcome


class _Session:
    def __init__(
        self, run: Run, rt: Runtime, dataset: ImageDataset, terminal: Terminal, observe: Callable[[Event], None]
    ) -> None:
        self.run, self.rt, self.dataset, self.terminal, self.observe = run, rt, dataset, terminal, observe
        self.folder = Path(run.out)
        self.metrics: dict[str, float] = {}
        self.quality: dict[str, float] = {}
        self.evals: dict[str, dict[str, float]] = {}
        self.best: dict[str, Any] = {}
        self.reference_scores: Mapping[str, Mapping[str, float]] = {}
        self.policy = CollapsePolicy(run, is_main=rt.is_main)
        self.collapse: Decision | None = None

    def train(self, resume: bool) -> Ended:
        """Train to the end; after a rollback, resume from a healthy checkpoint."""
        while True:
            diverged = ended = None
            try:
                ended = self.attempt(resume)
            except Diverged as error:
                if self.run.on_collapse != "rollback":
                    raise
                diverged = error
                self.policy.on_divergence(str(error).splitlines()[0])
            self.collapse = self.policy.decide(ended)
            if self.collapse is not None and self.collapse.message:
                self.terminal.print(self.collapse.message, style="bold yellow")
            if self.collapse is not None and self.collapse.run is not None:
                self.run, resume = self.collapse.run, True
            elif ended is None:
                assert diverged is not None
                raise diverged
            elif self.collapse is not None and self.collapse.back_to is not None:
                return ended._replace(clock=ended.clock._replace(step=self.collapse.back_to), finished=False)
            else:
                return ended

    def attempt(self, resume: bool) -> Ended:
        """Run the training loop once and handle all of its events."""
        events = train(self.run, self.rt, self.dataset, resume=resume)
        with self.terminal.progress("preparing"):  # measures the reference scores
            started = next(events)
        assert isinstance(started, Started)
        self.observe(started)
        self.start(started, resume)
        for finding in self.policy.start(started):
            self.print_finding(finding)
        with TrainingProgress(self.terminal, started.clock, self.run.method.num_prototypes) as progress:
            for event in monitored(events, self.policy):
                if isinstance(event, Finding):
                    self.print_finding(event)
                    continue
                self.observe(event)
                match event:
                    case Logged(clock, metrics):
                        self.metrics = metrics
                        progress.update(clock, metrics)
                    case Evaluated():
                        self.print_online_eval(event)
                        progress.resume()
                    case EvalStarted(_, name):
                        progress.pause(name)
                    case EvalDone():
                        self.print_eval(event)
                        progress.resume()
                    case EpochDone(clock, method):
                        progress.pause("snapshot")
                        self.snapshot_if_due(clock, method.backbone)
                        progress.resume()
                    case Ended():
                        return event
        raise AssertionError("training ended without an Ended event")

    def start(self, started: Started, resume: bool) -> None:
        clock, self.reference_scores, self.best = started.clock, started.reference_scores, dict(started.best)
        self.sample_set = started.val_set or started.train_set
        self.samples = choose_samples(self.sample_set)
        epochs = [clock.epochs * i / (NUM_SNAPSHOTS - 1) for i in range(NUM_SNAPSHOTS)]
        self.snapshot_epochs = [epoch for epoch in epochs if epoch > clock.epoch]
        if not self.rt.is_main:
            return
        self.write_skipped({item.name: item.reason for item in self.dataset.skipped})
        if clock.step == 0:
            if (self.folder / "run.json").exists():  # an earlier attempt that saved no checkpoint
                shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
            self.snapshot(started.method.backbone, 0)
        self.print_start(started, resume)

    def print_start(self, started: Started, resume: bool) -> None:
        clock = started.clock
        validation = f", {len(started.val_set)} validation images" if started.val_set else ""
        epochs = "1 epoch" if clock.epochs == 1 else f"{clock.epochs} epochs"
        action = f"Resuming at step {clock.step} of" if resume else f"Training {epochs},"
        self.terminal.print(
            f"{action} {clock.steps} steps on {len(started.train_set)} images{validation}; output in {self.folder}/"
        )
        if self.reference_scores:
            name, _ = _first(next(iter(self.reference_scores.values())))
            scores = ", ".join(f"{k.replace('_', ' ')} {_first(v)[1]:.1f} %" for k, v in self.reference_scores.items())
            self.terminal.print(f"Reference scores ({name}): {scores}")

    def print_finding(self, finding: Finding) -> None:
        self.terminal.print(str(finding), style="bold yellow" if finding.fatal else "yellow")

    def print_online_eval(self, event: Evaluated) -> None:
        self.quality = event.values
        name, value = _first(event.values)
        epoch = event.clock.step / event.clock.steps_per_epoch
        if event.is_best:
            self.best = {"name": name, "value": value, "epoch": epoch}
        references = "".join(f", {k.replace('_', ' ')} {_first(v)[1]:.1f}" for k, v in self.reference_scores.items())
        mark, style = ("  best so far", "green") if event.is_best else ("", None)
        self.terminal.print(f"epoch {epoch:.0f}: {name} {value:.1f} %{references}{mark}", style=style)

    def print_eval(self, event: EvalDone) -> None:
        self.evals[event.name] = event.values
        self.terminal.print(
            f"epoch {event.clock.step // event.clock.steps_per_epoch}: {_summary(event.name, event.values)}"
        )

    def snapshot_if_due(self, clock: Clock, backbone: Backbone) -> None:
        epoch = clock.step // clock.steps_per_epoch
        if not self.rt.is_main or not self.snapshot_epochs or epoch < self.snapshot_epochs[0]:
            return
        self.snapshot_epochs = [due for due in self.snapshot_epochs if due > epoch]
        self.snapshot(backbone, epoch)
        write_report(self.folder, self.run)

    def snapshot(self, backbone: Backbone, epoch: float) -> None:
        folder = self.folder / "snapshots"
        save_snapshot(backbone, self.sample_set, self.samples, folder, epoch, self.run.views.size)

    def write_skipped(self, skipped: dict[str, str]) -> None:
        rows = [json.dumps({"name": name, "reason": why}, ensure_ascii=False) + "\n" for name, why in skipped.items()]
        atomic_write(
            self.folder / "skipped.jsonl",
            lambda temporary: temporary.write_text("".join(rows), "utf-8", "backslashreplace"),
        )

    def outcome(self, ended: Ended) -> Outcome:
        if ended.finished:
            with self.terminal.progress("nearest neighbors") as progress:
                self.neighbors(ended.method.backbone, progress)
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
            reference_scores=self.reference_scores,
            skipped=ended.skipped,
            collapse=None if self.collapse is None else str(self.collapse.finding),
        )

    def neighbors(self, backbone: Backbone, progress: Progress) -> None:
        """Find the nearest neighbors of the sample images for the report; all ranks take part."""
        step = max(1, -(-len(self.sample_set) // MAX_NEIGHBOR_IMAGES))
        kept = sorted({*range(0, len(self.sample_set), step), *self.samples})
        dataset = self.sample_set.subset(kept)
        context = replace(eval_context(self.run, self.rt), progress=lambda label: nullcontext(progress))
        features = extract(backbone, dataset, context)
        if self.rt.is_main:
            readable = set(features.indices.tolist())
            queries = [index for index in map(kept.index, self.samples) if index in readable]
            if queries:
                write_neighbors(features, dataset, queries, self.folder / "snapshots")

    def finish(self, outcome: Outcome) -> None:
        """Write the report and print the results and their paths."""
        self.write_skipped(outcome.skipped)
        write_report(self.folder, self.run)
        show = self.terminal.print
        if outcome.skipped:
            show(f"{len(outcome.skipped)} files were skipped; {self.folder}/skipped.jsonl has the reasons", "yellow")
        clock = outcome.clock
        if not outcome.finished:
            reason = f" ({outcome.collapse.split(':')[0]})" if outcome.collapse else ""
            show(f"Stopped at step {clock.step} of {clock.steps}{reason}; saved in {self.folder}/checkpoints/last.pt")
            show(f"Resume with:  dino train --resume {self.folder}")
            return
        if outcome.quality:
            name, value = _first(outcome.quality)
            best = f" (best {outcome.best['value']:.1f} % in epoch {outcome.best['epoch']:.0f})" if outcome.best else ""
            show(f"{name} {value:.1f} %{best}", style="bold")
        for label, values in outcome.evals.items():
            show(_summary(label, values))
        show(f"Report     {outcome.report}")
        show(f"Backbone   {self.folder}/backbone.safetensors    in Python: dino_ssl.load({str(self.folder)!r})")


def _summary(name: str, values: Mapping[str, float]) -> str:
    """Return `retrieval roxford5k: mAP easy 40.1, mAP medium 30.2, ...`: the first values of an evaluation."""
    return f"{name}: {', '.join(f'{key} {value:.1f}' for key, value in list(values.items())[:MAX_PRINTED_VALUES])}"


def _first(values: Mapping[str, float]) -> tuple[str, float]:
    return next(iter(values.items()))
