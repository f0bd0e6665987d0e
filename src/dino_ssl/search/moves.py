"""Move files into a folder, with a journal to move them back. No file is deleted or overwritten.

The journal, DIR/moved.jsonl, names the old and the new place of every file before the first one is moved, and a file
exists at one of the two, or at both, at any moment. So after an interruption, the same move or its undo completes.
"""

import errno
import filecmp
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dino_ssl.errors import UserError
from dino_ssl.files import LINES_FORMAT, OUTPUT_MARK, PART, mark_output, read_lines, write_errors
from dino_ssl.progress import Progress

JOURNAL = "moved.jsonl"
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
"""Errors of hard links between two file systems, and on those that have none."""


class Move(NamedTuple):
    """A file, and where it goes."""

    source: Path
    target: Path


class Refused(NamedTuple):
    """A file that stays where it is."""

    path: Path
    reason: str


def move_files(moves: list[Move], folder: Path, progress: Progress | None = None) -> list[Refused]:
    """Write the journal of `folder`, move the files, and return those that could not be moved.

    Raises UserError if the folder has other content than files moved before, or cannot be written.
    """
    mark_output(folder)
    journal, others = folder / JOURNAL, [path.name for path in folder.iterdir() if path.name != OUTPUT_MARK]
    if others and not journal.is_file():
        raise UserError(f"{folder} has other content: {others[0]!r}. Expected a new folder, or one of an earlier move.")
    with write_errors(journal), journal.open("a") as file:
        file.write("\n" if others else "")  # after a line that was cut by a full disk
        for move in moves:
            target = os.path.relpath(move.target.absolute(), folder.absolute())  # the folder may be renamed
            paths = {"source": str(move.source.absolute()), "target": target}
            file.write(json.dumps({"format": LINES_FORMAT, **paths}) + "\n")  # in ASCII: any name is one line
        file.flush()
        os.fsync(file.fileno())
    return _move_all(moves, progress)


def undo_moves(folder: Path, progress: Progress | None = None) -> tuple[int, list[Refused]]:
    """Move the files of a folder's journal back; return the number of those moved, and those that could not be.

    If nothing is left to move back, the journal and empty folders are removed. Raises UserError without a journal.
    """
    journal = folder / JOURNAL
    if not journal.is_file():
        raise UserError(f"{folder} has no {JOURNAL}: expected a folder to which duplicates were moved.")
    lines = reversed(read_lines(journal))
    moves = dict.fromkeys(Move(folder.absolute() / line["target"], Path(line["source"])) for line in lines)
    moved = [move for move in moves if os.path.lexists(move.source)]
    lost = [Refused(move.source, "is missing") for move in moves if not any(map(os.path.lexists, move))]
    refused = _move_all(moved, progress) + lost
    for part in folder.rglob(f".*{PART}"):  # of killed copies
        part.unlink()
    if not refused:
        (folder / OUTPUT_MARK).unlink(missing_ok=True)
        journal.unlink()
    for root, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(root):
            os.rmdir(root)
    return len(moved) + len(lost) - len(refused), refused


def _move_all(moves: Iterable[Move], progress: Progress | None) -> list[Refused]:
    refused, moves = [], list(moves)
    for done, move in enumerate(moves, 1):
        try:
            _move(*move)
        except OSError as error:
            refused.append(Refused(move.source, error.strerror or str(error)))
        if progress is not None:
            progress(done, len(moves))
    return refused


def _move(source: Path, target: Path) -> None:
    """Move a file; raise OSError if another file has the name, or if it cannot be moved.

    `os.rename` would overwrite a file, so the new name is made before the old one is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.parent.samefile(target.parent):
        raise OSError("the folder to move to is a link to its own folder")
    complete = os.path.lexists(target)
    if complete and not filecmp.cmp(source, target, shallow=False):
        raise OSError(f"{target} is another file")
    if not complete:
        _duplicate(source, target)
    try:
        source.unlink()
    except OSError:
        if not complete:  # the folder of the source cannot be written
            target.unlink()
        raise


def _duplicate(source: Path, target: Path) -> None:
    """Give a file a second name; on a file system without hard links, or another one, copy it durably."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        part = target.with_name(f".{uuid.uuid4().hex}{PART}")
        try:
            shutil.copy2(source, part)
            _sync(part)
            part.rename(target)
            _sync(target.parent)
        finally:
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
