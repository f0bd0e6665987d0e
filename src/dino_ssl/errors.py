"""Errors that a user can fix, and checks that raise them."""

import difflib
import importlib
from collections.abc import Iterable
from operator import ge, gt, le, lt
from typing import Any


class UserError(Exception):
    """An error shown without a traceback: what was expected, what was given, and what to do.

    Settings are named by their field in backticks (`optim.batch_size`); the command line prints the flag instead.
    """


class Diverged(UserError):  # noqa: N818 - named after the event, as in the paper
    """The loss became infinite or nan; everything since the last checkpoint is lost."""


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional dependency. Raises UserError that names the extra if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'This needs {module.partition(".")[0]}: pip install "dino-ssl[{extra}]".') from error


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `"; did you mean 'x' or 'y'?"`, or an empty string if nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def check_value(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise UserError if a number, or one of a tuple, is outside the bounds; None is always accepted, nan never."""
    bounds = (("at least", least, ge), ("above", above, gt), ("at most", most, le), ("below", below, lt))
    bounds = [(word, bound, holds) for word, bound, holds in bounds if bound is not None]
    items = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(holds(item, bound) for item in items for _, bound, holds in bounds):
        expected = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds)
        raise UserError(f"`{name}` must be {expected}; got {value}.")


def check_range(settings: Any, *names: str, prefix: str = "", **bounds: float) -> None:
    """Check these fields of a settings value by `check_value`.

    prefix: of the field's name in the message, e.g. `optim.` for a field of `Run.optim`.
    """
    for name in names:
        check_value(f"{prefix}{name}", getattr(settings, name), **bounds)
