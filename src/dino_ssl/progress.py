"""The type of a progress callback, shared by everything that takes longer than two seconds."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int, int], None]
"""Called with (done, total) after each unit of work; total is 0 if unknown."""

StartProgress = Callable[[str], AbstractContextManager[Progress]]
"""Called with a label; the context it returns gives the callback: `with start("features") as progress: ...`."""


@contextmanager
def no_progress(label: str) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda done, total: None


def ignore_progress(done: int, total: int) -> None:
    """Show nothing."""
