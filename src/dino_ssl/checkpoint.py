"""Checkpoints: dicts of tensors and plain data, written atomically and loaded with `weights_only=True`."""

from pathlib import Path
from typing import Any

import torch

from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, check_format
from dino_ssl.models.weights import read_file

FORMAT = 1
"""Version of the checkpoint's layout."""


KEYS = {
    "format": int,
    "run": dict,
    "step": int,
    "method": dict,
    "backbone": str,
    "optimizer": dict,
    "scaler": dict,
    "best": dict,
    "data": str,
}
"""Content of a checkpoint and its types: the complete Run, from to_dict; optimizer steps taken; state dict of the
Method; in it the prefix of the backbone that is evaluated and exported, `teacher.backbone.`; states of optimizer and
gradient scaler; the best online evaluation (name, value, epoch); fingerprint of the training set. `preprocessing`, of
the backbone's images, is read by `models.pretrained.load` only."""


def save(path: Path, content: dict[str, Any]) -> Path:
    """Write a checkpoint atomically. Raises UserError if the disk is full or the folder is not writable."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # torch.save to a path keeps the file open after a failed write
            torch.save(content, file)

    return atomic_write(path, write)


def other_checkpoints(path: Path) -> str:
    """Return a sentence about the other checkpoints in the folder of a damaged one; empty if there are none."""
    others = ", ".join(sorted(other.name for other in path.parent.glob("*.pt") if other != path))
    return f" The same folder has {others}: copy one over it to resume from there." if others else ""


def load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint on the CPU, without running code from the file.

    mmap: read tensors only when they are used. Raises UserError if it is missing, damaged, not a checkpoint of this
    project, or of a different format version.
    """
    if not path.is_file():
        raise UserError(f"No checkpoint at {path}. A run keeps its newest one in RUN/checkpoints/last.pt.")
    try:
        content = read_file(path, mmap=mmap)
    except UserError as error:
        raise UserError(f"{error}{other_checkpoints(path)}") from error
    content = content if isinstance(content, dict) else {}
    check_format(path, content.get("format", FORMAT), FORMAT)
    if missing := [key for key in KEYS if key not in content]:
        raise UserError(f"{path} is not a training checkpoint of dino: it lacks {', '.join(missing)}.")
    if wrong := [key for key, kind in KEYS.items() if not isinstance(content[key], kind)]:
        raise UserError(
            f"{path} is damaged: {', '.join(f'{key} is a {type(content[key]).__name__}' for key in wrong)}."
        )
    if content["step"] < 0:
        raise UserError(f"{path} is damaged: step is {content['step']}.")
    return content
