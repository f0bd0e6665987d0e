"""Durations, sizes, results and foreign names as text."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from html import escape
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor, change a terminal's state, or reverse the order of a text."""
FORMULA = ("=", "+", "-", "@")
"""First characters of a formula in a spreadsheet."""


def visible(text: str, keep: str = "") -> str:
    r"""Return a foreign text with control characters, except those in `keep`, as escapes such as \x1b.

    A file name may have newlines and terminal commands, which would forge lines of the output.
    """
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def for_terminal(text: str) -> str:
    """Return a message without control characters but newlines and tabs; undecodable bytes become question marks."""
    return visible(text.encode("utf-8", "replace").decode(), keep="\n\t")


def csv_text(value: Any) -> Any:
    """Return a cell; a quote before text that a spreadsheet would run as a formula, other values unchanged."""
    return f"'{value}" if isinstance(value, str) and value[:1] in FORMULA else value


def duration(seconds: float) -> str:
    """Return `8 s`, `3 min 20 s`, `25 min`, `2 h 05 min`, `3 d 4 h`: two units at most."""
    whole = max(0, round(seconds))
    minutes, hours = round(whole / 60), round(whole / 3600)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min" + (f" {whole % 60:02d} s" if whole % 60 else "")
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 48 * 60 else f"{hours // 24} d {hours % 24} h"


def format_bytes(count: int) -> str:
    """Return `312 bytes`, `4.1 kB`, `147 GB`: decimal units."""
    if count < 1000:
        return f"{count} bytes"
    value, units = count / 1000, ["kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def plural(count: int, noun: str) -> str:
    """Return `1 image`, `2,000 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Summarized(ABC):
    """A result that is shown by its summary: as one line, or as a table in a notebook."""

    @property
    @abstractmethod
    def summary(self) -> Mapping[str, object]:
        """Names and values."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}: {value}' for name, value in self.summary.items())})"

    def _repr_html_(self) -> str:
        cells = ((escape(name), escape(str(value))) for name, value in self.summary.items())
        return f"<table>{''.join(f'<tr><th>{name}</th><td>{value}</td></tr>' for name, value in cells)}</table>"
