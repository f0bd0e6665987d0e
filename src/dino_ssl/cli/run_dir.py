"""The output folder of a run: a new one, or that of the run to resume."""

import itertools
from pathlib import Path
from typing import Any

from dino_ssl.api.resolve import ExistingRun, find_run
from dino_ssl.errors import UserError
from dino_ssl.files import check_writable
from dino_ssl.terminal import Terminal


def choose_run_dir(
    options: Any, terminal: Terminal, resume: ExistingRun | None, *, out: str | None
) -> tuple[Path, ExistingRun | None]:
    """Return the output folder, and the run to resume in it. Never returns the folder of another run.

    resume: the run of --resume. out: the value of --out; None if it was not given.
    """
    if resume is not None:
        return Path(options.resume), resume
    folder = Path(out or f"runs/{options.name or _default_name(options)}")
    existing = find_run(folder, trust=options.trust)
    check_writable(folder)
    if existing is None or options.dry_run:
        return folder, None
    free = next(Path(f"{folder}-{n}") for n in itertools.count(2) if not Path(f"{folder}-{n}").exists())
    if existing.finished:
        if out or options.name:
            raise UserError(f"{folder} has a finished run. Choose another folder: --out {free}")
        terminal.print(f"{folder} has a finished run; this one is written to {free}.")
        return free, None
    state = f"{folder} has a run that stopped at step {existing.step} of {existing.steps}."
    if options.yes:
        terminal.print(f"{state} Resuming it.")
        return folder, existing
    if not terminal.is_interactive:
        raise UserError(f"{state}\nTo resume it:          --resume {folder}\nTo start another run:  --out {free}")
    match terminal.ask(state, {"r": "resume it", "n": f"start a new run in {free}", "q": "quit"}):
        case "r":
            return folder, existing
        case "n":
            return free, None
    raise KeyboardInterrupt


def _default_name(options: Any) -> str:
    preset = (options.preset_name or "").rpartition(":")[2]
    return "-".join(part for part in (options.run.data.short_name or "images", preset) if part)
