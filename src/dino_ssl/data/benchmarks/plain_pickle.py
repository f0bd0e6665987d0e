"""Pickle files of plain data, read without running code.

A pickle may import and call any function. The ground-truth files of the revisited benchmarks hold plain data only, so
every import is refused (see "Restricting Globals" in the documentation of Python's pickle module).
"""

import io
import pickle
from pathlib import Path
from typing import Any

from dino_ssl.errors import UserError


def read_plain_pickle(path: Path) -> Any:
    """Return the dicts, lists, tuples, sets, strings, numbers and None of a pickle.

    Raises UserError if the file is damaged or refers to any function or class; nothing of it is run then.
    """
    try:
        return loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except RefusedError as error:
        raise UserError(
            f"{path} was not opened: it refers to {error}. Expected a pickle of dicts, lists, strings and numbers; "
            "others can run any program. Get the original file, or convert it to JSON."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is not a complete pickle ({error or type(error).__name__}). Copy it again.") from error


class RefusedError(pickle.UnpicklingError):
    """Error of a pickle that refers to a function or class; the message is its name."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise RefusedError(f"{module}.{name}")


def loads(data: bytes) -> Any:
    """Return `pickle.loads` of plain data. Raises RefusedError if it refers to a function or class."""
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()  # latin1: strings of Python 2
