"""The report's settings: all of them, those that are not the defaults first, and why the plan chose them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_ssl.config import to_dict
from dino_ssl.errors import UserError
from dino_ssl.files import read_json
from dino_ssl.report import html
from dino_ssl.run import read_run

SECTIONS = {
    "data": "ImageDataset", "backbone": "Network", "method": "Method", "views": "Views", "optim": "Optimizer",
    "knn": "k-NN while training",
}  # fmt: skip


def plan_section(run_dir: Path) -> str:
    """What the plan chose, and its reasons."""
    reasons = read_json(run_dir / "plan.json") or []
    rows = [[str(r.get(key, "")) for key in ("name", "value", "why")] for r in reasons if isinstance(r, dict)]
    return html.section("Why these settings", "What the plan chose from the data and the machine.", html.table(rows))


def settings_section(run_dir: Path, run: Mapping) -> str:
    """A card for each part of the run."""
    try:
        known = read_run(run_dir)
        usual, run = _usual(known), {**run, "evals": list(map(str, known.evals))}  # as they are typed
    except (UserError, TypeError, ValueError):  # a run of another version: shown as it is, nothing muted
        usual = {}
    groups: dict[str, dict[str, Any]] = {
        "Run": {name: value for name, value in run.items() if not isinstance(value, dict)}
    }
    groups |= {SECTIONS.get(str(name), str(name)): value for name, value in run.items() if isinstance(value, dict)}
    defaults = {"Run": usual} | {SECTIONS.get(name, name): usual.get(name, {}) for name in run}
    cards = []
    for title, values in groups.items():
        standard = defaults.get(title) or {}
        rows = [
            (name.replace("_", " "), shown(value), name in standard and standard[name] == value)
            for name, value in values.items()
            if name != "type"
        ]
        rows.sort(key=lambda row: row[2])
        if rows:
            cards.append(html.definitions(title, "" if title == "Run" else str(values.get("type", "")), rows))
    return html.section(
        "Settings",
        "All of them, as run.json has them; those at their default are pale.",
        f'<div class="grid settings">{"".join(cards)}</div>' if cards else "",
    )


def _usual(value: Any) -> dict[str, Any]:
    """The defaults of a settings value's own types, as plain data; a nested value is compared with its own
    type's.
    """
    found = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if dataclasses.is_dataclass(own):
            found[field.name] = _usual(own)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = to_dict(field.default_factory())
    return found


def shown(value: Any) -> str:
    """A settings value in a few words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, list):
        return (
            f"{len(value)}: {', '.join(map(shown, value[:8]))}, …"
            if len(value) > 8
            else ", ".join(map(shown, value)) or "–"
        )
    if isinstance(value, dict):
        inside = ", ".join(f"{name} {shown(item)}" for name, item in value.items() if name != "type")
        return f"{value.get('type', '')}({inside})"
    return "–" if value is None or value == "" else str(value)
