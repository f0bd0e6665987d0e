"""Files that are whole or not there: written aside, flushed to the disk, renamed."""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dino_ssl.errors import UserError

PART = ".part"
"""How the name of a file ends while it is being written; a process that is killed leaves one behind."""


def atomic_write(path: Path, write: Callable[[Path], Any]) -> Path:
    """Calls `write` with a file beside `path`, then renames it: `path` is always the old or the new one.

    A full disk, or a folder that may not be written, is a UserError; the old file stays.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        os.close(handle)
    aside = Path(name)
    try:
        with write_errors(path):
            write(aside)
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            aside.chmod(0o666 & ~_umask())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What writes `path` inside fails with a UserError that says why: a full disk, a folder that may not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error
    except RuntimeError as error:
        if (disk := _behind(error)) is None:
            raise
        raise UserError(_cannot_write(path, disk)) from error


def check_writable(path: Path, what: str, option: str) -> None:
    """Found out now, not after an hour: the nearest folder that exists can be written. what: `path` in words."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{what} {path} cannot be made: {there} is a file. Choose another {option}.")
    if not os.access(there, os.W_OK):
        raise UserError(f"{what} {path} cannot be written. Choose another one with {option}.")


def write_json(path: Path, data: Any) -> Path:
    """Names of files that are no UTF-8 come back as they were."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    return atomic_write(path, lambda aside: aside.write_text(text, "utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing, or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; a line torn by a kill is left out, and a missing file has none."""
    rows = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(text))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def remove_parts(folder: Path) -> None:
    """Takes away what killed processes left behind, in a folder that nobody else writes to."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def _behind(error: BaseException) -> OSError | None:
    """The failed write that torch's writer stumbled over; it then raises a RuntimeError of its own."""
    context = error.__context__
    while context is not None and not isinstance(context, OSError):
        context = context.__context__
    return context


def _cannot_write(path: Path, error: OSError) -> str:
    said = f"Cannot write {path}: {error.strerror or error}."
    if error.errno == errno.ENOSPC:
        kept = " The last good file is kept." if path.is_file() else ""
        return f"{said} The disk is full: free some space and run the same command again.{kept}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{said} Choose a folder that may be written, with --out."
    return said


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
