"""A table that was run, read from its folder: what each row gave under each seed, and the spread over the seeds.

runs/ablate/TABLE/SCALE/        study.json: the base that the rows are edits of, and the pictures
    ROW/seed0/                  a run like any other, and result.json: its figures and what they cost
                                or same.json: another table's folder where just this was run
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dino_ssl.ablations.table import SCALES, Row, Scale, Table
from dino_ssl.ablations.tables import HOMES, table
from dino_ssl.config import differences, from_dict, to_dict
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.files import read_json, read_lines, write_json
from dino_ssl.report.curves import History, Line, line, read_history
from dino_ssl.run import Run, read_run

ROOT = Path("runs/ablate")
STUDY, RESULT, FAILED, SAME, STUDENT = "study.json", "result.json", "failed.json", "same.json", "student.jsonl"

INCIDENTAL = (
    "data.path",
    "val.path",
    "seed",
    "online_eval.batch_size",
    "evals",
    "optim.micro_batch",
    "precision",
    "recompute",
    "workers",
    "cache",
    "log_every",
    "save_minutes",
    "keep_every",
    "on_collapse",
    "out",
)
"""Settings that differ between rows for no reason of the table's."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one row gave under one seed, and what that cost."""

    values: Mapping[str, float]
    """Figures by name: 20-NN, student 20-NN, linear (percent), entropy (percent of ln K), kl, hours, memory, ..."""
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    epochs: int = 0
    dataset: int = 0
    """Pictures that training saw, each as often as it did."""
    seconds: float = 0.0
    """Training and the evaluations on its way."""
    images_per_s: float = 0.0
    memory: int = 0
    """Peak of the training process (on a GPU: of the card), in bytes."""
    prototypes: int | None = None
    machine: str = ""
    threads: int = 0
    learned: str = ""
    """Digest of all settings that decide what is learned."""
    data: str = ""
    """Fingerprint of the pictures."""
    versions: Mapping[str, str] = field(default_factory=dict)


class Spread(NamedTuple):
    """One figure over the seeds."""

    mean: float
    low: float
    high: float
    deviation: float
    """Standard deviation over the seeds, with n - 1; 0 for one."""
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread | None":
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return Spread(statistics.fmean(values), min(values), max(values), deviation, len(values))


@dataclass(frozen=True)
class Cell:
    """One row under one seed."""

    row: Row
    seed: int
    folder: Path

    @property
    def home(self) -> Path:
        """Where the run lies: here, or where another table has it already."""
        same = read_json(self.folder / SAME)
        if isinstance(same, dict) and (home := self.folder / str(same.get("folder"))).joinpath(RESULT).is_file():
            return home.resolve()
        return self.folder

    @property
    def shared(self) -> bool:
        return self.home != self.folder

    @property
    def result(self) -> Result | None:
        told = read_json(self.home / RESULT)
        return None if told is None else from_dict(Result, told)

    @property
    def error(self) -> str:
        told = read_json(self.folder / FAILED)
        return str(told["error"]) if isinstance(told, dict) and "error" in told else ""

    @property
    def state(self) -> str:
        if self.result is not None:
            return "done"
        if self.error:
            return "failed"
        return "begun" if (self.folder / "run.json").is_file() else "not run"

    @property
    def history(self) -> History:
        return read_history(self.home)

    def line(self, name: str) -> Line:
        """A training metric, or a figure of the evaluations, over epochs."""
        history = self.history
        if name.startswith("student "):
            return line(read_students(self.home), name.removeprefix("student "))
        for rows in (history.evaluations.get("knn", []), history.evaluations.get("accuracy", [])):
            if any(name in row for row in rows):
                return line(rows, name)
        return history.line(name)


@dataclass(frozen=True)
class Study:
    """A table at a scale, in a folder."""

    folder: Path
    table: Table
    scale: Scale
    base: Run
    data: Mapping[str, Any]
    minutes: float | None = None
    """What was asked for a row, where its length follows from that."""

    def cell(self, row: Row, seed: int) -> Cell:
        return Cell(row, seed, self.folder / row.name / f"seed{seed}")

    def cells(self, row: Row) -> list[Cell]:
        """All that were begun, in the order of seeds."""
        seeds = sorted(
            int(path.name.removeprefix("seed"))
            for path in (self.folder / row.name).glob("seed*")
            if path.name.removeprefix("seed").isdigit()
        )
        return [self.cell(row, seed) for seed in seeds]

    def results(self, row: Row) -> list[Result]:
        return [result for cell in self.cells(row) if (result := cell.result) is not None]

    def spread(self, row: Row, name: str) -> Spread | None:
        found = [result.values[name] for result in self.results(row) if name in result.values]
        return Spread.of([value for value in found if math.isfinite(value)])

    def settings(self, row: Row) -> list[tuple[str, Any, Any]]:
        """(field, the base's value, the row's) of all that differs."""
        return [item for item in differences(self.base, self.run(row)) if item[0] not in INCIDENTAL]

    def run(self, row: Row) -> Run:
        """The row's: as it was run, or as it would be."""
        homes = [cell.home for cell in self.cells(row) if (cell.home / "run.json").is_file()]
        return read_run(homes[0]) if homes else self.table.run(row, self.scale, self.base)

    @property
    def finished(self) -> list[Result]:
        return [result for row in self.table.rows for result in self.results(row)]

    def write(self) -> None:
        told = {"table": self.table.name, "scale": self.scale, "base": to_dict(self.base), "data": dict(self.data)}
        write_json(self.folder / STUDY, told | {"minutes": self.minutes})


def read_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none."""
    told = read_json(folder / STUDY)
    if told is None:
        return None
    try:
        base = from_dict(Run, told["base"])
        return Study(folder, table(told["table"]), told["scale"], base, told["data"], told.get("minutes"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / STUDY} is not a table's description: it lacks {error}.") from error


def find_study(name: str, root: Path = ROOT, scale: Scale | None = None) -> Study:
    """The study of a table's name under `root`, or in a folder. Raises UserError where there is none."""
    if (study := read_study(Path(name))) is not None:
        return study
    if name not in HOMES:
        raise UserError(
            f"There is no run and no table {name!r}{did_you_mean(name, HOMES)}\n"
            f"Expected a run's folder, or one of {', '.join(HOMES)}."
        )
    scales = [scale] if scale else list(SCALES)
    found = [study for one in scales if (study := read_study(root / name / one)) is not None]
    if not found:
        where = root / name / scale if scale else root / name
        raise UserError(f"{name} was not run yet: there is nothing in {where}.\nRun it: dino ablate {name}")
    if len(found) > 1:
        raise UserError(
            f"{root / name} has {' and '.join(study.scale for study in found)}: say which one with --scale."
        )
    return found[0]


def read_students(folder: Path) -> list[dict[str, Any]]:
    """The student's figures, one line for each evaluation; a torn line is left out."""
    return [row for row in read_lines(folder / STUDENT) if "step" in row]
