"""Saving and loading: written to the side and renamed, so that a file is whole or not there; never any code.

A checkpoint is a dict of plain data and tensors (the keys of `Saved`), read with weights_only.
"""

import errno
import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch

from dino.errors import UserError


class Saved(TypedDict):
    """What a checkpoint file holds."""

    run: dict[str, Any]
    """The complete Run, as to_dict gives it."""
    step: int
    """Optimizer steps taken."""
    method: dict[str, Any]
    """State of the Method: student, teacher, center."""
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    best: dict[str, Any]
    """The best evaluation so far: value, epoch; empty without one."""
    data: str
    """Fingerprint of the pictures trained on."""


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Calls `write` with a file beside `path`, then renames it: `path` is always the old or the new one.

    A full disk, or a folder that may not be written, is a UserError; the old file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.{_advice(error)}") from error
    aside = Path(name)
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.{_advice(error)}") from error
    except RuntimeError as error:
        if (disk := _behind(error)) is None:
            raise
        raise UserError(f"Cannot write {path}: {disk.strerror or disk}.{_advice(disk)}") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_json(path: Path, data: Any) -> Path:
    return write_whole(
        path, lambda aside: aside.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    )


def save(path: Path, saved: Saved) -> Path:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:  # given a path, torch keeps a failed file open, and its space taken
            torch.save(dict(saved), file)

    return write_whole(path, write)


def load(path: Path) -> Saved:
    """A checkpoint of this project on the CPU; runs no code from the file. UserError where it is none."""
    if not path.is_file():
        raise UserError(f"No checkpoint at {path}. A run keeps its newest in RUN/checkpoints/last.pt.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats; what matters is whether it reads
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of any origin make the reader stumble in any way
        raise UserError(f"{path} is not a readable checkpoint: {_trouble(error)}") from error
    missing = [key for key in Saved.__annotations__ if not isinstance(saved, dict) or key not in saved]
    if missing:
        raise UserError(f"{path} is not a training checkpoint of dino: it lacks {', '.join(missing)}.")
    return saved  # pyright: ignore[reportReturnType]


def _trouble(error: Exception) -> str:
    """Why a file could not be read. torch's own words for a foreign pickle end in advice to trust it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is cut short, no file of torch, or holds more than tensors and plain data."
    return (str(error) or type(error).__name__).splitlines()[0]


def _behind(error: BaseException) -> OSError | None:
    """The failed write that torch's writer stumbled over; it then raises a RuntimeError of its own."""
    context = error.__context__
    while context is not None and not isinstance(context, OSError):
        context = context.__context__
    return context


def _advice(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return (
            " The disk is full: free some space and run the same command again. The last good file is kept."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return " Choose a folder that may be written, with --out."
    return ""


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
