"""Pickles of plain data, read without running anything that they name.

A pickle is a program: it may import any function and call it. Here it finds none. What numpy writes into its own
pickles is answered by the small stand-ins below, which build arrays of numbers and texts from their bytes, so that
not even numpy's own code for damaged pickles is reached. Everything else that a file asks for is refused by name.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from dino_ssl.errors import UserError

_DTYPE = re.compile(r"[?]|b1|[iu][1248]|f[248]|[SU]\d{1,6}|O8?")


class RefusedError(pickle.UnpicklingError):
    """The file asks for more than plain data."""


def read_plain_pickle(path: Path) -> Any:
    """Dicts, lists, tuples, sets, texts, numbers, None and numpy arrays of them; else a UserError, and nothing ran."""
    try:
        return loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except RefusedError as error:
        raise UserError(
            f"{path} was not opened: {error}. Expected a pickle of lists, numbers, texts and numpy arrays alone. "
            "A pickle that asks for more can run any program: get the file from its authors again."
        ) from error
    except Exception as error:  # a damaged pickle fails in any of Python's ways
        raise UserError(f"{path} is no whole pickle ({error or type(error).__name__}). Copy it again.") from error


def loads(data: bytes) -> Any:
    """`pickle.loads` of plain data; raises RefusedError where the bytes name anything else."""
    return _finished(_Plain(io.BytesIO(data), encoding="latin1").load())  # latin1: texts and arrays of Python 2


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return None  # only ever an argument of _reconstruct
        try:
            return _Call(_ANSWERS[_OLD.get(module, module), name])
        except KeyError:
            raise RefusedError(f"it asks for {module}.{name}") from None


class _Call:
    """A function that a pickle can call and do nothing else with: no attribute of it can be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RefusedError(f"it changes {name} of a function")

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("it changes a function")


class _Type:
    """A numpy type while it is read: `dtype("i8", False, True)` and then its state, of which the order counts."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise RefusedError(f"it holds an array of type {code!r}")
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        order, fields = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or any(field is not None for field in fields):
            raise RefusedError("it holds an array of a composed type")
        self.order = order

    @property
    def numpy(self) -> np.dtype:
        if self.code.startswith("O"):
            raise RefusedError("it holds Python objects as bytes")
        return np.dtype(self.code if self.order == "|" else self.order + self.code)


class _Array:
    """A numpy array while it is read: `_reconstruct(...)` and then its state."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.value = _array(content, shape, kind, "F" if fortran else "C")


def _array(content: Any, shape: Any, kind: Any, order: str) -> Any:
    if not isinstance(kind, _Type):
        raise RefusedError("it holds an array without a type")
    if kind.code.startswith("O"):  # an array of objects holds them as a list: plain ones, as everything here
        if not isinstance(content, list) or np.prod(shape, dtype=np.int64) != len(content) or len(shape) != 1:
            raise RefusedError("it holds an array of objects that is no plain list")
        return content
    if isinstance(content, str):
        content = content.encode("latin1")  # Python 2's bytes
    return np.frombuffer(bytes(content), kind.numpy).reshape(shape, order="F" if order == "F" else "C").copy()


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, kind: Any, shape: Any, order: str) -> _Array:
    array = _Array()
    array.value = _array(content, shape, kind, order)
    return array


def _scalar(kind: _Type, content: Any) -> Any:
    return _array(content, (1,), kind, "C")[0].item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedError(f"it encodes as {encoding!r}")
    return text.encode("latin1")


def _bytes(content: Any = b"") -> bytes:
    if not isinstance(content, bytes | list | tuple):
        raise RefusedError(f"it makes bytes of {type(content).__name__}")  # bytes(10**12) would take all memory
    return bytes(content)


_OLD = {
    "__builtin__": "builtins",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}
_ANSWERS = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytes"): _bytes,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Type,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}
"""What a pickle of plain data asks for, in any protocol, and what it gets."""


def _finished(value: Any, done: dict[int, Any] | None = None) -> Any:
    """The same with arrays for stand-ins, at any depth; what occurs twice stays one."""
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _Array):
        return _finished(value.value, done)
    if isinstance(value, _Call | _Type):
        raise RefusedError("it holds a function or a type")
    if isinstance(value, dict | set | frozenset) and any(isinstance(key, _Array | _Call | _Type) for key in value):
        raise RefusedError("it holds an array as a key or in a set")
    if isinstance(value, dict):
        done[id(value)] = value
        for key in list(value):
            value[key] = _finished(value[key], done)
    elif isinstance(value, list):
        done[id(value)] = value
        value[:] = [_finished(item, done) for item in value]
    elif isinstance(value, tuple):
        value = tuple(_finished(item, done) for item in value)
    return value
