"""A training session: training with progress, snapshots of attention maps, collapse handling and the report."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dino_ssl import distributed
from dino_ssl.api.time_budget import TimeBudget
from dino_ssl.api.training_progress import TrainingProgress
from dino_ssl.collapse.checks import Finding
from dino_ssl.collapse.policy import CollapsePolicy
from dino_ssl.config import to_dict
from dino_ssl.data.dataset import USED, ImageDataset
from dino_ssl.errors import Diverged, OutOfMemory, UserError, memory_errors
from dino_ssl.evals.features import extract
from dino_ssl.events import Ended, EpochDone, EvalDone, EvalStarted, Evaluated, Event, Logged, Started
from dino_ssl.files import atomic_write, json_line, locked, read_json, write_json
from dino_ssl.formatting import Summarized, duration, plural
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import EXPORTS
from dino_ssl.report.run_report import write_report
from dino_ssl.report.snapshots import choose_samples, save_snapshot, write_neighbors
from dino_ssl.report.verdict import Verdict, below_initial, read_results
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.terminal import Terminal, logger
from dino_ssl.training import train
from dino_ssl.training_evals import eval_context

NUM_SNAPSHOTS = 5
"""Epochs, evenly spaced, at which the attention maps of the sample images are saved."""
MAX_LOGGED_VALUES = 4
"""Values of an evaluation that are logged."""
NUM_SCORE_LINES = 10
"""New best scores of the online evaluation that are logged at most; the progress line shows all."""
MAX_NEIGHBOR_IMAGES = 5000
"""Images in which the report's nearest neighbors are searched."""


@dataclass(repr=False)
class Outcome(Summarized):
    """The result of a training session."""

    folder: Path
    run: Run
    clock: Clock
    finished: bool = False
    signal: int | None = None
    """The signal that stopped it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last line of metrics."""
    quality: dict[str, float] = field(default_factory=dict)
    """The last online evaluation."""
    evals: dict[str, dict[str, float]] = field(default_factory=dict)
    """The last results of the run's `evals` by label."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best online evaluation: `name`, `value`, `epoch`."""
    reference_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Skipped files with the reasons."""
    collapse: str | None = None
    """The collapse that ended training, with a suggestion."""
    verdict: Verdict = field(default_factory=lambda: Verdict("unmeasured", "The session has not ended."))
    """Whether it learned, why, and what to do next."""

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        stopped = self.collapse or f"stopped at step {self.clock.step} of {self.clock.steps}"
        metric, results = next(iter(self.quality), ""), {"": self.quality, **self.reference_scores}
        values = {
            f"{metric} {name}".replace("_", " ").strip(): f"{scores[metric]:.1f}"
            for name, scores in results.items()
            if metric in scores
        }
        return {
            "folder": self.folder,
            "state": "finished" if self.finished else stopped,
            "verdict": self.verdict.sentence,
            **values,
            "report": self.report,
        }


def run_session(
    run: Run,
    rt: Runtime,
    dataset: ImageDataset,
    terminal: Terminal,
    *,
    resume: bool = False,
    observe: Callable[[Event], None] = lambda event: None,
    budget: TimeBudget | None = None,
) -> Outcome:
    """Train until the end, a signal or a collapse; write snapshots and the report.

    observe: called first with every event but the last. budget: the time, by which the number of epochs is corrected
    once. Raises UserError if the device runs out of memory, or if another process trains in the folder.
    """
    session = _Session(run, rt, dataset, terminal, observe, budget)
    with ExitStack() as held:
        distributed.run_on_rank0(lambda: held.enter_context(locked(session.folder)))
        try:
            with memory_errors():
                session.train(resume)
                if session.correct_epochs():
                    session.train(resume=True, announce=False)
        except OutOfMemory as error:
            raise UserError(
                f"{error}\nSet `optim.micro_batch` to auto for gradient accumulation over the {run.optim.batch_size} "
                "images of a step, set `grad_checkpointing`, or lower `optim.batch_size`."
            ) from error
        session.outcome.verdict = distributed.run_on_rank0(session.finish)
    return session.outcome


class _Session:
    def __init__(
        self,
        run: Run,
        rt: Runtime,
        dataset: ImageDataset,
        terminal: Terminal,
        observe: Callable[[Event], None],
        budget: TimeBudget | None,
    ) -> None:
        self.run, self.rt, self.dataset, self.terminal, self.observe = run, rt, dataset, terminal, observe
        self.folder, self.budget, self.next_score_line = Path(run.out), budget, 0

    def train(self, resume: bool, *, announce: bool = True) -> None:
        """Run the training loop and handle its events; announce: log the settings of the session first."""
        events = train(self.run, self.rt, self.dataset, resume=resume)
        with self.terminal.progress("preparing"):  # measures the reference scores
            started = next(events)
        assert isinstance(started, Started)
        self.observe(started)
        self.start(started)
        if announce:
            self.announce(started, resume)
        self.must_correct(started)
        stop = None
        with TrainingProgress(self.terminal, started.clock, self.run.method.num_prototypes) as progress:
            try:
                while not isinstance(event := events.send(stop), Ended):
                    self.observe(event)
                    stop = self.handle(event, progress) or self.must_correct(event)
            except Diverged:
                self.roll_back(diverged=True)
                raise
        self.end(event)

    def handle(self, event: Event, progress: TrainingProgress) -> bool | None:
        """Log and store what an event reports; return True if training must end."""
        match event:
            case Logged(clock, metrics):
                self.outcome.metrics = metrics
                progress.show(clock, metrics)
                findings, stop = self.policy.update(event)
                self.log_findings(findings)
                return stop
            case Evaluated(clock, _, values, is_best):
                self.outcome.quality = values
                name, value = _first(values)
                if is_best:
                    self.outcome.best = {"name": name, "value": value, "epoch": clock.step / clock.steps_per_epoch}
                progress.show_score(f"{name} {value:.1f} %")
                if is_best and self.next_score_line <= clock.step < clock.steps:
                    self.next_score_line = clock.step + clock.steps // NUM_SCORE_LINES
                    logger.info(f"epoch {clock.epoch}: {name} {_quality(values)}", extra={"style": "green"})
            case EvalStarted(_, name):
                progress.show_activity(name)
            case EvalDone(clock, name, values):
                self.outcome.evals[name] = values
                logger.info(f"epoch {clock.epoch}: {_summary(name, values)}")
            case EpochDone(clock, method) if self.rt.is_main and clock.epoch >= self.snapshot_epochs[0]:
                progress.show_activity("snapshot")
                self.snapshot_epochs = [epoch for epoch in self.snapshot_epochs if epoch > clock.epoch]
                self.snapshot(method.backbone, clock.epoch)
                if clock.step < clock.steps:
                    write_report(self.folder, self.run)
        return None

    def start(self, started: Started) -> None:
        self.policy = CollapsePolicy(self.run, started, is_main=self.rt.is_main)
        clock, best = started.clock, dict(started.best)
        self.outcome = Outcome(self.folder, self.run, clock, best=best, reference_scores=started.reference_scores)
        self.sample_set = started.val_set or started.train_set
        self.samples = choose_samples(self.sample_set) if self.run.thumbnails else []
        epochs = [clock.epochs * i / (NUM_SNAPSHOTS - 1) for i in range(NUM_SNAPSHOTS)]
        self.snapshot_epochs = [*(epoch for epoch in epochs if epoch > clock.epoch), math.inf]
        if not self.rt.is_main:
            return
        self.write_skipped({item.name: item.reason for item in self.dataset.skipped})
        if clock.step == 0:
            if (self.folder / "run.json").exists():  # an earlier attempt that saved no checkpoint
                shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
            self.snapshot(started.method.backbone, 0)

    def announce(self, started: Started, resume: bool) -> None:
        clock, references = started.clock, started.reference_scores
        validation = f", {plural(len(started.val_set), 'validation image')}" if started.val_set else ""
        action = f"Resuming at step {clock.step} of" if resume else f"Training {plural(clock.epochs, 'epoch')},"
        logger.info(
            f"{action} {plural(clock.steps, 'step')} on {plural(len(started.train_set), 'image')}{validation}; "
            f"output in {self.folder}/"
        )
        if references:
            name, _ = _first(next(iter(references.values())))
            scores = ", ".join(f"{k.replace('_', ' ')} {_quality(v)}" for k, v in references.items())
            logger.info(f"Reference scores ({name} at {self.run.eval_size} px): {scores}")
        self.log_findings(self.policy.config_findings)

    def log_findings(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            logger.warning(str(finding), extra={"style": "bold yellow" if finding.fatal else "yellow"})

    def snapshot(self, backbone: Backbone, epoch: int) -> None:
        folder = self.folder / "snapshots"
        save_snapshot(backbone, self.sample_set, self.samples, folder, epoch, self.run.views.size)

    def write_skipped(self, skipped: dict[str, str]) -> None:
        rows = [json_line({"name": name, "reason": reason}) for name, reason in skipped.items()]
        atomic_write(
            self.folder / "skipped.jsonl",
            lambda temporary: temporary.write_text("".join(rows), "utf-8", "backslashreplace"),
        )

    def roll_back(self, *, diverged: bool = False) -> int | None:
        """Return the step of the restored checkpoint; None if none was."""
        if self.run.on_collapse != "rollback":
            return None
        message, step = distributed.run_on_rank0(lambda: self.policy.roll_back(diverged=diverged))
        logger.warning(message, extra={"style": "bold yellow"})
        return step

    def end(self, ended: Ended) -> None:
        """Complete the outcome: roll back after a collapse, or find the neighbors; all ranks take part."""
        outcome = self.outcome
        outcome.clock, outcome.finished = ended.clock, ended.finished
        outcome.skipped, outcome.signal = ended.skipped, ended.signal
        if (finding := self.policy.fatal) is not None:
            outcome.collapse = str(finding)
            if (step := self.roll_back()) is not None:
                outcome.clock, outcome.finished = ended.clock._replace(step=step), False
        if outcome.finished and self.samples:
            self.find_neighbors(ended.method.backbone)

    def must_correct(self, event: Event) -> bool:
        """Return True if training must stop here, because another number of epochs fits into the time."""
        return self.budget is not None and self.budget.update(event, self.run.online_eval.every_epochs)

    def correct_epochs(self) -> bool:
        """Give a run that stopped for it the number of epochs that fits into the time, in run.json too.

        Returns True if training must resume with it; all ranks take part.
        """
        outcome, budget, before = self.outcome, self.budget, self.run.optim.epochs
        after = None if budget is None else budget.epochs
        if budget is None or after in (None, before) or outcome.finished or outcome.collapse:
            return False
        signals = torch.tensor([float(outcome.signal is not None)], device=self.rt.device)
        if distributed.all_reduce_sum(signals).item():
            return False
        self.run, self.budget = distributed.run_on_rank0(lambda: budget.fit(after)), None
        if self.rt.is_main:
            path = self.folder / "run.json"
            corrected = {"step": outcome.clock.step, "epochs": [before, after], "minutes": budget.minutes}
            write_json(path, read_json(path) | {"run": to_dict(self.run), "corrected": corrected})
        clock, available = outcome.clock._replace(epochs=after), duration(60 * budget.minutes)
        logger.info(
            f"The number of epochs is corrected from {before} to {after}, which fit into {available} at the measured "
            f"speed. Training continues at step {clock.step} of {clock.steps}."
        )
        return True

    def find_neighbors(self, backbone: Backbone) -> None:
        """Find the nearest neighbors of the sample images for the report; all ranks take part."""
        step = max(1, -(-len(self.sample_set) // MAX_NEIGHBOR_IMAGES))
        kept = sorted({*range(0, len(self.sample_set), step), *self.samples})
        dataset = self.sample_set.subset(kept)
        with self.terminal.progress("nearest neighbors") as progress:
            context = replace(eval_context(self.run, self.rt), progress=lambda label: nullcontext(progress))
            features = extract(backbone, dataset, context)
        if self.rt.is_main:
            write_neighbors(features, dataset, [kept.index(i) for i in self.samples], self.folder / "snapshots")

    def finish(self) -> Verdict:
        """Write the report and log the results and their paths."""
        outcome, show = self.outcome, logger.info
        self.write_skipped(outcome.skipped)
        write_report(self.folder, self.run)
        results = read_results(self.folder, self.run)
        if outcome.skipped:
            used = sum(reason.startswith(USED) for reason in outcome.skipped.values())
            counts = {"file": len(outcome.skipped) - used, "damaged image": used}
            skipped, kept = (plural(count, noun) for noun, count in counts.items())
            text = f"{skipped} skipped" if not used else f"{skipped} skipped, {kept} used"
            logger.warning(f"{text}; {self.folder}/skipped.jsonl has the reasons")
        clock = outcome.clock
        if not outcome.finished:
            reason = f" ({outcome.collapse.split(':')[0]})" if outcome.collapse else ""
            show(f"Stopped at step {clock.step} of {clock.steps}{reason}; saved in {self.folder}/checkpoints/last.pt")
            show(f"Resume with:  dino train --resume {self.folder}")
            return results.verdict
        style = "bold green" if results.verdict.learned else "bold yellow"
        show(results.verdict.sentence, extra={"style": style})
        if outcome.quality:
            name, _ = _first(outcome.quality)
            best, epoch = outcome.best["value"], outcome.best["epoch"]
            best = f"best {best:.1f} % in epoch {epoch:.0f} (selected on the validation set)"
            show(f"{name} at {self.run.eval_size} px: last {_quality(outcome.quality)}, {best}")
        for label, values in outcome.evals.items():
            show(_summary(label, values))
            if below := below_initial(results.history.evaluations[label]):
                logger.warning(below)
        show(f"Report     {outcome.report}")
        exports = dict(list(EXPORTS.items())[: 2 if outcome.best else 1])
        for weights, file in exports.items():
            call = f"dino_ssl.load({str(self.folder)!r}, weights={weights!r})"
            padding = " " * (max(map(len, exports.values())) - len(file))
            show(f"{weights.capitalize()}       {self.folder}/{file}{padding}    in Python: {call}")
        return results.verdict


def _summary(name: str, values: Mapping[str, float]) -> str:
    """Return `retrieval roxford5k: mAP easy 40.1, mAP medium 30.2, ...`: the first values of an evaluation."""
    return f"{name}: {', '.join(f'{key} {value:.1f}' for key, value in list(values.items())[:MAX_LOGGED_VALUES])}"


def _quality(values: Mapping[str, float]) -> str:
    """Return the value of an online evaluation, in percent, and the effective rank if it was measured."""
    rank = f" (effective rank {values['effective rank']:.1f})" if "effective rank" in values else ""
    return f"{_first(values)[1]:.1f} %{rank}"


def _first(values: Mapping[str, float]) -> tuple[str, float]:
    return next(iter(values.items()))
