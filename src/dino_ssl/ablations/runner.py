"""One run of a study, from its Run to its results. It can stop at any time and resumes from its folder.

As a process: `python -m dino_ssl.ablations.runner JOB.json`. Exit code: 0 if all results are measured, 128 + N after
signal N, LOCKED if another process trains the run, 1 after an error.
"""

import fcntl
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dino_ssl import distributed, environment
from dino_ssl.ablations.results import EVALS, FAILED, RESULT, Result
from dino_ssl.api.resolve import find_run, resumed
from dino_ssl.api.session import run_session
from dino_ssl.config import from_dict, to_dict
from dino_ssl.errors import UserError
from dino_ssl.evals.base import evaluating
from dino_ssl.evals.linear import Linear
from dino_ssl.events import Evaluated, Event, Logged, Started
from dino_ssl.files import append_jsonl, read_json, write_json
from dino_ssl.metrics import METRICS
from dino_ssl.models.backbone import Backbone
from dino_ssl.report.curves import read_history
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine, peak_memory, start
from dino_ssl.terminal import Terminal
from dino_ssl.training import train
from dino_ssl.training_evals import eval_context

LOCKED = 75
"""Exit code EX_TEMPFAIL of sysexits.h."""
FINAL_FRACTION = 0.05
"""Final fraction of the logged lines over which entropy and KL are averaged."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """A run to train, and what is measured in addition to the training metrics."""

    run: Run
    evaluate_student: bool = False
    """Evaluate the student at every evaluation."""
    metrics: tuple[str, ...] = ()
    """Metrics to measure at the end: names of MEASURES."""


class RunLocked(UserError):  # noqa: N818 - not an error
    """Another process trains this run."""


def complete(job: RunJob, rt: Runtime, terminal: Terminal) -> int | None:
    """Train the remaining steps, measure the missing metrics, and write result.json.

    Returns the signal that stopped it, or None. Raises RunLocked if another process is training the run, and any error
    of the run after it is written to failed.json.
    """
    folder = Path(job.run.out)
    with ExitStack() as stack:
        distributed.run_on_rank0(lambda: _lock(folder, stack))
        try:
            stopped = _train(job, rt, terminal)
            if stopped is None:
                _measure(job, rt)
        except Exception as error:
            if rt.is_main:
                message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                write_json(folder / FAILED, {"error": message})
            raise
    return stopped


def _lock(folder: Path, stack: ExitStack) -> None:
    """Hold the lock of a run until the stack is closed, and remove the error of an earlier attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((folder / ".lock").open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunLocked(f"{folder} is being trained by another process.") from error
    (folder / FAILED).unlink(missing_ok=True)


def _train(job: RunJob, rt: Runtime, terminal: Terminal) -> int | None:
    """Train the remaining steps and write the results of training; return the signal that stopped it, or None."""
    folder = Path(job.run.out)
    existing = distributed.run_on_rank0(lambda: find_run(folder))
    if existing is None or not existing.finished:
        run = job.run if existing is None else resumed(existing, lambda _: job.run)
        if rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(rt.device)
        dataset = distributed.run_on_rank0(run.data.open)
        observer = _Observer(job, rt)
        outcome = run_session(run, rt, dataset, terminal, resume=existing is not None, observe=observer)
        if not outcome.finished:
            return outcome.signal or signal.SIGTERM
    if rt.is_main and not (folder / RESULT).is_file():
        write_json(folder / RESULT, to_dict(_result_of_training(job.run, rt)))
    return None


class _Observer:
    """Evaluates the student if the job requires it, and stops if the parent process has died."""

    def __init__(self, job: RunJob, rt: Runtime) -> None:
        self.job, self.rt, self.parent = job, rt, os.getppid()
        self.evaluate_student: Callable[[], Mapping[str, float]] | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.start(event)
            case Logged() if os.getppid() != self.parent:
                os.kill(os.getpid(), signal.SIGTERM)  # saves and exits
            case Evaluated(clock) if self.evaluate_student is not None:
                scores = self.evaluate_student()
                if self.rt.is_main:
                    row = {"step": clock.step, "epoch": clock.step / clock.steps_per_epoch, "eval": "student", **scores}
                    append_jsonl(Path(self.job.run.out) / METRICS, row)

    def start(self, event: Started) -> None:
        run, student = self.job.run, getattr(event.method.trainable, "backbone", None)
        if not self.job.evaluate_student or event.val_set is None or not isinstance(student, Backbone):
            return
        knn = run.online_eval.prepare_knn(event.train_set, event.val_set, eval_context(run, self.rt))
        self.evaluate_student = lambda: knn(student)


# -- results -----------------------------------------------------------------------------------------------


def _measure(job: RunJob, rt: Runtime) -> None:
    """Measure the metrics of the job that a finished run lacks, and add them to result.json."""
    run, path = job.run, Path(job.run.out) / RESULT
    result: Result = from_dict(Result, distributed.run_on_rank0(lambda: read_json(path)))
    missing = [name for name in job.metrics if name not in result.values]
    if not missing:
        return
    started = next(train(run, rt, distributed.run_on_rank0(run.data.open), resume=True))  # loads the weights only
    assert isinstance(started, Started)
    values = {name: MEASURES[name](run, rt, started) for name in missing}
    if rt.is_main:
        write_json(path, to_dict(replace(result, values={**result.values, **values})))


def _result_of_training(run: Run, rt: Runtime) -> Result:
    """Return the last evaluation, the mean loss, entropy and KL of the last logged lines, and the cost."""
    folder = Path(run.out)
    history, description = read_history(folder), json.loads((folder / "run.json").read_text())
    evals = {metric: history.evaluations[name][-1] for metric, name in EVALS.items() if name in history.evaluations}
    values = {metric: scores["20-NN"] for metric, scores in evals.items() if "20-NN" in scores}
    count = max(1, round(FINAL_FRACTION * len(history.training)))
    curves = {name: history.line(name)[1][-count:] for name in ("teacher_entropy", "kl", "loss")}
    values |= {name: statistics.fmean(points) for name, points in curves.items() if points}
    if "teacher_entropy" in values and run.method.num_prototypes:
        values["entropy"] = 100 * values.pop("teacher_entropy") / math.log(run.method.num_prototypes)
    speeds = history.line("images_per_s")[1]
    return Result(
        values=values | {"hours": history.seconds / 3600, "memory": peak_memory(rt.device) / 2**30},
        references=description["reference_scores"],
        images_seen=history.training[-1]["step"] * run.optim.batch_size,
        images_per_s=statistics.median(speeds) if speeds else 0.0,
        machine=f"{machine().name}, threads per run: {torch.get_num_threads()}",
        versions=description["versions"],
    )


def _linear(run: Run, rt: Runtime, started: Started) -> float:
    """Return the top-1 accuracy of a linear classifier, in percent."""
    if started.val_set is None:
        raise UserError("`linear` needs a labeled validation set.")
    linear = Linear(size=run.online_eval.size)
    evaluate = linear.prepare((started.train_set, started.val_set), eval_context(run, rt))
    return evaluate(started.method.backbone)["top-1"]


def _throughput(run: Run, rt: Runtime, started: Started) -> float:
    """Return images/s of the backbone's forward pass at the size of the global views: the median of five passes."""
    backbone, count = started.method.backbone, min(128, run.optim.batch_size)
    images = torch.randn(count, 3, run.views.size, run.views.size, device=rt.device)
    seconds = []
    with evaluating(backbone), rt.autocast():
        for _ in range(6):
            began = time.perf_counter()
            backbone(images).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    return count / statistics.median(seconds[1:])


MEASURES = {"linear": _linear, "throughput": _throughput}


def main(path: str) -> int:
    """Run the job described by a JSON file; return the exit code."""
    environment.prepare()
    job: RunJob = from_dict(RunJob, json.loads(Path(path).read_text()))
    with start(job.run.precision) as rt:
        try:
            stopped = complete(job, rt, Terminal())
        except RunLocked:
            return LOCKED
    return 0 if stopped is None else 128 + stopped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
