"""Settings as values: frozen dataclasses that are edited by copy, written to JSON and read back.

A field may be annotated with an abstract base (`method: MethodConfig`). In JSON the class is named by `type`: its name
if it belongs to this package, `module:Class` otherwise. Reading imports such a module only if the caller trusts the
file, since importing runs its code.
"""

import dataclasses
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
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
    known = {field.name for field in dataclasses.fields(value)}
    resolved = {}
    for name, change in changes.items():
        if name not in known:
            raise UserError(
                f"{type(value).__name__} has no field {name!r}{did_you_mean(name, known)}\n"
                f"Fields: {', '.join(sorted(known))}."
            )
        old = getattr(value, name)
        nested = isinstance(change, Mapping) and dataclasses.is_dataclass(old) and not isinstance(old, type)
        resolved[name] = edit(old, **change) if nested else change
    return dataclasses.replace(value, **resolved)


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
    if module == PACKAGE or module.startswith(f"{PACKAGE}."):
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
        raise UserError(
            f"{spec!r} cannot be imported: {error}. Expected MODULE:NAME of an importable module."
        ) from error
    finally:
        sys.path.remove("")
    return value


def import_type(spec: str, base: type[T]) -> type[T]:
    """Import `module:Class`. Raises UserError if it is not a dataclass derived from `base`."""
    kind = import_object(spec)
    if not (isinstance(kind, type) and issubclass(kind, base) and dataclasses.is_dataclass(kind)):
        raise UserError(f"{spec!r}: expected a dataclass derived from {base.__module__}.{base.__name__}, got {kind!r}.")
    return kind


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a `to_dict` by dotted name; the name of a nested value holds its type."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, prefix if name == "type" and prefix else f"{prefix}.{name}".lstrip("."))
    return flat


def differences(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """Return (dotted field, old value, new value) of every setting that differs."""
    old, new = flatten(to_dict(before)), flatten(to_dict(after))
    names = [*old, *(name for name in new if name not in old)]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def format_value(value: Any) -> str:
    """Return a setting's value as typed on the command line."""
    if isinstance(value, list):
        return " ".join(map(format_value, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def from_dict(kind: Any, data: Any, *, trust: bool = False) -> Any:
    """Return the inverse of `to_dict` for the type `kind` (a dataclass, an abstract base, a union, a plain type).

    Missing fields take their defaults. trust: import types that are named `module:Class`.
    Raises UserError that names the field, what was expected and what was given.
    """
    return _Reader(trust).read(kind, data, getattr(kind, "__name__", str(kind)))


class _Reader:
    def __init__(self, trust: bool) -> None:
        self.trust = trust

    def read(self, kind: Any, data: Any, field: str) -> Any:
        origin = typing.get_origin(kind)
        if origin in (typing.Union, types.UnionType):
            return self._union(typing.get_args(kind), data, field)
        if origin is tuple:
            return self._tuple(typing.get_args(kind), data, field)
        if origin is typing.Literal:
            if data not in typing.get_args(kind):
                options = ", ".join(map(repr, typing.get_args(kind)))
                raise UserError(f"{field}: expected one of {options}, got {data!r}.")
            return data
        if dataclasses.is_dataclass(kind) or inspect.isabstract(kind):
            return self._dataclass(kind, data, field)
        if kind is float and isinstance(data, int) and not isinstance(data, bool):
            return float(data)
        if kind is Any or (isinstance(data, origin or kind) and (kind is bool or not isinstance(data, bool))):
            return data  # bool is a subclass of int, but True is not a number of epochs
        raise UserError(f"{field}: expected {getattr(kind, '__name__', kind)}, got {data!r}.")

    def _union(self, options: tuple[Any, ...], data: Any, field: str) -> Any:
        if data is None and types.NoneType in options:
            return None
        options = tuple(option for option in options if option is not types.NoneType)
        classes = tuple(option for option in options if dataclasses.is_dataclass(option) or inspect.isabstract(option))
        if isinstance(data, Mapping) and classes:
            return self.read(self._class(classes, data, field), data, field)
        failures = []
        for option in options:
            if option not in classes:
                try:
                    return self.read(option, data, field)
                except UserError as error:
                    failures.append(error)
        raise failures[0] if failures else UserError(f"{field}: got {data!r}, which none of its types can be.")

    def _tuple(self, inner: tuple[Any, ...], data: Any, field: str) -> tuple[Any, ...]:
        if not isinstance(data, list | tuple):
            raise UserError(f"{field}: expected a list, got {data!r}.")
        kinds = [inner[0]] * len(data) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(kinds) != len(data):
            raise UserError(f"{field}: expected {len(kinds)} values, got {len(data)}: {data!r}.")
        return tuple(self.read(k, item, f"{field}[{i}]") for i, (k, item) in enumerate(zip(kinds, data, strict=True)))

    def _class(self, bases: tuple[Any, ...], data: Mapping[str, Any], field: str) -> Any:
        """Return the dataclass that the `type` of `data` names, derived from one of the bases."""
        concrete = [kind for base in bases for kind in _concrete(base)]
        known = {kind.__name__: kind for kind in concrete}
        name = data.get("type", next(iter(known)) if len(known) == 1 else None)
        for kind in concrete:
            if name in (kind.__name__, type_name(kind)):
                return kind
        if isinstance(name, str) and ":" in name:
            module = name.partition(":")[0]
            if not (self.trust or module in sys.modules):
                raise UserError(
                    f"{field} has a type from outside the package, {name}. Importing it runs the code of the module "
                    f"{module!r}: pass `trust` if you trust the file."
                )
            return import_type(name, bases[0])
        raise UserError(f"{field}: expected one of {', '.join(known)}, got {name!r}{did_you_mean(str(name), known)}")

    def _dataclass(self, kind: Any, data: Any, field: str) -> Any:
        if not isinstance(data, Mapping):
            raise UserError(f"{field}: expected the fields of {kind.__name__}, got {data!r}.")
        kind = self._class((kind,), data, field)
        hints = _hints(kind)
        values = {name: item for name, item in data.items() if name != "type"}
        for name in values:
            if name not in hints:
                raise UserError(f"{field} has no field {name!r}{did_you_mean(name, hints)}")
        for item in dataclasses.fields(kind):
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and item.name not in values:
                raise UserError(f"{field}: the field {item.name!r} is required and has no default; got {data!r}.")
        return kind(**{name: self.read(hints[name], item, f"{field}.{name}") for name, item in values.items()})


def _concrete(kind: Any) -> Iterator[Any]:
    """Yield `kind` itself or its concrete subclasses inside the package."""
    if dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
        yield kind
    for child in type.__subclasses__(kind):
        if child.__module__.startswith(f"{PACKAGE}."):
            yield from _concrete(child)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
