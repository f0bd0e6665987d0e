"""One row of a table, from its Run to its figures. It can stop anywhere, and goes on from what lies in its folder.

As a process of its own: `python -m dino_ssl.ablations.runner JOB.json` says how far it is in lines of JSON on standard output;
all that people read goes to standard error.
"""

import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino_ssl import distributed, environment
from dino_ssl.ablations.results import FAILED, RESULT, STUDENT, Result, read_students
from dino_ssl.ablations.run_lock import RunLocked, append_jsonl, run_lock
from dino_ssl.api.resolve import find_run, resumed
from dino_ssl.api.training import run_session
from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.knn import BoundKNN
from dino_ssl.evals.linear import BoundLinear, Linear
from dino_ssl.events import Evaluated, Event, Logged, Started
from dino_ssl.files import atomic_write, read_lines, write_json
from dino_ssl.methods.method import Method
from dino_ssl.models.backbone import Backbone
from dino_ssl.report.curves import read_history
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine, peak_memory, start
from dino_ssl.terminal import Terminal, command_output
from dino_ssl.training import train

LAST = 0.05
"""Part of the training over whose lines the last entropy and KL are averaged."""
TELL_SECONDS = 1.0

Tell = Callable[..., None]
"""Called with a state and its figures."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """What is to be there in the end."""

    run: Run
    learned: str
    """Digest of what decides what is learned, for others who want just the same."""
    data: str
    """Fingerprint of the pictures."""
    students: bool = False
    """Measure the student at every evaluation."""
    wanted: tuple[str, ...] = ()
    """Figures to measure at the end besides those that training gives: linear, throughput."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """Somebody asked to stop; all is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def complete(job: RunJob, rt: Runtime, terminal: Terminal, tell: Tell) -> Result:
    """Trains what is left to train, measures what is left to measure, and writes result.json.

    Raises Stopped where a signal came, Elsewhere where another process is at it, and whatever made the row fail, which
    failed.json then says.
    """
    folder = Path(job.run.out)
    with run_lock(folder, rt):
        distributed.run_on_rank0(lambda: (folder / FAILED).unlink(missing_ok=True))
        try:
            _train(job, rt, terminal, tell)
            result = _measured(job, rt, terminal, tell)
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            if rt.is_main:
                write_json(folder / FAILED, {"error": _said(error)})
            raise
        if rt.is_main:
            write_json(folder / RESULT, to_dict(result))
        return result


def _train(job: RunJob, rt: Runtime, terminal: Terminal, tell: Tell) -> None:
    folder = Path(job.run.out)
    found = distributed.run_on_rank0(lambda: find_run(folder))
    if found is not None and found.finished:
        return
    run = job.run if found is None else resumed(found, lambda _: job.run)
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rt.device)
    dataset: ImageDataset = distributed.run_on_rank0(run.data.open)
    outcome = run_session(run, rt, dataset, terminal, resume=found is not None, observe=_Observer(job, rt, tell).see)
    if rt.is_main:
        append_jsonl(folder / "attempts.jsonl", {"memory": peak_memory(rt.device)})
    if not outcome.finished:
        raise Stopped(outcome.signal or signal.SIGTERM)


class _Observer:
    """Looks on while a row trains: says how far it is, and measures the student where that is asked for."""

    def __init__(self, job: RunJob, rt: Runtime, tell: Tell) -> None:
        self.job, self.rt, self.tell = job, rt, tell
        self.said, self.parent = 0.0, os.getppid()
        self.method: Method | None = None
        self.knn: BoundKNN | None = None

    def see(self, event: Event) -> None:
        match event:
            case Started():
                self.method = event.method
                if self.job.students and event.val_set is not None and student_of(event.method) is not None:
                    self.knn = self.job.run.online_eval.bind(
                        event.train_set, event.val_set, context_of(self.job.run, self.rt)
                    )
                    _keep(Path(self.job.run.out) / STUDENT, event.clock.step)
            case Logged(clock, metrics):
                if os.getppid() != self.parent:  # whoever started this is gone: save and leave
                    os.kill(os.getpid(), signal.SIGTERM)
                if time.monotonic() - self.said > TELL_SECONDS or clock.step == clock.steps:
                    self.said = time.monotonic()
                    shown = {name: metrics[name] for name in ("loss", "teacher_entropy") if name in metrics}
                    self.tell("training", step=clock.step, steps=clock.steps, **shown)
            case Evaluated(clock, _, values):
                self.tell("evaluated", values=values)
                if self.knn is not None and self.method is not None:
                    student = student_of(self.method)
                    assert student is not None
                    row = {"step": clock.step, "epoch": clock.step / clock.steps_per_epoch, **self.knn(student)}
                    if self.rt.is_main:
                        append_jsonl(Path(self.job.run.out) / STUDENT, row)


def student_of(method: Method) -> Backbone | None:
    """The backbone that the optimizer moves, where it is another than the one that is evaluated."""
    student = getattr(method.trainable, "backbone", None)
    return student if isinstance(student, Backbone) and student is not method.backbone else None


def context_of(run: Run, rt: Runtime) -> EvalContext:
    return EvalContext(
        device=rt.device,
        workers=run.workers,
        batch_size=run.online_eval.batch_size,
        size=run.online_eval.size or run.views.size,
        autocast=rt.autocast,
    )


# -- figures -----------------------------------------------------------------------------------------------


def _measured(job: RunJob, rt: Runtime, terminal: Terminal, tell: Tell) -> Result:
    """The figures of a finished run: from its curves, and from its weights where something is wanted of them."""
    run, folder = job.run, Path(job.run.out)
    old = distributed.run_on_rank0(
        lambda: json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else None
    )
    values = dict(from_dict(Result, old).values) if old else {}
    missing = [name for name in job.wanted if name not in values]
    if missing or old is None:
        started = next(train(run, rt, distributed.run_on_rank0(run.data.open), resume=True))  # and not a step further
        assert isinstance(started, Started)
        for name in missing:
            tell("measuring", what=name)
            values |= MEASURES[name](run, rt, terminal, started)
    else:
        return from_dict(Result, old)
    if old:
        return from_dict(Result, {**old, "values": values})
    clock, prototypes = started.clock, run.method.num_prototypes
    history, described = read_history(folder), json.loads((folder / "run.json").read_text())
    memory = max((int(row["memory"]) for row in read_lines(folder / "attempts.jsonl")), default=0)
    values = _from_curves(folder, prototypes) | values
    values |= {"hours": history.seconds / 3600, "memory": memory / 2**30}
    speeds = history.line("images_per_s")[1]
    return Result(
        values=values,
        references=described.get("reference_scores", {}),
        epochs=clock.epochs,
        dataset=clock.steps * run.optim.batch_size,
        seconds=history.seconds,
        images_per_s=statistics.median(speeds) if speeds else 0.0,
        memory=memory,
        prototypes=prototypes,
        machine=machine().name,
        threads=torch.get_num_threads(),
        learned=job.learned,
        data=job.data,
        versions=described["versions"],
    )


def _from_curves(folder: Path, prototypes: int | None) -> dict[str, float]:
    """The last evaluation, and entropy and KL at the end."""
    history, values = read_history(folder), {}
    for rows in (history.evaluations.get("knn", []), history.evaluations.get("accuracy", [])):
        values |= {name: value for name, value in (rows[-1] if rows else {}).items() if _is_figure(name)}
    students = read_students(folder)
    values |= {
        f"student {name}": value for name, value in (students[-1] if students else {}).items() if _is_figure(name)
    }
    count = max(1, round(LAST * len(history.training)))
    ends = {name: history.line(name)[1][-count:] for name in ("teacher_entropy", "kl", "loss")}
    ends = {name: statistics.fmean(found) for name, found in ends.items() if found}
    if prototypes and "teacher_entropy" in ends:
        values["entropy"] = 100 * ends.pop("teacher_entropy") / float(torch.tensor(float(prototypes)).log())
    return values | ends


def _is_figure(name: str) -> bool:
    return "NN" in name or name.startswith("top-")


def _linear(run: Run, rt: Runtime, terminal: Terminal, started: Started) -> Mapping[str, float]:
    if started.val_set is None:
        return {}
    context = context_of(run, rt)
    return {
        "linear": BoundLinear(Linear(), started.train_set, started.val_set, context)(started.method.backbone)["top-1"]
    }


def _throughput(run: Run, rt: Runtime, terminal: Terminal, started: Started) -> Mapping[str, float]:
    """Images per second through the frozen network, at the size of the global views: the median of five passes."""
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


def _keep(path: Path, step: int) -> None:
    """Takes away what a resumed run will measure again."""
    rows = [row for row in read_students(path.parent) if row["step"] <= step and step]
    if path.is_file():
        atomic_write(path, lambda aside: aside.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


# -- a process of its own ----------------------------------------------------------------------------------


def main(path: str) -> int:
    environment.prepare()
    job = from_dict(RunJob, json.loads(Path(path).read_text()))
    with command_output(as_json=True) as (terminal, give), start(job.run.precision) as rt:

        def tell(state: str, **figures: Any) -> None:
            give({"state": state, **figures})

        try:
            complete(job, rt, terminal, tell)
        except Stopped as stopped:
            tell("stopped")
            return 128 + stopped.signal
        except RunLocked:
            tell("elsewhere")
            return 0
        except Exception as error:
            traceback.print_exc()
            tell("failed", error=_said(error))
            return 1
        tell("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
