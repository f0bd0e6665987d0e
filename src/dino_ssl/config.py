"""Settings as values: frozen dataclasses that are edited by copy, written to JSON and read back.

A field may be annotated with an abstract base (`method: MethodConfig`). In JSON the class is named by `type`: its name
if it belongs to this package, `module:Class` otherwise. Reading imports such a module only if the caller trusts the
file, since importing runs its code.
"""

import contextlib
import dataclasses
import importlib
import inspect
import shlex
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dino_ssl.errors import UserError, did_you_mean

T = TypeVar("T")

PACKAGE = __name__.partition(".")[0]


def edit(value: T, **changes: Any) -> T:
    """Return a copy of a settings value with some fields changed; a dict edits the fields of a nested value.

    >>> edit(run, views=dict(local=0), seed=1)
    """
    assert dataclasses.is_dataclass(value)
    assert not isinstance(value, type)
    _check_fields(type(value).__name__, type(value), changes)
    for name, change in changes.items():
        old = getattr(value, name)
        if isinstance(change, Mapping) and dataclasses.is_dataclass(old):
            changes[name] = edit(old, **change)
    return dataclasses.replace(value, **changes)


def _check_fields(owner: str, kind: Any, names: Iterable[str]) -> None:
    """Raise UserError if one of these names is not a field of the dataclass `kind`."""
    known = sorted(field.name for field in dataclasses.fields(kind))
    for name in names:
        if name not in known:
            raise UserError(f"{owner} has no field {name!r}{did_you_mean(name, known)}\nFields: {', '.join(known)}.")


def to_dict(value: Any) -> Any:
    """Return a settings value as plain JSON data; every dataclass stores its `type`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type_name(type(value)), **fields}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    return value


def type_name(kind: type) -> str:
    """Return the name of a settings type in JSON: `ViT`, or `module:Class` if it is defined outside the package."""
    module = kind.__module__
    if module.startswith(f"{PACKAGE}."):
        return kind.__name__
    if module == "__main__":  # a script: importable under its file's name
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return f"{module}:{kind.__qualname__}"


def import_object(spec: str) -> Any:
    """Import `module:name`; the working directory is searched first, as by `python -m`.

    Raises UserError if the module or the name cannot be imported.
    """
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        value = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{spec!r} cannot be imported: {error}. Expected MODULE:NAME.") from error
    finally:
        sys.path.remove("")
    return value


def import_type(spec: str, base: type[T]) -> type[T]:
    """Import `module:Class`. Raises UserError if it is not a dataclass derived from `base`."""
    kind = import_object(spec)
    if not (isinstance(kind, type) and issubclass(kind, base) and dataclasses.is_dataclass(kind)):
        raise UserError(f"{spec!r}: expected a dataclass derived from {base.__module__}.{base.__name__}, got {kind!r}.")
    return kind


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting by its dotted name; the name of a nested value holds its type."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        is_nested = dataclasses.is_dataclass(value)
        flat[name] = type_name(type(value)) if is_nested else value
        flat |= flatten(value, f"{name}.") if is_nested else {}
    return flat


def differences(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """Return (dotted field, old value, new value) of every setting that differs."""
    old, new = flatten(before), flatten(after)
    names = [*old, *(name for name in new if name not in old)]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def format_value(value: Any) -> str:
    """Return a setting's value as typed on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(shlex.quote(str(v)) if dataclasses.is_dataclass(v) else format_value(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def from_dict(kind: Any, data: Any, *, trust: bool = False) -> Any:
    """Return the inverse of `to_dict` for the type `kind` (a dataclass, an abstract base, a union, a plain type).

    Missing fields take their defaults. trust: import types that are named `module:Class`.
    Raises UserError that names the field, what was expected and what was given.
    """
    return _read(kind, data, getattr(kind, "__name__", str(kind)), trust)


def _read(kind: Any, data: Any, field: str, trust: bool) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    expected = getattr(kind, "__name__", kind)
    if origin in (typing.Union, types.UnionType):
        expected = str(kind).replace("typing.", "")
        classes = [option for option in options if _is_settings(option)]
        if isinstance(data, Mapping) and classes:
            return _read_settings(classes, data, field, trust)
        for option in options:
            with contextlib.suppress(UserError):
                return _read(option, data, field, trust)
    elif origin is tuple:
        any_length = options[-1] is Ellipsis
        if isinstance(data, list | tuple) and (any_length or len(data) == len(options)):
            kinds = options[:1] * len(data) if any_length else options
            return tuple(_read(kinds[i], item, f"{field}[{i}]", trust) for i, item in enumerate(data))
        expected = "a list" if any_length else f"a list of {len(options)} values"
    elif origin is typing.Literal:
        if data in options:
            return data
        expected = f"one of {', '.join(map(repr, options))}"
    elif _is_settings(kind):
        return _read_settings([kind], data, field, trust)
    elif kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    elif kind is Any or (isinstance(data, origin or kind) and (kind is bool or not isinstance(data, bool))):
        return data  # bool is a subclass of int, but True is not a number of epochs
    raise UserError(f"{field}: expected {expected}, got {data!r}.")


def _read_settings(bases: Sequence[Any], data: Any, field: str, trust: bool) -> Any:
    """Return a value of the dataclass that the `type` of `data` names, derived from one of the bases."""
    if not isinstance(data, Mapping):
        raise UserError(f"{field}: expected the fields of {bases[0].__name__}, got {data!r}.")
    kind = _settings_type(bases, data, field, trust)
    values = {name: item for name, item in data.items() if name != "type"}
    _check_fields(field, kind, values)
    hints = typing.get_type_hints(kind)
    values = {name: _read(hints[name], item, f"{field}.{name}", trust) for name, item in values.items()}
    try:
        return kind(**values)
    except TypeError as error:  # a field without default is missing
        raise UserError(f"{field}: {error}.") from error


def _settings_type(bases: Sequence[Any], data: Mapping[str, Any], field: str, trust: bool) -> Any:
    concrete = [kind for base in bases for kind in _concrete(base)]
    known = {kind.__name__: kind for kind in concrete}
    name = data.get("type", next(iter(known)) if len(known) == 1 else None)
    for kind in concrete:
        if name in (kind.__name__, type_name(kind)):
            return kind
    if isinstance(name, str) and ":" in name:
        module = name.partition(":")[0]
        if not (trust or module in sys.modules):
            raise UserError(
                f"{field} has a type from outside the package, {name}. Importing it runs the code of the module "
                f"{module!r}: pass `trust` if you trust the file."
            )
        return import_type(name, bases[0])
    raise UserError(f"{field}: expected one of {', '.join(known)}, got {name!r}{did_you_mean(str(name), known)}")


def _is_settings(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or inspect.isabstract(kind)


def _concrete(kind: Any) -> Iterator[Any]:
    """Yield `kind` itself or its concrete subclasses inside the package."""
    if dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
        yield kind
    for child in type.__subclasses__(kind):
        if child.__module__.startswith(f"{PACKAGE}."):
            yield from _concrete(child)
