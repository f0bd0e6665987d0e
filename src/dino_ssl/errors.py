"""Errors that a user can fix, and checks that raise them."""

import difflib
import errno
import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


_NO_MEMORY = re.compile(
    r"out of memory|(can(no|')t|failed to) (allocate|start new thread|map segment)|bad_alloc|Insufficient memory|"
    r"could not create a (primitive|memory object)$|libllvmlite",
    re.IGNORECASE | re.MULTILINE,
)
"""In errors of torch, oneDNN, OpenCV, numba, threads and the dynamic linker if memory is exhausted."""


class OutOfMemory(UserError):  # noqa: N818 - named after the event
    """Memory, or the address space of the process, is exhausted."""


def memory_error(error: BaseException) -> OutOfMemory | None:
    """Return the error to raise instead of one of exhausted memory; None for other errors."""
    is_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    lines = [line.strip() for line in str(error).splitlines() if _NO_MEMORY.search(line)]
    if not is_memory and not (lines and isinstance(error, RuntimeError | OSError | ImportError)):
        return None
    reason = lines[-1] if lines else type(error).__name__
    return OutOfMemory(
        f"Memory ran out: {reason}\nUse smaller batches or images, fewer `workers`, or allow more memory (ulimit -v "
        "limits the address space)."
    )


def system_error(error: BaseException) -> UserError | None:
    """Return the error to raise instead of one of the system about a file; None for other errors."""
    if not isinstance(error, OSError) or not error.strerror or error.filename is None:
        return None
    name = str(error.filename)
    name = name if len(name) < 200 else f"{name[:100]}..."
    return UserError(f"{name}: {error.strerror}. Check the path, its permissions and the disk.")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemory instead of the many errors of exhausted memory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if (memory := memory_error(error)) is None:
            raise
        raise memory from error


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
        raise UserError(f"`{name}` must be {expected}; got {' '.join(map(str, items))}.")


def check_range(settings: Any, *names: str, prefix: str = "", **bounds: float) -> None:
    """Check these fields of a settings value by `check_value`.

    prefix: of the field's name in the message, e.g. `optim.` for a field of `Run.optim`.
    """
    for name in names:
        check_value(f"{prefix}{name}", getattr(settings, name), **bounds)
