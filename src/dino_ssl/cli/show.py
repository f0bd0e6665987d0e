"""dino presets, dino show, dino report: lists of presets, settings of a run, and report pages."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dino_ssl.cli.images import run_command
from dino_ssl.cli.options import Flag, Json, Trust
from dino_ssl.config import to_dict
from dino_ssl.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """List the presets, each with its published result."""

    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Print every setting of a preset or a run, with the flag that changes it."""

    preset: tyro.conf.Positional[str]
    """Name of a preset (`dino presets`), MODULE:FUNCTION, or a run folder."""
    trust: Trust = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write the report page of a run, or of a table of the paper that `dino ablate` ran."""

    run: tyro.conf.Positional[str]
    """A run folder, or the name (table7) or folder of a table."""
    scale: Literal["small", "paper"] | None = None
    """Scale of the table. Default: small if it was run at both."""
    markdown: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the page of a table and the figure of its curves, as in docs/ablations/; default: of its results."""
    tables: str = "runs/ablate"
    """Parent folder of the results of all tables: --out of `dino ablate`."""
    thumbnails: Flag = True
    """Show images of the dataset and paths of files in the report of a run; --no-thumbnails omits both."""
    trust: Trust = False
    json: Json = False


def presets(argv: Sequence[str]) -> int:
    """Run `dino presets`."""
    return run_command(_presets, PresetsOptions, argv, "dino presets", "  dino presets\n  dino show vits16")


def _presets(options: PresetsOptions, terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.presets import PRESETS

    texts = {name: " ".join((preset.__doc__ or "").split()) for name, preset in PRESETS.items()}
    terminal.table("Presets", ("name", "description and published result"), list(texts.items()))
    terminal.print("\ndino show NAME prints the settings; dino train photos/ --preset NAME trains with them.")
    return {"presets": texts}


def show(argv: Sequence[str]) -> int:
    """Run `dino show`."""
    examples = "  dino show vits16\n  dino show runs/photos\n  dino show vits16 --json > run.json"
    return run_command(_show, ShowOptions, argv, "dino show", examples)


def _show(options: ShowOptions, terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.cli.command_line import typed
    from dino_ssl.config import flatten
    from dino_ssl.presets import resolve
    from dino_ssl.run import read_run

    folder = Path(options.preset)
    run = read_run(folder, trust=options.trust) if folder.is_dir() else resolve(options.preset)
    rows = [
        (name, value) if dataclasses.is_dataclass(getattr(run, name, None)) else typed(name, value)
        for name, value in flatten(run).items()
    ]
    terminal.table(options.preset, ("setting", "value"), rows)
    return to_dict(run)


def report(argv: Sequence[str]) -> int:
    """Run `dino report`."""
    examples = "  dino report runs/photos\n  dino report table7\n  dino report fig6 --markdown docs/ablations"
    return run_command(_report, ReportOptions, argv, "dino report", examples)


def _report(options: ReportOptions, terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.ablations.page import write_page
    from dino_ssl.ablations.study import find_study
    from dino_ssl.cli.ablate import print_results, study_json
    from dino_ssl.report.run_report import write_report

    folder, result = Path(options.run), {}
    is_path = "/" in options.run or folder.exists()
    if (folder / "run.json").is_file() or (is_path and not (folder / "study.json").is_file()):
        page = write_report(folder, thumbnails=options.thumbnails, trust=options.trust)
    else:
        study = find_study(options.run, Path(options.tables), options.scale)
        print_results(study, terminal)
        page = write_page(study, None if options.markdown is None else Path(options.markdown))
        result = study_json(study)
    terminal.print(f"Report     {page}")
    return {**result, "report": str(page)}
