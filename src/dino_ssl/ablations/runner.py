"""One run of a study, from its Run to its results. It can stop at any time and resumes from its folder.

As a process, `python -m dino_ssl.ablations.runner JOB.json` prints its progress as JSON lines on standard output and
messages on standard error.
"""

import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dino_ssl import distributed, environment
from dino_ssl.ablations.results import FAILED, RESULT, STUDENT, Result, read_student_scores
from dino_ssl.ablations.run_lock import RunLocked, run_lock
from dino_ssl.api.resolve import find_run, resumed
from dino_ssl.api.session import run_session
from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.evals.base import PreparedEval, evaluating
from dino_ssl.evals.linear import Linear
from dino_ssl.events import Evaluated, Event, Logged, Started
from dino_ssl.files import append_jsonl, atomic_write, read_json, read_lines, write_json
from dino_ssl.methods.method import Method
from dino_ssl.models.backbone import Backbone
from dino_ssl.report.curves import read_history
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine, peak_memory, start
from dino_ssl.terminal import Terminal, command_output
from dino_ssl.training import train
from dino_ssl.training_evals import eval_context

FINAL_FRACTION = 0.05
"""Final fraction of the logged lines over which entropy and KL are averaged."""
REPORT_SECONDS = 1.0

Report = Callable[..., None]
"""Called with a state and its values: `report("training", step=3, steps=100)`."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """A run to train, and what is measured in addition to the training metrics."""

    run: Run
    learned: str
    """Digest of the settings that affect the result, to recognize identical runs."""
    data: str
    """Fingerprint of the dataset."""
    evaluate_student: bool = False
    """Evaluate the student at every evaluation."""
    metrics: tuple[str, ...] = ()
    """Metrics to measure at the end in addition to those of training: linear, throughput."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run; its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def complete(job: RunJob, rt: Runtime, terminal: Terminal, report: Report) -> Result:
    """Train the remaining steps, measure the missing metrics, and write result.json.

    Raises Stopped after a signal, RunLocked if another process is training the run, and any error of the run after it
    is written to failed.json.
    """
    folder = Path(job.run.out)
    with run_lock(folder):
        distributed.run_on_rank0(lambda: (folder / FAILED).unlink(missing_ok=True))
        try:
            _train(job, rt, terminal, report)
            result = _measure(job, rt, report)
        except Exception as error:
            if rt.is_main and not isinstance(error, Stopped):
                write_json(folder / FAILED, {"error": _message(error)})
            raise
        if rt.is_main:
            write_json(folder / RESULT, to_dict(result))
        return result


def _train(job: RunJob, rt: Runtime, terminal: Terminal, report: Report) -> None:
    folder = Path(job.run.out)
    existing = distributed.run_on_rank0(lambda: find_run(folder))
    if existing is not None and existing.finished:
        return
    run = job.run if existing is None else resumed(existing, lambda _: job.run)
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rt.device)
    dataset: ImageDataset = distributed.run_on_rank0(run.data.open)
    observer = _Observer(job, rt, report)
    outcome = run_session(run, rt, dataset, terminal, resume=existing is not None, observe=observer.on_event)
    if rt.is_main:
        append_jsonl(folder / "attempts.jsonl", {"memory": peak_memory(rt.device)})
    if not outcome.finished:
        raise Stopped(outcome.signal or signal.SIGTERM)


class _Observer:
    """Reports the progress of a training, and evaluates the student if the job requires it."""

    def __init__(self, job: RunJob, rt: Runtime, report: Report) -> None:
        self.job, self.rt, self.report = job, rt, report
        self.reported_at, self.parent = 0.0, os.getppid()
        self.student: Backbone | None = None
        self.knn: PreparedEval | None = None

    def on_event(self, event: Event) -> None:
        match event:
            case Started():
                self.start(event)
            case Logged(clock, metrics):
                if os.getppid() != self.parent:  # the parent process has died: save and exit
                    os.kill(os.getpid(), signal.SIGTERM)
                if time.monotonic() - self.reported_at > REPORT_SECONDS or clock.step == clock.steps:
                    self.reported_at = time.monotonic()
                    values = {name: metrics[name] for name in ("loss", "teacher_entropy") if name in metrics}
                    self.report("training", step=clock.step, steps=clock.steps, **values)
            case Evaluated(clock, _, values):
                self.report("evaluated", values=values)
                if self.knn is not None and self.student is not None:
                    scores = {"step": clock.step, "epoch": clock.step / clock.steps_per_epoch, **self.knn(self.student)}
                    if self.rt.is_main:
                        append_jsonl(Path(self.job.run.out) / STUDENT, scores)

    def start(self, event: Started) -> None:
        """Bind the student's evaluation, and remove scores that a resumed run will measure again."""
        if not self.job.evaluate_student or event.val_set is None:
            return
        self.student, run = student_of(event.method), self.job.run
        if self.student is None:
            return
        self.knn = run.online_eval.prepare_knn(event.train_set, event.val_set, eval_context(run, self.rt))
        path, step = Path(run.out) / STUDENT, event.clock.step
        lines = [json.dumps(score) + "\n" for score in read_student_scores(path.parent) if 0 < score["step"] <= step]
        if path.is_file():
            atomic_write(path, lambda part: part.write_text("".join(lines)))


def student_of(method: Method) -> Backbone | None:
    """Return the student's backbone; None if the method evaluates the student itself."""
    student = getattr(method.trainable, "backbone", None)
    return student if isinstance(student, Backbone) and student is not method.backbone else None


# -- results -----------------------------------------------------------------------------------------------


def _measure(job: RunJob, rt: Runtime, report: Report) -> Result:
    """Return the results of a finished run, from its curves and from its weights."""
    run, folder = job.run, Path(job.run.out)
    content = distributed.run_on_rank0(lambda: read_json(folder / RESULT))
    result = None if content is None else from_dict(Result, content)
    missing = [name for name in job.metrics if result is None or name not in result.values]
    if result is not None and not missing:
        return result
    started = next(train(run, rt, distributed.run_on_rank0(run.data.open), resume=True))  # loads the weights only
    assert isinstance(started, Started)
    values: dict[str, float] = {}
    for name in missing:
        report("measuring", metric=name)
        values |= MEASURES[name](run, rt, started)
    result = result or _result_of_training(job, started)
    return replace(result, values={**result.values, **values})


def _result_of_training(job: RunJob, started: Started) -> Result:
    run, folder, clock = job.run, Path(job.run.out), started.clock
    history, description = read_history(folder), json.loads((folder / "run.json").read_text())
    memory = max((int(attempt["memory"]) for attempt in read_lines(folder / "attempts.jsonl")), default=0)
    values = _values_from_curves(folder, run.method.num_prototypes)
    speeds = history.line("images_per_s")[1]
    return Result(
        values=values | {"hours": history.seconds / 3600, "memory": memory / 2**30},
        references=description["reference_scores"],
        images_seen=clock.steps * run.optim.batch_size,
        seconds=history.seconds,
        images_per_s=statistics.median(speeds) if speeds else 0.0,
        memory=memory,
        prototypes=run.method.num_prototypes,
        machine=machine().name,
        threads=torch.get_num_threads(),
        learned=job.learned,
        data=job.data,
        versions=description["versions"],
    )


def _values_from_curves(folder: Path, prototypes: int | None) -> dict[str, float]:
    """Return the scores of the last evaluation, and the mean loss, entropy and KL of the last logged lines."""
    history = read_history(folder)
    scores = [history.evaluations.get(name, [])[-1:] for name in ("knn", "accuracy")]
    values = {name: value for last in scores for score in last for name, value in score.items() if _is_score(name)}
    for score in read_student_scores(folder)[-1:]:
        values |= {f"student {name}": value for name, value in score.items() if _is_score(name)}
    count = max(1, round(FINAL_FRACTION * len(history.training)))
    curves = {name: history.line(name)[1][-count:] for name in ("teacher_entropy", "kl", "loss")}
    means = {name: statistics.fmean(points) for name, points in curves.items() if points}
    if prototypes and "teacher_entropy" in means:
        values["entropy"] = 100 * means.pop("teacher_entropy") / math.log(prototypes)
    return values | means


def _is_score(name: str) -> bool:
    return "NN" in name or name.startswith("top-")


def _linear(run: Run, rt: Runtime, started: Started) -> Mapping[str, float]:
    if started.val_set is None:
        return {}
    linear = Linear(size=run.online_eval.size)
    evaluate = linear.prepare((started.train_set, started.val_set), eval_context(run, rt))
    return {"linear": evaluate(started.method.backbone)["top-1"]}


def _throughput(run: Run, rt: Runtime, started: Started) -> Mapping[str, float]:
    """Return images/s of the backbone's forward pass at the size of the global views: the median of five passes."""
    backbone, count = started.method.backbone, min(128, run.optim.batch_size)
    images = torch.randn(count, 3, run.views.size, run.views.size, device=rt.device)
    seconds = []
    with evaluating(backbone), rt.autocast():
        for _ in range(6):
            began = time.perf_counter()
            backbone(images).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    return {"throughput": count / statistics.median(seconds[1:])}


MEASURES = {"linear": _linear, "throughput": _throughput}


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


# -- process -----------------------------------------------------------------------------------------------


def main(path: str) -> int:
    """Run the job described by a JSON file and print its progress; return the exit code."""
    environment.prepare()
    job = from_dict(RunJob, json.loads(Path(path).read_text()))
    with command_output(as_json=True) as (terminal, write), start(job.run.precision) as rt:

        def report(state: str, **values: Any) -> None:
            write({"state": state, **values})

        try:
            complete(job, rt, terminal, report)
        except Stopped as stopped:
            report("stopped")
            return 128 + stopped.signal
        except RunLocked:
            report("locked")
            return 0
        except Exception as error:
            traceback.print_exc()
            report("failed", error=_message(error))
            return 1
        report("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
