"""Where a run goes: a folder of its own, or the one of the run that goes on."""

import itertools
from pathlib import Path

from dino_ssl.api.resolve import ExistingRun, find_run
from dino_ssl.cli.command_line import Options
from dino_ssl.data.folder import Folder
from dino_ssl.errors import UserError
from dino_ssl.files import check_writable
from dino_ssl.terminal import Terminal


def choose_run_dir(options: Options, terminal: Terminal, *, chosen: bool) -> tuple[Path, ExistingRun | None]:
    """The run's folder, and the run that is there and goes on. Takes no folder of another run.

    chosen: whether the line says `--out`.
    """
    if options.resume is not None:
        return Path(options.resume), find_run(Path(options.resume))
    folder = Path(options.run.out if chosen else f"runs/{options.name or _named(options)}")
    found = find_run(folder)
    check_writable(folder)
    if found is None or options.dry_run:
        return folder, None
    free = next(Path(f"{folder}-{n}") for n in itertools.count(2) if not Path(f"{folder}-{n}").exists())
    if found.finished:
        if chosen or options.name:
            raise UserError(f"{folder} holds a finished run. Choose another folder: --out {free}")
        terminal.print(f"{folder} holds a finished run; this one goes to {free}.")
        return free, None
    there = f"{folder} holds a run that stopped at step {found.step} of {found.steps}."
    if options.yes:
        terminal.print(f"{there} It goes on.")
        return folder, found
    if not terminal.is_interactive:
        raise UserError(f"{there}\nGo on with it:      --resume {folder}\nOr start another:   --out {free}")
    answers = {"r": "to resume it", "n": f"for a new run in {free}", "q": "to quit"}
    match terminal.ask(there, answers):
        case "r":
            return folder, found
        case "n":
            return free, None
    raise KeyboardInterrupt


def _named(options: Options) -> str:
    data = options.run.data
    source = Path(data.path).resolve().name if isinstance(data, Folder) else "scenes"
    preset = (options.recipe or "").rpartition(":")[2]
    return "-".join(part for part in (source or "images", preset) if part)
