"""A study: a table whose base Run is fixed once for a dataset, with one folder per configuration and seed.

runs/ablate/TABLE/SCALE/        study.json: the base Run and the dataset
    CONFIGURATION/seed0/        a training run with result.json: its results and cost;
                                or a link to an identical run of another table
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino_ssl import distributed
from dino_ssl.ablations.bases import IMAGES_SEEN, scale_length
from dino_ssl.ablations.table import SCALES, Configuration, Scale, Table
from dino_ssl.ablations.tables import TABLES, get_table
from dino_ssl.config import differences, edit, format_value, from_dict, to_dict
from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.files import check_format, mark_output, read_json, write_json
from dino_ssl.presets.plan import measure, num_train_images
from dino_ssl.report.curves import Line, line, read_history
from dino_ssl.run import EXECUTION_FIELDS, Run
from dino_ssl.runtime import machine, machine_memory

ROOT = Path("runs/ablate")
FORMAT = 1
"""Version of study.json, result.json and failed.json."""
STUDY, RESULT, FAILED = "study.json", "result.json", "failed.json"
NOT_LEARNED = {*EXECUTION_FIELDS, "online_eval.every_epochs"} - {"precision"}
"""Fields that affect neither the learned weights nor their evaluation at the end."""
EVALS = {"20-NN": "knn", "student 20-NN": "student"}
"""Name in metrics.jsonl of the evaluation of a metric."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The results of one run, and their cost."""

    values: Mapping[str, float]
    """By metric: those of tables in their unit, `images` (seen in training, counted once per epoch), `images/s`."""
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores of raw pixels and of random weights."""
    curves: Mapping[str, Any] = field(default_factory=dict)
    """Epochs and values of each metric of CURVES: with them, a result needs no other file of the run."""
    machine: str = ""
    """Name of the processor, and threads per run."""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    """Day on which training ended and the result was written, such as 2026-11-29."""
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
        """Return a metric of CURVES over epochs, in its unit."""
        if (result := self.result) is not None and name in result.curves:
            return result.curves[name]
        history, prototypes = read_history(self.folder), self.run.method.num_prototypes
        if name in EVALS:
            return line(history.evaluations.get(EVALS[name], []), "20-NN")
        if name == "entropy" and prototypes:
            epochs, entropies = history.line("teacher_entropy")
            return epochs, [100 * entropy / math.log(prototypes) for entropy in entropies]
        return history.line(name)


@dataclass(frozen=True)
class Study:
    """A table at one scale, on one dataset, in one folder."""

    folder: Path
    table: Table
    scale: Scale
    base: Run
    data: Mapping[str, Any]
    """images, classes, fingerprint, val_fraction."""
    commands: tuple[str, ...] = ()
    """Command lines that started or resumed its runs, in the order of their first use."""

    def runs(self, configuration: Configuration | None = None) -> list[StudyRun]:
        """Return all runs that were started, of one or of all configurations, in the order of the table and seeds."""
        runs = []
        for item in self.table.configurations if configuration is None else [configuration]:
            seeds = sorted(int(path.name.removeprefix("seed")) for path in (self.folder / item.name).glob("seed[0-9]*"))
            runs += [StudyRun(self, item, seed) for seed in seeds]
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
        mark_output(self.folder)
        content = {"format": FORMAT, "table": self.table.name, "scale": self.scale, "base": to_dict(self.base)}
        write_json(self.folder / STUDY, content | {"data": dict(self.data), "commands": [*self.commands]})


def read_study(folder: Path) -> Study | None:
    """Return the study in a folder; None if there is none."""
    if (content := _read(folder / STUDY)) is None:
        return None
    base = from_dict(Run, content["base"])
    commands = tuple(content.get("commands", ()))  # a study that was started before they were kept can be resumed
    return Study(folder, get_table(content["table"]), content["scale"], base, content["data"], commands)


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
    if content is not None:
        check_format(path, content.get("format"), FORMAT)
    return content


def resolve_study(
    table: Table,
    scale: Scale,
    root: Path = ROOT,
    *,
    preset: Run | None = None,
    data: DatasetConfig | None = None,
    val: DatasetConfig | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    workers: int | None = None,
    processes: int = 1,
) -> Study:
    """Return the existing study of a table, or a new one. Call it on all ranks.

    preset: base instead of the table's own. minutes: time per run of a new study, with `processes` runs at a time.
    Raises UserError if a new study has no dataset, or if an existing one has another dataset or other settings.
    """
    folder = root / table.name / scale
    existing = read_study(folder)
    base = preset or (table.base(scale) if existing is None else existing.base)
    if data is not None:
        base = edit(base, data=data)
    elif existing is None and preset is None:
        raise UserError(
            f"{table.name} was not run yet and needs a dataset: set `data` to a folder with one folder per class, or "
            "to scenes or simple-scenes (synthetic images). `val` sets the validation set."
        )
    if val is not None:
        base = edit(base, val=val)
    dataset = base.data.open()
    base = edit(
        base,
        precision=base.precision if base.precision == "float32" else machine().precision,
        cache=processes * dataset.nbytes < machine_memory() / 4,  # each process has its own
        workers=base.workers if workers is None else workers,
        on_collapse="warn",  # the collapse is the result
    )
    num_images = num_train_images(base, dataset)
    if epochs is not None:
        base = scale_length(base, epochs)
    elif existing is not None:
        optim, every = existing.base.optim, existing.base.online_eval.every_epochs
        length = dict(epochs=optim.epochs, warmup_epochs=optim.warmup_epochs)
        base = edit(base, optim=length, online_eval=dict(every_epochs=every))
    elif minutes is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))  # as many as a run will have
        seconds = measure(base, machine(), dataset).seconds(base, machine(), num_images) / distributed.world_size()
        base = scale_length(base, max(1, round(60 * minutes / seconds)))
    elif scale == "small" and preset is None:
        base = scale_length(base, max(1, round(IMAGES_SEEN / num_images)))
    base = distributed.run_on_rank0(lambda: base)  # each rank has measured its own speed
    summary = {
        "images": len(dataset),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
        "val_fraction": base.online_eval.val_fraction if base.val is None else 0,
    }
    study = Study(folder, table, scale, base, summary, () if existing is None else existing.commands)
    if existing is not None:
        _check_same(existing, study)
    return study


def _check_same(existing: Study, study: Study) -> None:
    """Raise UserError if dataset or settings differ: the runs of one study must be comparable."""
    changes = [item for item in differences(existing.base, study.base) if item[0] not in EXECUTION_FIELDS]
    if existing.data["fingerprint"] != study.data["fingerprint"]:
        changes.append(("data", f"{existing.data['images']:,} images", f"{study.data['images']:,} other images"))
    if changes:
        lines = [f"  `{name}` is {format_value(old)} there, got {format_value(new)}" for name, old, new in changes]
        raise UserError(
            "\n".join([f"{existing.folder} has runs with other settings:", *lines])
            + "\nRemove these settings to resume the study, or set `out` to a different folder."
        )


def link_shared_runs(runs: Sequence[StudyRun], root: Path = ROOT) -> int:
    """Link runs that were not started to identical finished runs of other tables; return the number of links."""
    study = runs[0].study
    others = [other for path in sorted(root.glob(f"*/{study.scale}")) if (other := read_study(path)) is not None]
    finished = [run for other in others if other.data == study.data for run in other.runs() if run.result is not None]
    for run in runs:
        if run.folder.exists():
            continue
        run.folder.unlink(missing_ok=True)  # a link to a folder that was removed
        for other in finished:
            changes = {name for name, _, _ in differences(other.run, run.run)}
            has_student = "student 20-NN" in other.study.table.metrics
            if changes <= NOT_LEARNED and (has_student or "student 20-NN" not in study.table.metrics):
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                run.folder.symlink_to(os.path.relpath(other.folder.resolve(), run.folder.parent.resolve()))
                break
    return sum(run.folder.is_symlink() for run in runs)
