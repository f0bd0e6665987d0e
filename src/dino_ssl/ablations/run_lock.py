"""Exclusive access to the folder of a run: one process at a time trains it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dino_ssl import distributed


class RunLocked(Exception):  # noqa: N818 - not an error
    """Another process trains this run."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, on rank 0. Raise RunLocked on all ranks if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with contextlib.ExitStack() as stack:

        def acquire() -> bool:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / ".lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

        if not distributed.run_on_rank0(acquire):
            raise RunLocked(str(folder))
        yield
