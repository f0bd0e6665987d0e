"""What a person did that cannot work: said once, plainly, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A message for the person at the keyboard: what was expected, what came, and what to do about it."""


class Diverged(UserError):  # noqa: N818 - named by what happened
    """The loss stopped being a number: what was trained since the last checkpoint is lost."""


def nearest(word: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x' or 'y'?"`, or the empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def must_reach(name: str, value: float | None, low: float) -> None:
    """Raises UserError where a setting is below its least value, or no number; one that is not given may be None."""
    if value is not None and not value >= low:
        raise UserError(f"{name} must be {low} or more; got {value}.")
