"""A study: the base Run of a table is fixed once for a dataset and a machine, then its runs are trained one by one."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dino_ssl import distributed
from dino_ssl.ablations.bases import IMAGES_SEEN, scale_length
from dino_ssl.ablations.job_pool import Task
from dino_ssl.ablations.results import RESULT, ROOT, SAME, STUDENT, Study, StudyRun, read_study
from dino_ssl.ablations.runner import RunJob
from dino_ssl.ablations.table import Scale, Table
from dino_ssl.config import differences, edit, flatten, format_value, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.files import write_json
from dino_ssl.presets.plan import measure, num_train_images
from dino_ssl.run import EXECUTION_FIELDS, Run, read_run
from dino_ssl.runtime import machine, machine_memory


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Settings of the user; None if the table or an existing study decides."""

    data: Folder | Scenes | None = None
    val: Folder | Scenes | None = None
    preset: Run | None = None
    """Base Run instead of the table's own."""
    epochs: int | None = None
    minutes: float | None = None
    """Time per run."""
    workers: int | None = None
    processes: int = 1
    """Runs at the same time."""


def resolve_study(table: Table, scale: Scale, options: StudyOptions, root: Path = ROOT) -> Study:
    """Return the existing study of a table, or a new one. Call it on all ranks.

    Raises UserError if a new study has no dataset, or if an existing one has another dataset or other settings.
    """
    folder = root / table.name / scale
    existing = read_study(folder)
    base = options.preset or (existing.base if existing is not None else table.base(scale))
    if options.data is not None:
        base = edit(base, data=options.data)
    elif existing is None and options.preset is None:
        raise UserError(
            f"{table.name} was not run yet and needs a dataset: set `data` to a folder with one folder per class, or "
            "to scenes or simple-scenes (synthetic images). `val` sets the validation set."
        )
    if options.val is not None:
        base = edit(base, val=options.val)
    with _torch_threads(threads_per_run(options.processes)):
        dataset = base.data.open()
        base = _for_machine(base, options, dataset)
        base = _with_length(base, options, dataset, scale, existing)
        base = distributed.run_on_rank0(lambda: base)  # each rank has measured its own speed
    data = {
        "images": len(dataset),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
        "val_fraction": base.online_eval.val_fraction if base.val is None else 0,
    }
    study = Study(folder, table, scale, base, data, options.minutes or (existing.minutes if existing else None))
    if existing is not None:
        _check_same(existing, study)
    return study


def preview_study(table: Table, scale: Scale, root: Path = ROOT) -> Study:
    """Return the study of a table's own base without a dataset, to print its configurations."""
    data = {"images": 0, "classes": 0, "fingerprint": "", "val_fraction": 0}
    return Study(root / table.name / scale, table, scale, table.base(scale), data)


def _for_machine(base: Run, options: StudyOptions, dataset: ImageDataset) -> Run:
    """Set precision, workers and cache. A run that collapses is trained to its end: the collapse is its result."""
    precision = base.precision if base.precision == "float32" else machine().precision
    cache = options.processes * dataset.nbytes < machine_memory() / 4  # each process has its own
    workers = base.workers if options.workers is None else options.workers
    return edit(base, precision=precision, cache=cache, workers=workers, on_collapse="warn")


def _with_length(base: Run, options: StudyOptions, dataset: ImageDataset, scale: Scale, existing: Study | None) -> Run:
    """Set the number of epochs: of the options, of the existing study, or of the scale."""
    num_images = num_train_images(base, dataset)
    if options.epochs is not None:
        return scale_length(base, options.epochs)
    if options.minutes is not None and (existing is None or existing.minutes != options.minutes):
        speed = measure(base, machine(), dataset)
        seconds = speed.seconds(base, machine(), num_images) / distributed.world_size()
        return scale_length(base, max(1, round(60 * options.minutes / seconds)))
    if existing is not None:
        optim = existing.base.optim
        run = edit(base, optim=dict(epochs=optim.epochs, warmup_epochs=optim.warmup_epochs))
        return edit(run, online_eval=dict(every_epochs=existing.base.online_eval.every_epochs))
    if scale == "small" and options.preset is None:
        return scale_length(base, max(1, round(IMAGES_SEEN / num_images)))
    return base


def _check_same(existing: Study, study: Study) -> None:
    """Raise UserError if dataset or settings differ: the runs of one study must be comparable."""
    if existing.data["fingerprint"] != study.data["fingerprint"]:
        raise UserError(
            f"{existing.folder} has runs on another dataset: {existing.data['images']:,} images there, "
            f"{study.data['images']:,} now. Set `data` to the same dataset, or `out` to a different folder."
        )
    changed = _mismatch(existing.base, study.base, EXECUTION_FIELDS)
    if changed:
        raise UserError(
            f"{existing.folder} has runs with other settings:\n{changed}\n"
            "Remove these settings to resume the study, or set `out` to a different folder."
        )


def _mismatch(saved: Run, run: Run, ignored: Sequence[str]) -> str:
    """Return a line for each setting that differs."""
    return "\n".join(
        f"  `{name}` is {format_value(old)} there, got {format_value(new)}"
        for name, old, new in differences(saved, run)
        if name not in ignored
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Use this number of threads, to measure with as many as a run will have."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_per_run(processes: int) -> int:
    """Return the threads of each of `processes` simultaneous runs; OMP_NUM_THREADS overrides it."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else max(1, machine().cores // processes)


# -- runs --------------------------------------------------------------------------------------------------

NOT_LEARNED = {*EXECUTION_FIELDS, "online_eval.every_epochs"}
"""Fields that affect neither the learned weights nor their evaluation at the end."""


def make_job(study: Study, study_run: StudyRun, *, linear: bool = False) -> RunJob:
    """Return the job of a run. Raise UserError if its folder has a run with other settings."""
    run = study.table.run(study_run.configuration, study.scale, study.base)
    run = edit(run, seed=study.base.seed + study_run.seed, out=str(study_run.run_dir))
    if (study_run.run_dir / "run.json").is_file():
        changed = _mismatch(read_run(study_run.run_dir), run, tuple(NOT_LEARNED))
        if changed:
            raise UserError(
                f"{study_run.folder} has a run with other settings:\n{changed}\n"
                "Move that folder away to train again, or set `out` to a different folder."
            )
    linear = linear and study.data["classes"] > 0
    return RunJob(
        run=run,
        learned=settings_digest(run),
        data=str(study.data["fingerprint"]),
        evaluate_student=study.table.evaluate_student,
        metrics=(*(["linear"] if linear else []), *({"throughput"} & {*study.table.metrics})),
    )


def settings_digest(run: Run) -> str:
    """Return a digest of all settings that affect the learned weights and their evaluation at the end."""
    ignored = NOT_LEARNED - {"precision"}
    settings = {name: value for name, value in flatten(run).items() if name not in ignored} | {"type": "Run"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def reuse_result(study: Study, study_run: StudyRun, job: RunJob, root: Path = ROOT) -> bool:
    """Link to an identical finished run of another table; return False if there is none."""
    if study_run.state != "not run":
        return study_run.is_shared
    for path in sorted(root.glob(f"*/{study.scale}/*/seed*/{RESULT}")):
        other = StudyRun(study_run.configuration, study_run.seed, path.parent)
        result = other.result
        if result is None or (result.learned, result.data) != (job.learned, job.data):
            continue
        if job.evaluate_student and not (other.folder / STUDENT).is_file():
            continue
        relative = os.path.relpath(other.folder.resolve(), study_run.folder.resolve())
        write_json(study_run.folder / SAME, {"folder": relative})
        return True
    return False


def is_incomplete(study_run: StudyRun, job: RunJob) -> bool:
    """Return True if the run has not finished, or if a metric of the job was not measured."""
    result = study_run.result
    return result is None or any(name not in result.values for name in job.metrics)


def make_task(study_run: StudyRun, job: RunJob) -> Task:
    """Return the command that trains the run in its own process."""
    path = write_json(study_run.folder / "job.json", to_dict(job))
    name = study_run.configuration.name
    name = f"{name} seed {study_run.seed}" if study_run.seed else name
    return Task(name, [sys.executable, "-m", "dino_ssl.ablations.runner", str(path)], study_run.folder / "log.txt")


def select_runs(study: Study, names: Sequence[str], seeds: int) -> list[StudyRun]:
    """Return the runs of the named configurations, ordered by seed: each seed completes the table once."""
    return [study.study_run(item, seed) for seed in range(seeds) for item in study.table.select(names)]
