"""What a person did that cannot work: said once, plainly, without a traceback."""

import difflib
from collections.abc import Iterable
from operator import ge, gt, le, lt
from typing import Any


class UserError(Exception):
    """A message for the person at the keyboard: what was expected, what came, and what to do about it."""


class Diverged(UserError):  # noqa: N818 - named by what happened
    """The loss stopped being a number: what was trained since the last checkpoint is lost."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x' or 'y'?"`, or the empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def check_range(
    settings: Any,
    *names: str,
    of: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises UserError where one of these fields lies beyond a bound, or is no number; None was not given, and may be.

    of: what a message says before the name: `--` for a flag, `optim.` for a field of a Run.
    """
    bounds = (("at least", least, ge), ("above", above, gt), ("at most", most, le), ("below", below, lt))
    bounds = [(word, bound, holds) for word, bound, holds in bounds if bound is not None]
    for name in names:
        value = getattr(settings, name)
        if value is None or all(holds(value, bound) for _, bound, holds in bounds):
            continue
        shown = f"{of}{name.replace('_', '-') if of == '--' else name}"
        expected = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds)
        raise UserError(f"{shown} must be {expected}; got {value}.")
