"""A table as a person runs it: the base that its rows are edits of is settled once, then rows are run and kept."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dino_ssl import distributed
from dino_ssl.ablations.bases import SEEN, length
from dino_ssl.ablations.job_pool import Task
from dino_ssl.ablations.results import INCIDENTAL, RESULT, ROOT, SAME, STUDENT, Cell, Study, read_study
from dino_ssl.ablations.runner import RunJob
from dino_ssl.ablations.table import LINEAR, SPEED, Scale, Table
from dino_ssl.api.resolve import flag, format_value
from dino_ssl.config import differences, edit, flatten, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.files import write_json
from dino_ssl.presets.plan import measure
from dino_ssl.run import Run, read_run
from dino_ssl.runtime import Machine, machine, machine_memory


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a person set; None where the table, or what lies there already, decides."""

    data: Folder | Scenes | None = None
    val: Folder | Scenes | None = None
    preset: Run | None = None
    """Another base than the table's."""
    epochs: int | None = None
    minutes: float | None = None
    """For a row."""
    workers: int | None = None
    processes: int = 1


def resolve_study(table: Table, scale: Scale, asked: StudyOptions, root: Path = ROOT) -> Study:
    """The study that the command is about: the one that lies there, or a new one. All ranks take part.

    Raises UserError where no pictures are named, or where what lies there is of other pictures or settings.
    """
    folder = root / table.name / scale
    there = read_study(folder)
    base = asked.preset or (there.base if there is not None else table.base(scale))
    base = _with_data(base, asked, known=there is not None or asked.preset is not None, table=table)
    with _threads(asked.processes):
        dataset = base.data.open()
        here = machine()
        base = _for_machine(base, asked, dataset, here)
        own = _of_length(base, asked, dataset, here, scale, there)
        base = distributed.run_on_rank0(lambda: own)  # the ranks measure together, and the first one's length holds
    data = {
        "images": len(dataset),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
        "val_fraction": base.online_eval.val_fraction if base.val is None else 0,
    }
    study = Study(folder, table, scale, base, data, asked.minutes or (there.minutes if there else None))
    if there is not None:
        _must_agree(there, study)
    return study


def unsettled(table: Table, scale: Scale, root: Path = ROOT) -> Study:
    """The table by its own base, where no pictures are known yet: to be looked at."""
    data = {"images": 0, "classes": 0, "fingerprint": "", "val_fraction": 0}
    return Study(root / table.name / scale, table, scale, table.base(scale), data)


def _with_data(base: Run, asked: StudyOptions, *, known: bool, table: Table) -> Run:
    drawn = asked.preset is not None and isinstance(asked.preset.data, Scenes) and isinstance(asked.data, Scenes)
    if asked.data is not None and not drawn:  # a recipe for drawn pictures has its own
        base = edit(base, data=asked.data)
    elif asked.data is None and not known:
        raise UserError(
            f"Which pictures? Expected a folder of class folders: dino ablate {table.name} --data photos/\n"
            "--data scenes or herds takes pictures that dino draws itself; --val FOLDER are those that are asked about."
        )
    return base if asked.val is None else edit(base, val=asked.val)


def _for_machine(base: Run, asked: StudyOptions, dataset: ImageDataset, here: Machine) -> Run:
    """Precision, workers, and whether the decoded pictures stay in memory, once for each process. A row that collapses
    goes on to its end: that is its result."""
    precision = base.precision if base.precision == "float32" else here.precision
    fits = asked.processes * dataset.nbytes < machine_memory() / 4
    workers = base.workers if asked.workers is None else asked.workers
    return edit(base, precision=precision, cache=fits, workers=workers, on_collapse="warn")


def _of_length(
    base: Run, asked: StudyOptions, dataset: ImageDataset, here: Machine, scale: Scale, there: Study | None
) -> Run:
    """As many epochs as was asked for, or as there were, or as the scale says."""
    if asked.epochs is not None:
        return length(base, asked.epochs)
    if asked.minutes is not None and (there is None or there.minutes != asked.minutes):
        speed = measure(base, here, dataset)
        seconds = speed.seconds(base, here, _trained(base, dataset)) / distributed.world_size()
        return length(base, max(1, round(60 * asked.minutes / seconds)))
    if there is not None:
        optim = there.base.optim
        run = edit(base, optim=dict(epochs=optim.epochs, warmup_epochs=optim.warmup_epochs))
        return edit(run, online_eval=dict(every_epochs=there.base.online_eval.every_epochs))
    if scale == "small" and asked.preset is None:
        return length(base, max(1, round(SEEN / _trained(base, dataset))))
    return base


def _trained(base: Run, dataset: ImageDataset) -> int:
    held = base.online_eval.val_fraction if base.val is None and dataset.labels is not None else 0
    return max(1, round((1 - held) * len(dataset)))


def _must_agree(there: Study, now: Study) -> None:
    """Rows that stand side by side must have learned from the same pictures, by the same settings."""
    elsewhere = "Leave them away to go on there, or put this table elsewhere with --out."
    if there.data.get("fingerprint") != now.data["fingerprint"]:
        raise UserError(
            f"{there.folder} holds rows of other pictures: {there.data.get('images'):,} there, "
            f"{now.data['images']:,} here. Give the same --data to go on, or put this table elsewhere with --out."
        )
    changed = [item for item in differences(there.base, now.base) if item[0] not in INCIDENTAL or item[0] == "seed"]
    if changed:
        listed = "\n".join(
            f"  {flag(name)} is {format_value(old)} there, got {format_value(new)}" for name, old, new in changed
        )
        raise UserError(f"{there.folder} holds rows of other settings:\n{listed}\n{elsewhere}")


class _threads:  # noqa: N801 - a context, used once
    """Measures with as many threads as a row will have."""

    def __init__(self, processes: int) -> None:
        self.threads = threads_of(processes)

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def threads_of(processes: int) -> int:
    """Threads of one row where so many run at once."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else max(1, machine().cores // processes)


# -- rows --------------------------------------------------------------------------------------------------


def run_of(study: Study, cell: Cell) -> Run:
    """The Run of a cell. Raises UserError where its folder holds a run of other settings."""
    run = study.table.run(cell.row, study.scale, study.base)
    run = edit(run, seed=study.base.seed + cell.seed, out=str(cell.home))
    if (cell.home / "run.json").is_file():
        found = read_run(cell.home)
        apart = {*INCIDENTAL, "online_eval.every_epochs"} - {"seed"}
        changed = [item for item in differences(found, run) if item[0] not in apart]
        if changed:
            listed = "\n".join(
                f"  {flag(name)} is {format_value(old)} there, got {format_value(new)}" for name, old, new in changed
            )
            raise UserError(
                f"{cell.folder} was run with other settings than this row has now:\n{listed}\n"
                "Move that folder away to run the row anew, or put the table elsewhere with --out."
            )
    return run


def wanted(table: Table, *, linear: bool) -> tuple[str, ...]:
    """Figures that are measured of the finished network."""
    return (*([LINEAR.name] if linear else []), *([SPEED.name] if SPEED in table.figures else []))


def job_of(study: Study, cell: Cell, *, linear: bool = False) -> RunJob:
    run, data = run_of(study, cell), str(study.data["fingerprint"])
    return RunJob(
        run=run,
        learned=learned(run),
        data=data,
        students=study.table.students,
        wanted=wanted(study.table, linear=linear and study.data["classes"] > 0),
    )


def learned(run: Run) -> str:
    """A digest of all that decides what is learned, and how that is measured in the end."""
    left_out = {*INCIDENTAL, "online_eval.every_epochs"} - {"seed", "precision"}
    decides = {name: value for name, value in flatten(to_dict(run)).items() if name not in left_out}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def reuse_result(study: Study, cell: Cell, job: RunJob, root: Path = ROOT) -> bool:
    """Whether another table has run just this; its folder then stands for this one."""
    if cell.state != "not run":
        return cell.shared
    for path in sorted(root.glob(f"*/{study.scale}/*/seed*/{RESULT}")):
        home = path.parent
        other = Cell(cell.row, cell.seed, home).result
        if other is None or (other.learned, other.data) != (job.learned, job.data):
            continue
        if job.students and not (home / STUDENT).is_file():
            continue
        write_json(cell.folder / SAME, {"folder": os.path.relpath(home.resolve(), cell.folder.resolve())})
        return True
    return False


def is_incomplete(cell: Cell, job: RunJob) -> bool:
    """Whether there is anything left to do."""
    result = cell.result
    return result is None or any(name not in result.values for name in job.wanted)


def task_of(cell: Cell, job: RunJob) -> Task:
    """The row as a process of its own."""
    path = write_json(cell.folder / "job.json", to_dict(job))
    name = f"{cell.row.name} seed {cell.seed}" if cell.seed else cell.row.name
    command = [sys.executable, "-m", "dino_ssl.ablations.runner", str(path)]
    return Task(name, command, cell.folder / "log.txt")


def cells_of(study: Study, names: Sequence[str], seeds: int) -> list[Cell]:
    """Seed by seed, so that the whole table is there once before any row is run again."""
    return [study.cell(row, seed) for seed in range(seeds) for row in study.table.select(names)]
