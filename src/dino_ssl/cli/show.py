"""dino presets, dino show, dino report: what there is to start from, and what a run was."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dino_ssl.cli.options import Flag, parse
from dino_ssl.config import to_dict
from dino_ssl.terminal import Terminal, command_output


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """List the recipes, each with what was reported for it."""

    json: Flag = False
    """One JSON object on standard output."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Print every setting of a recipe, or of a run, as the flag that changes it."""

    preset: tyro.conf.Positional[str]
    """A recipe's name (`dino presets`), MODULE:FUNCTION, or a run's folder."""
    json: Flag = False
    """The complete Run as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write the page of a run, or of a table that `dino ablate` ran, from what lies in its folder."""

    run: tyro.conf.Positional[str]
    """A run's folder, or a table's name (table7) or folder."""
    scale: Literal["small", "paper"] | None = None
    """Which scale of a table, where it was run at both."""
    markdown: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write a table as Markdown with a picture of its curves into this folder too, as docs/ablations/ has them."""
    tables: str = "runs/ablate"
    """Folder of all tables: what `dino ablate` was given as --out."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def presets(argv: Sequence[str]) -> int:
    options = parse(PresetsOptions, argv, "dino presets", "  dino presets\n  dino show vits16")
    with command_output(options.json) as (terminal, give):
        from dino_ssl.presets import PRESETS

        about = {name: " ".join((make.__doc__ or "").split()) for name, make in PRESETS.items()}
        terminal.table("Recipes", ("name", "what it is, and what was reported for it"), list(about.items()))
        terminal.print("\ndino show NAME prints its settings; dino train photos/ --preset NAME trains with it.")
        give({"presets": about})
    return 0


def show(argv: Sequence[str]) -> int:
    examples = "  dino show vits16\n  dino show runs/photos\n  dino show vits16 --json > run.json"
    options = parse(ShowOptions, argv, "dino show", examples)
    with command_output(options.json) as (terminal, give):
        from dino_ssl.api.resolve import settings_of, typed
        from dino_ssl.presets import resolve
        from dino_ssl.run import read_run

        folder = Path(options.preset)
        run = read_run(folder) if folder.is_dir() else resolve(options.preset)
        described: dict[str, Any] = to_dict(run)
        rows = [
            (name, str(value)) if isinstance(described.get(name), dict) else typed(name, value)
            for name, value in settings_of(run).items()
            if name != "type"
        ]
        terminal.table(options.preset, ("setting", "value"), rows)
        give(described)
    return 0


def report(argv: Sequence[str]) -> int:
    examples = "  dino report runs/photos\n  dino report table7\n  dino report fig6 --markdown docs/ablations"
    options = parse(ReportOptions, argv, "dino report", examples)
    with command_output(options.json) as (terminal, give):
        if (Path(options.run) / "run.json").is_file() or (_is_path(options.run) and not _is_study(options.run)):
            from dino_ssl.report.run_report import write_report

            path = write_report(Path(options.run))
            terminal.print(f"Report     {path}")
            give({"report": str(path)})
        else:
            give(_table_report(options, terminal))
    return 0


def _is_path(name: str) -> bool:
    return Path(name).exists() or "/" in name


def _is_study(folder: str) -> bool:
    return (Path(folder) / "study.json").is_file()


def _table_report(options: ReportOptions, terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.ablations.markdown import write_study_markdown
    from dino_ssl.ablations.page import write_study_page
    from dino_ssl.ablations.results import find_study
    from dino_ssl.cli.ablate import print_results, study_json

    study = find_study(options.run, Path(options.tables), options.scale)
    print_results(study, terminal)
    page = write_study_page(study)
    terminal.print(f"Report     {page}")
    result = {**study_json(study), "report": str(page)}
    if options.markdown is not None:
        written = write_study_markdown(study, Path(options.markdown))
        terminal.print(f"Markdown   {', '.join(map(str, written))}")
        result["markdown"] = [str(path) for path in written]
    return result
