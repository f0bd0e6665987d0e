"""Results that are kept in the folder of an index, so that its page and other commands need not compute them again."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write

Arrays = dict[str, np.ndarray]
KEY = "key"


def load_result(folder: Path, name: str, **key: Any) -> Arrays | None:
    """Return the arrays of a kept result; None if there is none, or if its key has other values for these names."""
    try:
        with np.load(folder / f"{name}.npz") as file:
            known = json.loads(str(file[KEY]))
            same = all(field in known and known[field] == value for field, value in key.items())
            return {field: file[field] for field in file.files if field != KEY} if same else None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def save_result(folder: Path, name: str, arrays: Arrays, **key: Any) -> None:
    """Keep arrays with a key: the generation of the index and the settings, as JSON has them."""

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez(file, **arrays, **{KEY: np.array(json.dumps(key))})  # pyright: ignore[reportArgumentType]

    with suppress(UserError):  # a full disk or a read-only folder: only slower the next time
        atomic_write(folder / f"{name}.npz", write)
