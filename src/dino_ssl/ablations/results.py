"""Results of a table on disk: one folder per configuration and seed, and statistics over the seeds.

runs/ablate/TABLE/SCALE/        study.json: the base Run and the dataset
    CONFIGURATION/seed0/        a training run with result.json: its results and cost;
                                or a link to an identical run of another table
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dino_ssl.ablations.table import SCALES, Configuration, Scale, Table
from dino_ssl.ablations.tables import TABLES, get_table
from dino_ssl.config import edit, from_dict, to_dict
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.files import read_json, write_json
from dino_ssl.report.curves import Line, line, read_history
from dino_ssl.run import Run

ROOT = Path("runs/ablate")
FORMAT = 1
"""Version of study.json and result.json."""
STUDY, RESULT, FAILED = "study.json", "result.json", "failed.json"
EVALS = {"20-NN": "knn", "student 20-NN": "student"}
"""Name in metrics.jsonl of the evaluation of a metric."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The results of one run, and their cost."""

    values: Mapping[str, float]
    """By metric: those of tables in their unit, `images` (seen in training, counted once per epoch), `images/s`."""
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores of raw pixels and of random weights."""
    machine: str = ""
    """Name of the processor, and threads per run."""
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


class Spread(NamedTuple):
    """Mean, minimum, maximum, sample standard deviation (0 for one seed) and number of the seeds' results."""

    mean: float
    low: float
    high: float
    deviation: float
    n: int


@dataclass(frozen=True)
class StudyRun:
    """One configuration trained with one seed."""

    study: "Study"
    configuration: Configuration
    seed: int

    @property
    def folder(self) -> Path:
        """Output folder of its Run."""
        return self.study.folder / self.configuration.name / f"seed{self.seed}"

    @property
    def run(self) -> Run:
        """The Run that is trained."""
        run = self.study.table.run(self.configuration, self.study.scale, self.study.base)
        return edit(run, seed=run.seed + self.seed, out=str(self.folder))

    @property
    def label(self) -> str:
        """Title and seed."""
        return f"{self.configuration.title}, seed {self.seed}"

    @property
    def result(self) -> Result | None:
        """The result; None if the run has not finished."""
        content = _read(self.folder / RESULT)
        return None if content is None else from_dict(Result, content)

    @property
    def error(self) -> str:
        """Message of the failure; empty if there was none."""
        return (read_json(self.folder / FAILED) or {}).get("error", "")

    @property
    def state(self) -> str:
        """`done`, `failed`, `incomplete` or `not run`."""
        if self.result is not None:
            return "done"
        if self.error:
            return "failed"
        return "incomplete" if (self.folder / "run.json").is_file() else "not run"

    def line(self, name: str) -> Line:
        """Return a metric that is measured during training, over epochs."""
        history = read_history(self.folder)
        if name in EVALS:
            return line(history.evaluations.get(EVALS[name], []), "20-NN")
        return history.line("teacher_entropy" if name == "entropy" else name)


@dataclass(frozen=True)
class Study:
    """A table at one scale, on one dataset, in one folder."""

    folder: Path
    table: Table
    scale: Scale
    base: Run
    data: Mapping[str, Any]
    """images, classes, fingerprint, val_fraction."""

    def runs(self, configuration: Configuration | None = None) -> list[StudyRun]:
        """Return all runs that were started, of one or of all configurations, in the order of the table and seeds."""
        runs = []
        for item in self.table.configurations if configuration is None else [configuration]:
            names = [path.name.removeprefix("seed") for path in (self.folder / item.name).glob("seed*")]
            runs += [StudyRun(self, item, seed) for seed in sorted(int(name) for name in names if name.isdigit())]
        return runs

    def results(self, configuration: Configuration | None = None) -> list[Result]:
        """Return the results of all finished runs, of one or of all configurations."""
        return [result for run in self.runs(configuration) if (result := run.result) is not None]

    def spread(self, configuration: Configuration, name: str) -> Spread | None:
        """Return the statistics of a metric over the seeds; None without a finite value."""
        values = [result.values.get(name, math.nan) for result in self.results(configuration)]
        values = [value for value in values if math.isfinite(value)]
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return Spread(statistics.fmean(values), min(values), max(values), deviation, len(values))

    def write(self) -> None:
        """Write study.json."""
        content = {"format": FORMAT, "table": self.table.name, "scale": self.scale, "base": to_dict(self.base)}
        write_json(self.folder / STUDY, content | {"data": dict(self.data)})


def read_study(folder: Path) -> Study | None:
    """Return the study in a folder; None if there is none."""
    if (content := _read(folder / STUDY)) is None:
        return None
    base = from_dict(Run, content["base"])
    return Study(folder, get_table(content["table"]), content["scale"], base, content["data"])


def find_study(name: str, root: Path = ROOT, scale: Scale | None = None) -> Study:
    """Return the study in the folder `name`, or of the table `name`: at scale small if it was run at both.

    Raises UserError if there is none.
    """
    for folder in (Path(name), *(root / name / option for option in ([scale] if scale else SCALES))):
        if (study := read_study(folder)) is not None:
            return study
    if name in TABLES:
        raise UserError(f"{name} was not run yet: there is no result in {root / name}.\nRun it: dino ablate {name}")
    raise UserError(
        f"{name!r} is neither a run folder nor a table{did_you_mean(name, TABLES)}\n"
        f"Expected the folder of a run, or one of {', '.join(TABLES)}."
    )


def _read(path: Path) -> Any:
    """Return the content of study.json or result.json; None if it is missing."""
    content = read_json(path)
    if content is not None and content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}; this version of dino reads format {FORMAT}.")
    return content
