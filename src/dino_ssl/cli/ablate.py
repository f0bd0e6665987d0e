"""dino ablate: reproduce the paper's tables and figures, at the original scale or at a small scale."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dino_ssl.cli.options import Flag, Json, parse
from dino_ssl.errors import UserError, check_range
from dino_ssl.terminal import Terminal, command_output

if TYPE_CHECKING:
    from dino_ssl.ablations.study import Study, StudyRun
    from dino_ssl.ablations.table import Table

EXAMPLES = """\
  dino ablate                                               list the tables
  dino ablate table7 --data photos/                         run all, about ten minutes per run on one core
  dino ablate table7 --data photos/ --dry-run               list the settings of each configuration and its state
  dino ablate fig7 --data train/ --val val/ --seeds 3 --processes 2
  dino ablate table7 --only dino no-momentum --minutes 30 --linear
  dino ablate table7                                        resume with the same dataset
  torchrun --nproc-per-node 8 -m dino_ssl ablate table7 --scale paper --data imagenet/train --val imagenet/val
  dino report table7                                        the page: our results next to the paper's"""


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Reproduce a table or figure of the paper; without a name, list them.

    Every configuration and seed is a training run in runs/ablate/TABLE/SCALE/CONFIGURATION/seed0. Finished runs are
    kept, stopped ones are resumed, failed ones are tried again. Exit code: 0 if all runs are finished, 1 if one failed.
    """

    table: tyro.conf.Positional[str] = ""
    """table7, fig6, temperatures, ...; `dino ablate` lists them."""
    scale: Literal["small", "paper"] = "small"
    """small: minutes per run on one CPU core. paper: ViT-S/16 with ImageNet's settings, for many GPUs."""
    data: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder with one folder per class; or `scenes` or `simple-scenes`: synthetic images."""
    val: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Validation set with one folder per class; without it a part of every class is held out."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Configurations to run; default: all."""
    seeds: int = 1
    """Number of seeds per configuration, from 0."""
    processes: int = 1
    """Number of runs that are trained in parallel."""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Training time of the base configuration in minutes, from which a new table derives its number of epochs."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="EPOCHS")] = None
    """Epochs of the base configuration; longer configurations are multiples of it."""
    linear: Flag = False
    """Also evaluate with a linear classifier on the frozen features; applies to finished runs too."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Base configuration that replaces the table's own: a preset, or MODULE:FUNCTION that returns a dino_ssl.Run."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes per run that decode and augment images."""
    out: str = "runs/ablate"
    """Parent folder of the results of all tables."""
    dry_run: Flag = False
    """Print the configurations and exit."""
    json: Json = False


def ablate(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(AblateOptions, argv, "dino ablate", EXAMPLES)
    with command_output(options.json) as (terminal, write):
        if not options.table:
            write(_list_tables(terminal))
            return 0
        command = shlex.join(["dino", "ablate", *(word for word in argv if word != "--json")])
        return _run(options, command, terminal, write)


def _list_tables(terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.ablations.tables import TABLES

    rows = [(name, str(len(table.configurations)), table.title) for name, table in TABLES.items()]
    terminal.table("Tables", ("name", "configurations", "content"), rows)
    terminal.print("\ndino ablate NAME --data photos/ runs a table; --dry-run shows its configurations.")
    return {
        "tables": {
            name: {"title": table.title, "configurations": [item.name for item in table.configurations]}
            for name, table in TABLES.items()
        }
    }


def _run(options: AblateOptions, command: str, terminal: Terminal, write: Callable[[dict[str, Any]], None]) -> int:
    from dino_ssl import distributed
    from dino_ssl.ablations.page import write_page
    from dino_ssl.ablations.runner import missing_metrics, run_parallel, run_serial
    from dino_ssl.ablations.study import StudyRun, link_shared_runs
    from dino_ssl.ablations.tables import get_table
    from dino_ssl.runtime import start

    check_range(options, "seeds", "processes", "minutes", "epochs", above=0)
    if options.minutes is not None and options.epochs is not None:
        raise UserError("`minutes` and `epochs` both set the length of a run: give only one of them.")
    table, root = get_table(options.table), Path(options.out)
    selected = table.select(options.only)
    with start() as rt:
        study = _study(options, table, root)
        runs = [StudyRun(study, item, seed) for seed in range(options.seeds) for item in selected]
        if options.dry_run:
            _print_configurations(study, runs, terminal)
            write(study_json(study))
            return 0
        study = replace(study, commands=tuple(dict.fromkeys([*study.commands, command])))
        if rt.is_main:
            study.write()
        num_shared = distributed.run_on_rank0(lambda: link_shared_runs(runs, root))
        pending = [run for run in runs if run.result is None or missing_metrics(run, options.linear)]
        terminal.print(table.title, style="bold")
        terminal.print(
            f"{study.data['images']:,} images; {study.base.optim.epochs} epochs, batch size "
            f"{study.base.optim.batch_size}; {study.folder}/\n"
            f"{len(pending)} of {len(runs)} runs to do, {num_shared} are shared with other tables."
        )
        if rt.world_size > 1:
            signal_number, num_failed = run_serial(pending, options.linear, terminal)
        else:
            signal_number, num_failed = run_parallel(pending, options.linear, options.processes, terminal)
        if rt.is_main:
            print_results(study, terminal)
            page = write_page(study)
            terminal.print(f"Report     {page}")
            write({**study_json(study), "report": str(page)})
    if signal_number is not None:
        terminal.print("Stopped; the same command resumes.")
        return 128 + signal_number
    return int(num_failed > 0)


def _study(options: AblateOptions, table: "Table", root: Path) -> "Study":
    from dino_ssl.ablations.study import Study, read_study, resolve_study
    from dino_ssl.data.sources import dataset_config
    from dino_ssl.presets import resolve

    if options.dry_run and options.data is None and options.preset is None:
        folder, no_data = root / table.name / options.scale, {"images": 0}
        return read_study(folder) or Study(folder, table, options.scale, table.base(options.scale), no_data)
    return resolve_study(
        table,
        options.scale,
        root,
        preset=None if options.preset is None else resolve(options.preset),
        data=None if options.data is None else dataset_config(options.data, "train"),
        val=None if options.val is None else dataset_config(options.val, "val"),
        epochs=options.epochs,
        minutes=options.minutes,
        workers=options.workers,
        processes=options.processes,
    )


def _print_configurations(study: "Study", runs: Sequence["StudyRun"], terminal: Terminal) -> None:
    from dino_ssl.cli.command_line import cli_diff
    from dino_ssl.run import EXECUTION_FIELDS

    rows = []
    for run in runs:
        item, changes = run.configuration, cli_diff(study.base, run.run, (*EXECUTION_FIELDS, "seed"))
        rows.append((item.name, str(run.seed), run.state, item.title, changes or "the base"))
    terminal.table(study.table.title, ("name", "seed", "state", "configuration", "difference from the base"), rows)
    terminal.print(f"\nBase: {study.base.optim.epochs} epochs, {study.data['images']:,} images; {study.folder}/")


def print_results(study: "Study", terminal: Terminal) -> None:
    """Print our results next to the paper's."""
    from dino_ssl.ablations.page import result_cells, result_columns

    rows = []
    for item in study.table.configurations:
        states = {run.state for run in study.runs(item)} or {"not run"}
        rows.append((item.name, item.title, *result_cells(study, item), ", ".join(sorted(states - {"done"}))))
    terminal.table("", ("name", "configuration", *result_columns(study), "state"), rows)


def study_json(study: "Study") -> dict[str, Any]:
    """Return the results of a study for --json."""
    items = []
    for item in study.table.configurations:
        spreads = {name: study.spread(item, name) for name in study.table.metrics}
        items.append(
            {
                "name": item.name,
                "title": item.title,
                "paper": study.table.paper_results(item),
                "ours": {name: spread._asdict() for name, spread in spreads.items() if spread is not None},
                "runs": [
                    {
                        "seed": run.seed,
                        "state": run.state,
                        "folder": str(run.folder),
                        "error": run.error,
                        "values": {} if run.result is None else dict(run.result.values),
                    }
                    for run in study.runs(item)
                ],
            }
        )
    return {"table": study.table.name, "scale": study.scale, "data": dict(study.data), "configurations": items}
