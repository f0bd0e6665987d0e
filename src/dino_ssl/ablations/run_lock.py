"""A row's folder while it is worked on: one process holds it, and notes lines of JSON in it."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dino_ssl import distributed
from dino_ssl.runtime import Runtime


class RunLocked(Exception):  # noqa: N818 - it is no error
    """Another process works on this row."""


@contextlib.contextmanager
def run_lock(folder: Path, rt: Runtime) -> Iterator[None]:
    """Holds the row's folder for as long as the `with` lasts. Raises Elsewhere where another process holds it."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return

    def take() -> bool:
        nonlocal file
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        return True

    file = None
    if not distributed.run_on_rank0(take):
        raise RunLocked(str(folder))
    try:
        yield
    finally:
        if file is not None:
            file.close()


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """One more line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(dict(row)) + "\n")
