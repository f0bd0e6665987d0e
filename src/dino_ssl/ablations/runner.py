"""Train the runs of a study: several at a time, each in its own process, or one after another under torchrun.

A run can stop at any time and resumes from its folder. Its process, `python -m dino_ssl.ablations.runner STUDY
CONFIGURATION SEED LINEAR`, writes messages to log.txt, and result.json or failed.json.
"""

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.markup import escape
from rich.progress import Progress

from dino_ssl import distributed, environment
from dino_ssl.ablations.study import EVALS, FAILED, FORMAT, RESULT, Result, StudyRun, read_study
from dino_ssl.ablations.table import CURVES
from dino_ssl.api.resolve import ExistingRun, find_run, resumed
from dino_ssl.api.session import run_session
from dino_ssl.config import to_dict
from dino_ssl.errors import UserError
from dino_ssl.evals.base import evaluating
from dino_ssl.evals.linear import Linear
from dino_ssl.events import Evaluated, Event, Logged, Started
from dino_ssl.files import append_jsonl, read_json, write_json
from dino_ssl.metrics import METRICS
from dino_ssl.report.curves import read_history, thin
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine, peak_memory, start
from dino_ssl.signals import StopSignal
from dino_ssl.terminal import Terminal, logger
from dino_ssl.training import train
from dino_ssl.training_evals import eval_context

LOCKED = os.EX_TEMPFAIL
"""Exit code of the process of a run that another process trains."""
POLL_SECONDS = 0.5
FINAL_FRACTION = 0.05
"""Final fraction of the logged lines over which entropy and KL are averaged."""
CURVE_POINTS = 60
"""Of each curve in result.json."""


def run_parallel(runs: Sequence[StudyRun], linear: bool, processes: int, terminal: Terminal) -> tuple[int | None, int]:
    """Complete each run in its own process; return the signal that stopped them, if any, and the number of failures."""
    bars = Progress(console=terminal.console, transient=True, disable=not terminal.is_tty)
    threads = str(max(1, machine().cores // processes))

    def complete_in_process(run: StudyRun) -> str:
        """Start the process and wait for it; after a signal, let it save its state and exit."""
        if stop.number is not None:
            return "not run"
        logger.info(f"{run.label}: starting; messages in {run.folder}/log.txt")
        bar, is_stopping = bars.add_task(escape(run.label), total=run.run.optim.epochs), False
        process = _start(run, linear, {"OMP_NUM_THREADS": threads, **os.environ})
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            bars.update(bar, completed=_epoch(run.folder))
            if stop.number is not None and not is_stopping:
                is_stopping = True
                process.terminate()
        bars.remove_task(bar)
        state = final_state(run, process.returncode, is_stopping)
        error = f": {run.error}" if state == "failed" else ""
        logger.info(f"{run.label}: {state}{error}", extra={"style": "green" if state == "done" else "yellow"})
        return state

    with StopSignal() as stop, bars, ThreadPoolExecutor(processes) as pool:
        states = list(pool.map(complete_in_process, runs))
    return stop.number, states.count("failed")


def _start(run: StudyRun, linear: bool, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, run.study.folder, run.configuration.name, str(run.seed), str(linear)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,  # Ctrl-C reaches only this process, which forwards it once
        )


def _epoch(folder: Path) -> float:
    """Return the epoch of the last complete line of metrics.jsonl."""
    with suppress(OSError, ValueError, LookupError), (folder / METRICS).open() as file:
        return json.loads(deque(file, maxlen=2)[0])["epoch"]
    return 0.0


def final_state(run: StudyRun, code: int, is_stopping: bool) -> str:
    """Return the state of a run whose process has ended; if it could not write its error, write failed.json."""
    if code == 0:
        return "done"
    if code == LOCKED:
        return "being trained by another process"
    if is_stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "stopped"
    if not run.error:
        reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            reason = "was killed, probably because memory was full"
        error = f"the process {reason}; its messages are in {run.folder}/log.txt"
        write_json(run.folder / FAILED, {"format": FORMAT, "error": error})
    return "failed"


def run_serial(runs: Sequence[StudyRun], linear: bool, terminal: Terminal) -> tuple[int | None, int]:
    """Complete one run after another on all ranks; return the signal that stopped them and the number of failures."""
    num_failed = 0
    for run in runs:
        logger.info(run.label, extra={"style": "bold"})
        try:
            with start(run.run.precision) as rt:
                stopped = complete(run, linear, rt, terminal)
            if stopped is not None:
                return stopped, num_failed
        except UserError as error:
            num_failed += 1
            logger.error(f"failed: {error}")
    return None, num_failed


def main(study_folder: str, name: str, seed: str, linear: str) -> int:
    """Complete one run as a process; return its exit code: 0, 128 + N after signal N, or LOCKED."""
    environment.prepare()
    study = read_study(Path(study_folder))
    assert study is not None
    run = StudyRun(study, study.table.select([name])[0], int(seed))
    terminal = Terminal()
    try:
        with terminal.show_log(), start(run.run.precision) as rt:
            stopped = complete(run, linear == "True", rt, terminal)
    except RunLocked:
        return LOCKED
    return 0 if stopped is None else 128 + stopped


class RunLocked(UserError):  # noqa: N818 - named by the state
    """Another process trains the run."""


def complete(run: StudyRun, linear: bool, rt: Runtime, terminal: Terminal) -> int | None:
    """Train the remaining steps, measure the missing metrics, and write result.json.

    Returns the signal that stopped it, or None. An error of the run is written to failed.json. Raises RunLocked if
    another process trains the run.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / ".lock").open("w") as lock:
        distributed.run_on_rank0(lambda: _acquire(lock, run))
        (run.folder / FAILED).unlink(missing_ok=True)
        try:
            if (stopped := _train(run, rt, terminal)) is None:
                _measure(run, linear, rt)
        except Exception as error:
            if rt.is_main:
                message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                write_json(run.folder / FAILED, {"format": FORMAT, "error": message})
            raise
    return stopped


def _acquire(lock: TextIO, run: StudyRun) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunLocked(f"{run.folder} is being trained by another process.") from error


def _train(study_run: StudyRun, rt: Runtime, terminal: Terminal) -> int | None:
    """Train the remaining steps and write the results of training; return the signal that stopped it, or None."""
    run, path = study_run.run, study_run.folder / RESULT
    existing = distributed.run_on_rank0(lambda: _find_existing(study_run))
    if existing is None or not existing.finished:
        run = run if existing is None else resumed(existing, lambda _: run)
        if rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(rt.device)
        dataset, observe = distributed.run_on_rank0(run.data.open), _observer(study_run, rt)
        outcome = run_session(run, rt, dataset, terminal, resume=existing is not None, observe=observe)
        if not outcome.finished:
            return outcome.signal or signal.SIGTERM
    if rt.is_main and not path.is_file():
        write_json(path, to_dict(_result_of_training(study_run, rt)))
    return None


def _find_existing(study_run: StudyRun) -> ExistingRun | None:
    """Return the run in the folder; None if there is none. Raises UserError for a result without its run."""
    existing = find_run(study_run.folder)
    if existing is None and study_run.result is not None:
        raise UserError(
            f"{study_run.folder} has a result but not the weights that further metrics need. Copy the whole folder of "
            "the run, or remove it to train again."
        )
    return existing


def _observer(study_run: StudyRun, rt: Runtime) -> Callable[[Event], None]:
    """Return a function that evaluates the student if the table has it, and stops if the parent process has died."""
    parent, run, metrics = os.getppid(), study_run.run, study_run.study.table.metrics
    evaluate: Callable[[], Mapping[str, float]] | None = None

    def observe(event: Event) -> None:
        nonlocal evaluate
        match event:
            case Started() if "student 20-NN" in metrics and event.val_set and event.train_set.classes:
                student: Any = event.method.trainable
                knn = run.online_eval.prepare_knn(event.train_set, event.val_set, eval_context(run, rt))
                evaluate = partial(knn, student.backbone)
            case Logged() if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)  # saves and exits
            case Evaluated(clock) if evaluate is not None:
                row = {"step": clock.step, "epoch": clock.step / clock.steps_per_epoch, "eval": "student", **evaluate()}
                if rt.is_main:
                    append_jsonl(study_run.folder / METRICS, row)

    return observe


def _result_of_training(study_run: StudyRun, rt: Runtime) -> Result:
    """Return the last evaluation, the mean loss, entropy and KL of the last logged lines, the curves, and the cost."""
    history, description = read_history(study_run.folder), read_json(study_run.folder / "run.json")
    values = {
        "hours": history.seconds / 3600,
        "memory": peak_memory(rt.device) / 2**30,
        "images": history.training[-1]["step"] * study_run.run.optim.batch_size,
        "images/s": statistics.median(history.line("images_per_s")[1] or [0]),
    }
    curves = {}
    for name in CURVES:
        epochs, points = study_run.line(name)
        if points:
            count = 1 if name in EVALS else max(1, round(FINAL_FRACTION * len(points)))
            values[name] = statistics.fmean(points[-count:])
            curves[name] = [[float(f"{x:.5g}") for x in line] for line in thin(epochs, points, CURVE_POINTS)]
    return Result(
        values=values,
        references=description["reference_scores"],
        curves=curves,
        machine=f"{machine().name}, threads per run: {torch.get_num_threads()}",
        versions=description["versions"],
        date=date.today().isoformat(),
    )


def missing_metrics(run: StudyRun, linear: bool) -> list[str]:
    """Return the metrics that are measured after training and are not in the result yet."""
    metrics = {*run.study.table.metrics} - {"linear"} | ({"linear"} if linear and run.study.data["classes"] else set())
    return sorted(metrics & MEASURES.keys() - (run.result.values.keys() if run.result else set()))


def _measure(study_run: StudyRun, linear: bool, rt: Runtime) -> None:
    """Add the missing metrics to the result of a finished run."""
    run, result = study_run.run, distributed.run_on_rank0(lambda: study_run.result)
    missing = distributed.run_on_rank0(lambda: missing_metrics(study_run, linear))
    if not missing:
        return
    started = next(train(run, rt, distributed.run_on_rank0(run.data.open), resume=True))  # loads the weights only
    assert isinstance(started, Started)
    assert result is not None
    values = {name: MEASURES[name](run, rt, started) for name in missing}
    if rt.is_main:
        write_json(study_run.folder / RESULT, to_dict(replace(result, values={**result.values, **values})))


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

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
