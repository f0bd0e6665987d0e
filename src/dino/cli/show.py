"""dino presets, dino show, dino report: what there is to start from, and what a run was."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.cli.options import Switch, parse
from dino.config import to_dict
from dino.terminal import speaking


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """List the recipes, each with what was reported for it."""

    json: Switch = False
    """One JSON object on standard output."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Print every setting of a recipe, or of a run, as the flag that changes it."""

    preset: tyro.conf.Positional[str]
    """A recipe's name (`dino presets`), MODULE:FUNCTION, or a run's folder."""
    json: Switch = False
    """The complete Run as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a run's report.html again, from what lies in its folder."""

    run: tyro.conf.Positional[str]
    """A run's folder."""
    json: Switch = False
    """One JSON object on standard output, messages on standard error."""


def presets(argv: Sequence[str]) -> int:
    options = parse(PresetsOptions, argv, "dino presets", "  dino presets\n  dino show vits16")
    with speaking(options.json) as (terminal, give):
        from dino.presets import PRESETS

        about = {name: " ".join((make.__doc__ or "").split()) for name, make in PRESETS.items()}
        terminal.table("Recipes", ("name", "what it is, and what was reported for it"), list(about.items()))
        terminal.say("\ndino show NAME prints its settings; dino train photos/ --preset NAME trains with it.")
        give({"presets": about})
    return 0


def show(argv: Sequence[str]) -> int:
    examples = "  dino show vits16\n  dino show runs/photos\n  dino show vits16 --json > run.json"
    options = parse(ShowOptions, argv, "dino show", examples)
    with speaking(options.json) as (terminal, give):
        from dino.presets import resolve
        from dino.session.begin import settings_of
        from dino.training import read_run

        folder = Path(options.preset)
        run = read_run(folder) if folder.is_dir() else resolve(options.preset)
        described: dict[str, Any] = to_dict(run)
        rows = [
            (name, str(value)) if isinstance(described.get(name), dict) else _typed(name, value)
            for name, value in settings_of(run).items()
            if name != "type"
        ]
        terminal.table(options.preset, ("setting", "value"), rows)
        give(described)
    return 0


def _typed(name: str, value: Any) -> tuple[str, str]:
    """A setting as it is typed: a switch has no value."""
    from dino.session.begin import flag, shown

    if isinstance(value, bool):
        place, _, field = name.rpartition(".")
        return (flag(name) if value else flag(f"{place}.no-{field}".lstrip(".")), "")
    return flag(name), shown(value)


def report(argv: Sequence[str]) -> int:
    options = parse(ReportOptions, argv, "dino report", "  dino report runs/photos")
    with speaking(options.json) as (terminal, give):
        from dino.analysis.report import write_report

        path = write_report(Path(options.run))
        terminal.say(f"Report     {path}")
        give({"report": str(path)})
    return 0
