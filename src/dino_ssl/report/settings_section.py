"""Report sections: the reasons of the plan, and all settings of the run."""

import dataclasses
from pathlib import Path
from typing import Any

from dino_ssl.config import format_value, to_dict, type_name
from dino_ssl.files import read_json
from dino_ssl.report import html
from dino_ssl.run import Run

TITLES = {
    "data": "Dataset", "val": "Validation set", "backbone": "Backbone", "method": "Method", "views": "Views",
    "optim": "Optimizer", "online_eval": "Online evaluation",
}  # fmt: skip
MAX_TEXT = 120


def plan_section(run_dir: Path) -> str:
    """Return the settings that the plan chose, with its reasons."""
    reasons = (read_json(run_dir / "plan.json") or {}).get("plan", [])
    rows = [[str(reason.get(key, "")) for key in ("name", "value", "reason")] for reason in reasons]
    return html.section("Plan", "Settings chosen for this dataset and machine, with reasons.", html.table(rows))


def settings_section(run: Run) -> str:
    """Return a card for the run's own settings, and one for each nested value."""
    nested = {
        field.name: value
        for field in dataclasses.fields(run)
        if dataclasses.is_dataclass(value := getattr(run, field.name))
    }
    cards = [_card("Run", "", run), *(_card(TITLES[name], type_name(type(v)), v) for name, v in nested.items())]
    return html.section(
        "Settings",
        "All settings of run.json; defaults are gray.",
        f'<div class="grid settings">{"".join(cards)}</div>',
    )


def _card(title: str, kind: str, settings: Any) -> str:
    rows = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if not dataclasses.is_dataclass(value):
            is_default = value == field.default or (
                field.default_factory is not dataclasses.MISSING and value == field.default_factory()
            )
            plain = list(map(str, value)) if field.name == "evals" else to_dict(value)  # evals as typed
            rows.append((field.name.replace("_", " "), format_setting(plain), is_default))
    return html.settings_card(title, kind, sorted(rows, key=lambda row: row[2]))


def format_setting(value: Any) -> str:
    """Return a JSON value as text of at most MAX_TEXT characters."""
    text = format_value(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
