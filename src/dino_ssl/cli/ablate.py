"""dino ablate: the paper's tables and figures, row by row, at the paper's scale or at a small one."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError, check_range
from dino_ssl.terminal import Terminal, command_output

EXAMPLES = """\
  dino ablate                                               the tables
  dino ablate table7 --data photos/                         all rows, small: about ten minutes each on one core
  dino ablate table7 --data photos/ --dry-run               what each row changes, and what is done already
  dino ablate fig7 --data train/ --val val/ --seeds 3 --processes 2
  dino ablate table7 --only dino no-momentum --minutes 30 --linear
  dino ablate table7                                        go on where it stopped, with the same pictures
  torchrun --nproc-per-node 8 -m dino_ssl ablate table7 --scale paper --data imagenet/train --val imagenet/val
  dino report table7                                        the page: our figures beside the paper's"""


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Run a table or figure of the paper, row by row; without a name, list them.

    Every row and seed has a folder of its own, runs/ablate/TABLE/SCALE/ROW/seed0, and is a run like any other. What is
    finished is kept, what was stopped goes on, what failed is tried again. Exit code: 0 where all rows are there, 1
    where one failed.
    """

    table: tyro.conf.Positional[str] = ""
    """table7, fig6, temperatures, ...; `dino ablate` lists them."""
    scale: Literal["small", "paper"] = "small"
    """small: minutes a row on one processor core. paper: ViT-S/16 and ImageNet's settings, for many GPUs."""
    data: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of class folders; `scenes` and `herds` take pictures that dino draws itself."""
    val: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of class folders that is asked about; without it a part of every class is held back."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ROW...")] = ()
    """Rows to run, by their names or numbers; without it all."""
    seeds: int = 1
    """Times that each row is run, from seed 0 on."""
    processes: int = 1
    """Rows that run at the same time."""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Time for the table's base on this machine; all rows have the epochs that follow from it."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="EPOCHS")] = None
    """Epochs of the table's base; rows that are longer are so many times longer."""
    linear: Flag = False
    """Measure a linear classifier on the frozen features too, also of rows that are finished."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Another base than the table's: a recipe, or MODULE:FUNCTION that returns a dino_ssl.Run."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes that decode and crop, for each row."""
    out: str = "runs/ablate"
    """Folder of all tables."""
    dry_run: Flag = False
    """Print the rows and stop."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def ablate(argv: Sequence[str]) -> int:
    options = parse(AblateOptions, argv, "dino ablate", EXAMPLES)
    with command_output(options.json) as (terminal, give):
        if not options.table:
            give(_listed(terminal))
            return 0
        return _run(options, terminal, give)


def _listed(terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.ablations.tables import tables

    known = tables()
    terminal.table("Tables", ("name", "rows", "what"), [(t.name, str(len(t.rows)), t.title) for t in known])
    terminal.print("\ndino ablate NAME --data photos/ runs one; --dry-run shows its rows.")
    return {"tables": {t.name: {"title": t.title, "rows": [row.name for row in t.rows]} for t in known}}


def _run(options: AblateOptions, terminal: Terminal, give: Any) -> int:
    from dino_ssl import distributed
    from dino_ssl.ablations.page import write_study_page
    from dino_ssl.ablations.results import read_study
    from dino_ssl.ablations.study import cells_of, is_incomplete, job_of, resolve_study, reuse_result, unsettled
    from dino_ssl.ablations.tables import table
    from dino_ssl.runtime import start

    _check(options)
    chosen, root = table(options.table), Path(options.out)
    names = [row.name for row in chosen.select(options.only)]
    with start() as rt:
        if options.dry_run and options.data is None and options.preset is None:
            study = read_study(root / chosen.name / options.scale) or unsettled(chosen, options.scale, root)
        else:
            study = resolve_study(chosen, options.scale, _asked(options), root)
        cells = cells_of(study, names, options.seeds)
        if options.dry_run:
            _show_rows(study, cells, terminal)
            give(told(study))
            return 0
        jobs = [job_of(study, cell, linear=options.linear) for cell in cells]
        if rt.is_main:
            study.write()
        shared = distributed.run_on_rank0(
            lambda: [reuse_result(study, cell, job, root) for cell, job in zip(cells, jobs, strict=True)]
        )
        jobs = [job_of(study, cell, linear=options.linear) for cell in cells]  # a shared one lies elsewhere
        left = [(cell, job) for cell, job in zip(cells, jobs, strict=True) if is_incomplete(cell, job)]
        _announce(study, cells, left, sum(shared), terminal)
        work = run_serial if rt.world_size > 1 else partial(run_parallel, processes=options.processes)
        stopped, failed = work(left, terminal)
        if rt.is_main:
            show(study, terminal)
            page = write_study_page(study)
            terminal.print(f"Report     {page}")
            give({**told(study), "report": str(page)})
    if stopped is not None:
        terminal.print("Stopped; the same command goes on.")
        return 128 + stopped
    return int(failed > 0)


def _asked(options: AblateOptions) -> Any:
    from dino_ssl.ablations.study import StudyOptions
    from dino_ssl.data.folder import Folder
    from dino_ssl.data.sources import DRAWN, WORDS
    from dino_ssl.data.synthetic.scenes import Scenes
    from dino_ssl.presets import resolve

    def named(word: str | None, part: Literal["train", "val"]) -> Folder | Scenes | None:
        if word in WORDS:
            return replace(WORDS[word], count=DRAWN[part], part=part)
        return Folder(path=word) if word else None

    return StudyOptions(
        data=named(options.data, "train"),
        val=named(options.val, "val"),
        preset=None if options.preset is None else resolve(options.preset),
        epochs=options.epochs,
        minutes=options.minutes,
        workers=options.workers,
        processes=options.processes,
    )


def _check(options: AblateOptions) -> None:
    check_range(options, "seeds", "processes", "minutes", "epochs", above=0)
    if options.minutes is not None and options.epochs is not None:
        raise UserError("--minutes and --epochs both say how long a row is: leave one of them away.")


def run_parallel(left: list, terminal: Terminal, processes: int) -> tuple[int | None, int]:
    """Each row in a process of its own, several at a time. Gives the signal that came, and how many failed."""
    from dino_ssl.ablations.job_pool import JobPool
    from dino_ssl.ablations.progress_table import ProgressTable
    from dino_ssl.ablations.results import FAILED
    from dino_ssl.ablations.study import task_of, threads_of
    from dino_ssl.files import write_json

    tasks = [task_of(cell, job) for cell, job in left]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of(processes))}
    with ProgressTable(terminal, tasks) as board:
        stopped = JobPool(tasks, processes, environment).work(board.changed, board.tick)
    failed = [(cell, task) for (cell, _), task in zip(left, tasks, strict=True) if task.state == "failed"]
    for cell, task in failed:
        if not cell.error:  # it was killed, and could not say so itself
            write_json(cell.folder / FAILED, {"error": task.told["error"]})
    return stopped, len(failed)


def run_serial(left: list, terminal: Terminal) -> tuple[int | None, int]:
    """Under torchrun: one row after another, each on all ranks."""
    from dino_ssl.ablations.run_lock import RunLocked
    from dino_ssl.ablations.runner import Stopped, complete
    from dino_ssl.runtime import start

    failed = 0
    for cell, job in left:
        terminal.print(f"{cell.row.name} seed {cell.seed}: {cell.row.what}", style="bold")
        try:
            with start(job.run.precision) as mine:
                complete(job, mine, terminal, lambda state, **figures: None)
        except Stopped as stopped:
            return stopped.signal, failed
        except RunLocked:
            terminal.print("another process is at it", style="yellow")
        except UserError as error:
            failed += 1
            terminal.print(f"failed: {error}", style="red")
        except KeyboardInterrupt:
            return signal.SIGINT, failed
    return None, failed


# -- what is shown -----------------------------------------------------------------------------------------


def _announce(study: Any, cells: list, left: list, shared: int, terminal: Terminal) -> None:
    optim, data = study.base.optim, study.data
    terminal.print(study.table.title, style="bold")
    held = f", {data['held_back']:.0%} of every class held back" if data["val_fraction"] else ""
    terminal.print(
        f"{data['images']:,} pictures{held}; {optim.epochs} epochs, batch {optim.batch_size}; {study.folder}/"
    )
    if shared:
        terminal.print(f"{shared} of the rows lie in other tables' folders, and are not run again.")
    terminal.print(f"{len(left)} of {len(cells)} rows are left to run.")


def _show_rows(study: Any, cells: list, terminal: Terminal) -> None:
    from dino_ssl.ablations.results import INCIDENTAL
    from dino_ssl.api.resolve import cli_diff

    rows = []
    for cell in cells:
        changes = cli_diff(study.base, study.run(cell.row), INCIDENTAL) or "the base"
        rows.append((cell.row.name, str(cell.seed), cell.state, cell.row.what, changes))
    terminal.table(study.table.title, ("row", "seed", "state", "what", "differs from the base by"), rows)
    dataset = f"{study.data['images']:,} pictures" if study.data["images"] else "pictures that --data names"
    terminal.print(f"\nThe base: {study.base.optim.epochs} epochs of {dataset}; {study.folder}/")


def show(study: Any, terminal: Terminal) -> None:
    """The table as it stands, in the terminal."""
    from dino_ssl.ablations.page import paper_words, spread_words

    figures = study.table.figures
    rows = []
    for row in study.table.rows:
        cells = study.cells(row)
        state = ", ".join(sorted({cell.state for cell in cells} - {"done"})) or ("" if cells else "not run")
        found = []
        for figure in figures:
            found += [spread_words(study.spread(row, figure.name), figure), paper_words(row, figure)]
        rows.append((row.name, row.what, *found, state))
    columns = [text for figure in figures for text in (f"{figure.title}, {figure.unit}", "paper")]
    terminal.table("", ("row", "", *columns, ""), rows)


def told(study: Any) -> dict[str, Any]:
    """What --json gives of a table."""
    rows = []
    for row in study.table.rows:
        runs = []
        for cell in study.cells(row):
            result = cell.result
            figures = {} if result is None else {"values": dict(result.values), "seconds": result.seconds}
            error = {"error": cell.error} if cell.state == "failed" else {}
            runs.append({"seed": cell.seed, "state": cell.state, "folder": str(cell.home), **figures, **error})
        spread = {f.name: one._asdict() for f in study.table.figures if (one := study.spread(row, f.name)) is not None}
        rows.append({"row": row.name, "what": row.what, "paper": dict(row.paper), "ours": spread, "runs": runs})
    return {"table": study.table.name, "scale": study.scale, "data": dict(study.data), "rows": rows}
