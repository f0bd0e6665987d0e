"""A table as a person runs it: the base that its rows are edits of is settled once, then rows are run and kept."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dino import dist
from dino.analysis.study import INCIDENTAL, RESULT, ROOT, SAME, STUDENT, Cell, Study, read_study
from dino.config import differences, edit, flat, to_dict
from dino.data.folder import Folder
from dino.data.pictures import Pictures
from dino.data.scenes import Scenes
from dino.errors import UserError
from dino.files import write_json
from dino.presets.ablations.bases import SEEN, length
from dino.presets.ablations.table import LINEAR, SPEED, Scale, Table
from dino.presets.plan import measure
from dino.run import Run, read_run
from dino.runtime import Machine, machine, machine_memory
from dino.session.begin import flag, shown
from dino.session.crew import Task
from dino.session.row import Job


@dataclass(frozen=True, kw_only=True)
class Asked:
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


def settle(table: Table, scale: Scale, asked: Asked, root: Path = ROOT) -> Study:
    """The study that the command is about: the one that lies there, or a new one. All ranks take part.

    Raises UserError where no pictures are named, or where what lies there is of other pictures or settings.
    """
    folder = root / table.name / scale
    there = read_study(folder)
    base = asked.preset or (there.base if there is not None else table.base(scale))
    base = _with_data(base, asked, known=there is not None or asked.preset is not None, table=table)
    with _threads(asked.processes):
        pictures = base.data.open()
        here = machine()
        base = _for_machine(base, asked, pictures, here)
        own = _of_length(base, asked, pictures, here, scale, there)
        base = dist.on_main(lambda: own)  # the ranks measure together, and the first one's length holds
    data = {
        "pictures": len(pictures),
        "classes": len(pictures.classes),
        "fingerprint": pictures.fingerprint,
        "held_back": base.knn.held_back if base.val is None else 0,
    }
    study = Study(folder, table, scale, base, data, asked.minutes or (there.minutes if there else None))
    if there is not None:
        _must_agree(there, study)
    return study


def unsettled(table: Table, scale: Scale, root: Path = ROOT) -> Study:
    """The table by its own base, where no pictures are known yet: to be looked at."""
    data = {"pictures": 0, "classes": 0, "fingerprint": "", "held_back": 0}
    return Study(root / table.name / scale, table, scale, table.base(scale), data)


def _with_data(base: Run, asked: Asked, *, known: bool, table: Table) -> Run:
    drawn = asked.preset is not None and isinstance(asked.preset.data, Scenes) and isinstance(asked.data, Scenes)
    if asked.data is not None and not drawn:  # a recipe for drawn pictures has its own
        base = edit(base, data=asked.data)
    elif asked.data is None and not known:
        raise UserError(
            f"Which pictures? Expected a folder of class folders: dino ablate {table.name} --data photos/\n"
            "--data scenes or herds takes pictures that dino draws itself; --val FOLDER are those that are asked about."
        )
    return base if asked.val is None else edit(base, val=asked.val)


def _for_machine(base: Run, asked: Asked, pictures: Pictures, here: Machine) -> Run:
    """Precision, workers, and whether the decoded pictures stay in memory, once for each process. A row that collapses
    goes on to its end: that is its result."""
    precision = base.precision if base.precision == "float32" else here.precision
    fits = asked.processes * pictures.nbytes < machine_memory() / 4
    workers = base.workers if asked.workers is None else asked.workers
    return edit(base, precision=precision, cache="memory" if fits else "no", workers=workers, on_collapse="warn")


def _of_length(base: Run, asked: Asked, pictures: Pictures, here: Machine, scale: Scale, there: Study | None) -> Run:
    """As many epochs as was asked for, or as there were, or as the scale says."""
    if asked.epochs is not None:
        return length(base, asked.epochs)
    if asked.minutes is not None and (there is None or there.minutes != asked.minutes):
        speed = measure(base, here, pictures)
        seconds = speed.seconds(base, here, _trained(base, pictures)) / dist.world()
        return length(base, max(1, round(60 * asked.minutes / seconds)))
    if there is not None:
        optim = there.base.optim
        run = edit(base, optim=dict(epochs=optim.epochs, warmup_epochs=optim.warmup_epochs))
        return edit(run, knn=dict(every_epochs=there.base.knn.every_epochs))
    if scale == "small" and asked.preset is None:
        return length(base, max(1, round(SEEN / _trained(base, pictures))))
    return base


def _trained(base: Run, pictures: Pictures) -> int:
    held = base.knn.held_back if base.val is None and pictures.labels is not None else 0
    return max(1, round((1 - held) * len(pictures)))


def _must_agree(there: Study, now: Study) -> None:
    """Rows that stand side by side must have learned from the same pictures, by the same settings."""
    elsewhere = "Leave them away to go on there, or put this table elsewhere with --out."
    if there.data.get("fingerprint") != now.data["fingerprint"]:
        raise UserError(
            f"{there.folder} holds rows of other pictures: {there.data.get('pictures'):,} there, "
            f"{now.data['pictures']:,} here. Give the same --data to go on, or put this table elsewhere with --out."
        )
    changed = [item for item in differences(there.base, now.base) if item[0] not in INCIDENTAL or item[0] == "seed"]
    if changed:
        listed = "\n".join(f"  {flag(name)} is {shown(old)} there, got {shown(new)}" for name, old, new in changed)
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
        apart = {*INCIDENTAL, "knn.every_epochs"} - {"seed"}
        changed = [item for item in differences(found, run) if item[0] not in apart]
        if changed:
            listed = "\n".join(f"  {flag(name)} is {shown(old)} there, got {shown(new)}" for name, old, new in changed)
            raise UserError(
                f"{cell.folder} was run with other settings than this row has now:\n{listed}\n"
                "Move that folder away to run the row anew, or put the table elsewhere with --out."
            )
    return run


def wanted(table: Table, *, linear: bool) -> tuple[str, ...]:
    """Figures that are measured of the finished network."""
    return (*([LINEAR.name] if linear else []), *([SPEED.name] if SPEED in table.figures else []))


def job_of(study: Study, cell: Cell, *, linear: bool = False) -> Job:
    run, data = run_of(study, cell), str(study.data["fingerprint"])
    return Job(
        run=run,
        learned=learned(run),
        data=data,
        students=study.table.students,
        wanted=wanted(study.table, linear=linear and study.data["classes"] > 0),
    )


def learned(run: Run) -> str:
    """A digest of all that decides what is learned, and how that is measured in the end."""
    left_out = {*INCIDENTAL, "knn.every_epochs"} - {"seed", "precision"}
    decides = {name: value for name, value in flat(to_dict(run)).items() if name not in left_out}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def share(study: Study, cell: Cell, job: Job, root: Path = ROOT) -> bool:
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


def lacks(cell: Cell, job: Job) -> bool:
    """Whether there is anything left to do."""
    result = cell.result
    return result is None or any(name not in result.values for name in job.wanted)


def task_of(cell: Cell, job: Job) -> Task:
    """The row as a process of its own."""
    path = write_json(cell.folder / "job.json", to_dict(job))
    name = f"{cell.row.name} seed {cell.seed}" if cell.seed else cell.row.name
    command = [sys.executable, "-m", "dino.session.row", str(path)]
    return Task(name, command, cell.folder / "log.txt")


def cells_of(study: Study, names: Sequence[str], seeds: int) -> list[Cell]:
    """Seed by seed, so that the whole table is there once before any row is run again."""
    return [study.cell(row, seed) for seed in range(seeds) for row in study.table.select(names)]
