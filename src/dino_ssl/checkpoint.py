"""Checkpoints: dicts of tensors and plain data, written atomically and loaded with `weights_only=True`."""

from pathlib import Path
from typing import Any, TypedDict

import torch

from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write
from dino_ssl.models.weights import read_file

FORMAT = 1
"""Version of the checkpoint's layout."""


class Checkpoint(TypedDict):
    """The content of a checkpoint file."""

    format: int
    run: dict[str, Any]
    """The complete Run, from to_dict."""
    step: int
    """Optimizer steps taken."""
    method: dict[str, Any]
    """State dict of the Method: student, teacher, center."""
    backbone: str
    """Prefix in `method` of the backbone that is evaluated and exported: `teacher.backbone.`."""
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    best: dict[str, Any]
    """The best online evaluation: name, value, epoch; empty before the first."""
    data: str
    """Fingerprint of the training set."""


def save(path: Path, content: Checkpoint) -> Path:
    """Write a checkpoint atomically. Raises UserError if the disk is full or the folder is not writable."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # torch.save to a path keeps the file open after a failed write
            torch.save(dict(content), file)

    return atomic_write(path, write)


def load(path: Path, *, mmap: bool = False) -> Checkpoint:
    """Load a checkpoint on the CPU, without running code from the file.

    mmap: read tensors only when they are used. Raises UserError if it is missing, damaged, not a checkpoint of this
    project, or of a different format version.
    """
    if not path.is_file():
        raise UserError(f"No checkpoint at {path}. A run keeps its newest one in RUN/checkpoints/last.pt.")
    try:
        content = read_file(path, mmap=mmap)
    except UserError as error:
        others = ", ".join(sorted(other.name for other in path.parent.glob("*.pt") if other != path))
        hint = f" The same folder has {others}: copy one over it to resume from there." if others else ""
        raise UserError(f"{error}{hint}") from error
    content = content if isinstance(content, dict) else {}
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {content['format']}; this version of dino reads format {FORMAT}.")
    if missing := [key for key in Checkpoint.__annotations__ if key not in content]:
        raise UserError(f"{path} is not a training checkpoint of dino: it lacks {', '.join(missing)}.")
    return content  # pyright: ignore[reportReturnType]
