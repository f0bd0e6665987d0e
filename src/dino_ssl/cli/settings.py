"""Settings of a Run as they are typed on the command line."""

from collections.abc import Collection
from typing import Any

from dino_ssl.cli.command_line import network_named
from dino_ssl.cli.flags import flag
from dino_ssl.config import differences, edit, format_value
from dino_ssl.methods import METHODS
from dino_ssl.run import Run


def typed(name: str, value: Any) -> tuple[str, str]:
    """Return the flag and the value of a setting; a boolean has no value, a method its short name."""
    if isinstance(value, bool):
        parent, _, field = name.rpartition(".")
        return (flag(name) if value else flag(f"{parent}.no-{field}".lstrip(".")), "")
    if name == "method":
        value = next((short for short, kind in METHODS.items() if kind.__name__ == value), value)
    return flag(name), format_value(value)


def cli_diff(before: Run, after: Run, omit: Collection[str] = ()) -> str:
    """Return the flags that turn one run into another, except for some dotted fields."""
    words = []
    if type(after.method) is not type(before.method):
        before = edit(before, method=type(after.method)())
        words.append(" ".join(typed("method", type(after.method).__name__)))
    if type(after.backbone) is not type(before.backbone):
        words.append(f"--network {after.backbone.spec}")
        before = edit(before, backbone=network_named(after.backbone.spec))
    changed = [(name, value) for name, _, value in differences(before, after) if name not in omit]
    return " ".join([*words, *(" ".join(typed(name, value)).rstrip() for name, value in changed)])
