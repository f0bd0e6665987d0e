"""Atomic writes: a file is written to a temporary name, flushed to disk, and renamed."""

import errno
import fcntl
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dino_ssl.errors import UserError

LINES_FORMAT = 1
"""Version of JSON lines files; every line has it, since several processes append to one file."""
PART = ".part"
"""Suffix of a file while it is written; a killed process leaves such a file."""
LOCK = ".lock"
"""File in the folder of a run or an index that the process that writes it has locked."""
OUTPUT_MARK = ".dino-output"
"""File in a folder of images that a command created: they are not part of a dataset around it."""


def atomic_write(path: Path, write: Callable[[Path], Any], *, durable: bool = True) -> Path:
    """Call `write` with a temporary file and rename it to `path`, which holds the old or the new content at any time.

    Raises UserError if the disk is full or the folder is not writable; the old file is kept.

    durable: Flush to disk first, which takes milliseconds; otherwise the file may be empty after a power failure.
    """
    begin = os.fsencode(path.name)[:200].decode(errors="ignore")  # a longer name would leave no room for the rest
    temporary = path.with_name(f".{begin}.{uuid.uuid4().hex}{PART}")
    with write_errors(path, is_kept=os.path.isfile(path)):  # `Path.is_file` raises for a long name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            if durable:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file another name, which may be that of an older file; a copy if the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        atomic_write(target, lambda temporary: shutil.copyfile(source, temporary))


@contextmanager
def write_errors(path: Path, *, is_kept: bool = False) -> Iterator[None]:
    """Turn an OSError of a write to `path` into a UserError that gives the reason, as a full disk.

    is_kept: there is an older file of this name, which a failed write does not change.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error  # torch's writer raises a RuntimeError while it handles an OSError
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        message = f"Cannot write {path}: {cause.strerror or cause}."
        if cause.errno == errno.ENOSPC:
            message += " The disk is full: free some space and run the same command again."
            message += " The last good file is kept." if is_kept else ""
        elif cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message += " Choose another path, or allow writing to its folder."
        raise UserError(message) from error


@contextmanager
def locked(folder: Path, activity: str = "trained") -> Iterator[None]:
    """Create the folder of a run or an index and hold it for this process, until the end or its death.

    Raises UserError, which names the process that holds it. A file system without locks is not checked.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by data workers
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f"{folder} is being {activity} by {file.read() or 'another process'}. Wait until it ends, stop it, or "
                "set another `out`."
            ) from error
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def is_output(names: Collection[bytes]) -> bool:
    """Return True for the entries of a folder that dino wrote: a run, or a marked one. Folders end with a slash."""
    is_run = b"run.json" in names and (b"checkpoints/" in names or b"snapshots/" in names)
    return is_run or OUTPUT_MARK.encode() in names


def has_checkpoint(folder: Path) -> bool:
    """Return True for a run with a checkpoint, which can be resumed unless it is finished."""
    return (folder / "run.json").is_file() and (folder / "checkpoints/last.pt").is_file()


IS_OUTPUT = (
    "{} was written by dino: it is a run, or the result of a command. Expected the folder of the original images. To "
    f"use images that a command wrote, remove the file {OUTPUT_MARK} from their folder."
)


def mark_output(folder: Path) -> None:
    """Create the folder and mark it as output, unless it has other content, such as a dataset."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            (folder / OUTPUT_MARK).write_text("Images written by dino. Remove this file to use them as a dataset.\n")


def claim_output(folder: Path) -> None:
    """Create and mark an output folder. Raises UserError if it has other content, which might be overwritten."""
    mark_output(folder)
    if not (folder / OUTPUT_MARK).exists():
        raise UserError(f"{folder} has other content. Expected a new folder.")


def check_writable(folder: Path) -> None:
    """Raise UserError if an output folder cannot be created or written, before hours of work are lost."""
    with write_errors(folder):  # of a name that is too long
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"The folder {folder} cannot be created: {existing} is a file. Choose another path.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"The folder {folder} is not writable. Choose another path.")


def write_json(path: Path, data: Any) -> Path:
    """Write JSON atomically; file names that are not UTF-8 are preserved."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    return atomic_write(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))


def json_line(row: Mapping[str, Any]) -> str:
    """Return a line of a JSON lines file: one object, with the format version."""
    return json.dumps({"format": LINES_FORMAT, **row}, ensure_ascii=False) + "\n"


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line; the folder is created if needed. Raises UserError if the disk is full."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json_line(row))


def check_format(path: Path, version: Any, known: Any) -> None:
    """Raise UserError if a file has another format version than this code reads."""
    if version != known:
        raise UserError(f"{path} has format {version}; this version of dino reads format {known}.")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or invalid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; incomplete lines are skipped, a missing file has none.

    Raises UserError if a line has another format version.
    """
    rows = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            check_format(path, row.pop("format", LINES_FORMAT), LINES_FORMAT)
            rows.append(row)
    return rows


def remove_parts(folder: Path) -> None:
    """Delete the temporary files of killed processes; no other process may be writing to the folder."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)
