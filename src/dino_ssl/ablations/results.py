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
from dino_ssl.config import differences, from_dict, to_dict
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.files import read_json, write_json
from dino_ssl.report.curves import Line, line, read_history
from dino_ssl.run import EXECUTION_FIELDS, Run

ROOT = Path("runs/ablate")
FORMAT = 1
"""Version of study.json and result.json."""
STUDY, RESULT, FAILED = "study.json", "result.json", "failed.json"
EVALS = {"20-NN": "knn", "student 20-NN": "student"}
"""Name of the evaluation in metrics.jsonl by metric."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The results of one run, and their cost."""

    values: Mapping[str, float]
    """By metric: 20-NN, student 20-NN, linear (percent), entropy (percent of ln K), kl, hours, memory (GB), ..."""
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores of raw pixels and of random weights."""
    images_seen: int = 0
    """Training images, counted once per epoch."""
    images_per_s: float = 0.0
    machine: str = ""
    """Name of the processor, and threads per run."""
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


class Spread(NamedTuple):
    """Statistics of one metric over the seeds."""

    mean: float
    low: float
    high: float
    deviation: float
    """Sample standard deviation (n - 1); 0 for one seed."""
    n: int


@dataclass(frozen=True)
class StudyRun:
    """One configuration trained with one seed."""

    configuration: Configuration
    seed: int
    folder: Path

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
        """Return a training metric, or a result of the evaluations, over epochs."""
        history = read_history(self.folder)
        return line(history.evaluations.get(EVALS[name], []), "20-NN") if name in EVALS else history.line(name)


@dataclass(frozen=True)
class Study:
    """A table at one scale, on one dataset, in one folder."""

    folder: Path
    table: Table
    scale: Scale
    base: Run
    data: Mapping[str, Any]
    """images, classes, fingerprint, val_fraction."""
    minutes: float | None = None
    """Requested minutes per run, if the number of epochs is derived from them."""

    def study_run(self, configuration: Configuration, seed: int) -> StudyRun:
        """Return the run of a configuration and seed, which need not exist yet."""
        return StudyRun(configuration, seed, self.folder / configuration.name / f"seed{seed}")

    def runs(self, configuration: Configuration | None = None) -> list[StudyRun]:
        """Return all runs that were started, of one or of all configurations, in the order of the table and seeds."""
        runs = []
        for item in self.table.configurations if configuration is None else [configuration]:
            names = [path.name.removeprefix("seed") for path in (self.folder / item.name).glob("seed*")]
            runs += [self.study_run(item, seed) for seed in sorted(int(name) for name in names if name.isdigit())]
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

    def differences(self, configuration: Configuration) -> list[tuple[str, Any, Any]]:
        """Return (field, the base's value, the configuration's) of all settings that differ."""
        run = self.table.run(configuration, self.scale, self.base)
        return [item for item in differences(self.base, run) if item[0] not in EXECUTION_FIELDS]

    def write(self) -> None:
        """Write study.json."""
        content = {"format": FORMAT, "table": self.table.name, "scale": self.scale, "base": to_dict(self.base)}
        write_json(self.folder / STUDY, content | {"data": dict(self.data), "minutes": self.minutes})


def read_study(folder: Path) -> Study | None:
    """Return the study in a folder; None if there is none."""
    content = _read(folder / STUDY)
    if content is None:
        return None
    try:
        table, base = get_table(content["table"]), from_dict(Run, content["base"])
        return Study(folder, table, content["scale"], base, content["data"], content["minutes"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / STUDY} does not describe a study: {error} is missing.") from error


def find_study(name: str, root: Path = ROOT, scale: Scale | None = None) -> Study:
    """Return the study of a table under `root`, or in the folder `name`. Raise UserError if there is none."""
    if (study := read_study(Path(name))) is not None:
        return study
    if name not in TABLES:
        raise UserError(
            f"{name!r} is neither a run folder nor a table{did_you_mean(name, TABLES)}\n"
            f"Expected the folder of a run, or one of {', '.join(TABLES)}."
        )
    folders = [root / name / option for option in ([scale] if scale else SCALES)]
    studies = [study for folder in folders if (study := read_study(folder)) is not None]
    if not studies:
        raise UserError(f"{name} was not run yet: there is no result in {root / name}.\nRun it: dino ablate {name}")
    if len(studies) > 1:
        raise UserError(f"{root / name} has the scales {' and '.join(SCALES)}: choose one with `scale`.")
    return studies[0]


def _read(path: Path) -> Any:
    """Return the content of study.json or result.json; None if it is missing."""
    content = read_json(path)
    if content is not None and content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}; this version of dino reads format {FORMAT}.")
    return content
