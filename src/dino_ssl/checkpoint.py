"""Saving and loading what training needs to go on; loading never runs code.

A checkpoint is a dict of plain data and tensors (the keys of `Saved`), read with weights_only.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any, TypedDict

import torch

from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write


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


def save(path: Path, saved: Saved) -> Path:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:  # given a path, torch keeps a failed file open, and its space taken
            torch.save(dict(saved), file)

    return atomic_write(path, write)


def load(path: Path) -> Saved:
    """A checkpoint of this project on the CPU; runs no code from the file. UserError where it is none."""
    if not path.is_file():
        raise UserError(f"No checkpoint at {path}. A run keeps its newest in RUN/checkpoints/last.pt.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats; what matters is whether it reads
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of any origin make the reader stumble in any way
        others = ", ".join(sorted(other.name for other in path.parent.glob("*.pt") if other != path))
        older = f" Beside it lies {others}: copy one over it to go on from there." if others else ""
        raise UserError(f"{path} is not a readable checkpoint: {_trouble(error)}{older}") from error
    missing = [key for key in Saved.__annotations__ if not isinstance(saved, dict) or key not in saved]
    if missing:
        raise UserError(f"{path} is not a training checkpoint of dino: it lacks {', '.join(missing)}.")
    return saved  # pyright: ignore[reportReturnType]


def _trouble(error: Exception) -> str:
    """Why a file could not be read. torch's own words for a foreign pickle end in advice to trust it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is cut short, no file of torch, or holds more than tensors and plain data."
    if "PytorchStreamReader" in str(error):
        return "it is cut short or damaged."
    return (str(error) or type(error).__name__).splitlines()[0]
