"""Settings are values: frozen dataclasses, edited by copy, written to JSON and read back by their types.

Reading never imports by name: `from_dict(Run, data)` walks Run's own type hints, so a file from a stranger
can only ever become one of the types that Run already names.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from dino_ssl.errors import UserError, did_you_mean

T = TypeVar("T")


def edit(value: T, **changes: Any) -> T:
    """A copy of a settings value with some fields changed; a dict changes fields inside a nested value.

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
    """Plain JSON data of a settings value; each dataclass says its `type`, so that unions read back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    return value


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of `to_dict` by their dotted names; a nested value's own name gives its type."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flatten(item, prefix if name == "type" and prefix else f"{prefix}.{name}".lstrip("."))
    return found


def differences(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """(dotted field, old value, new value) of every setting that differs."""
    old, new = flatten(to_dict(before)), flatten(to_dict(after))
    names = [*old, *(name for name in new if name not in old)]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def format_value(value: Any) -> str:
    """A setting's value as it is typed."""
    if isinstance(value, list):
        return " ".join(map(format_value, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def from_dict(kind: Any, data: Any, where: str = "") -> Any:
    """The inverse of `to_dict` for the type `kind` (a dataclass, a union, a tuple, or a plain type).

    Raises UserError naming the place, what was expected and what came. Fields that `data` lacks keep their
    defaults, and a class may list older names of its own in `formerly` and turn older fields into its own in
    `from_older(fields)`, so that a file of an older version still reads.
    """
    where = where or getattr(kind, "__name__", str(kind))
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _from_union(typing.get_args(kind), data, where)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise UserError(f"{where}: expected a list, got {data!r}.")
        inner = typing.get_args(kind)
        kinds = [inner[0]] * len(data) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(kinds) != len(data):
            raise UserError(f"{where}: expected {len(kinds)} values, got {len(data)}: {data!r}.")
        return tuple(from_dict(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, data, strict=True)))
    if origin is typing.Literal:
        options = typing.get_args(kind)
        if data not in options:
            raise UserError(f"{where}: expected one of {', '.join(map(repr, options))}, got {data!r}.")
        return data
    if dataclasses.is_dataclass(kind):
        return _from_mapping(kind, data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is Any or (isinstance(data, origin or kind) and (kind is bool or not isinstance(data, bool))):
        return data  # a bool is an int to Python, and a slip to everybody else
    raise UserError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {data!r}.")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by their names."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _names(kind: Any) -> tuple[str, ...]:
    """What a dataclass is called in a file, and what it was called in older ones (its class variable `formerly`)."""
    return (kind.__name__, *getattr(kind, "formerly", ()))


def _from_mapping(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected the fields of {kind.__name__}, got {data!r}.")
    if (tag := data.get("type", kind.__name__)) not in _names(kind):
        raise UserError(f"{where}: expected a {kind.__name__}, got a {tag}.")
    hints = _hints(kind)
    given = {name: item for name, item in data.items() if name != "type"}
    given = getattr(kind, "from_older", dict)(given)
    for name in given:
        if name not in hints:
            raise UserError(f"{where} has no field {name!r}{did_you_mean(name, hints)}")
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in given:
            raise UserError(f"{where}: expected the field {field.name!r}, which has no default; got {data!r}.")
    return kind(**{name: from_dict(hints[name], item, f"{where}.{name}") for name, item in given.items()})


def _from_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and types.NoneType in options:
        return None
    if isinstance(data, Mapping):
        named = {name: option for option in options if dataclasses.is_dataclass(option) for name in _names(option)}
        tag = data.get("type", "")
        if not isinstance(tag, str) or tag not in named:
            raise UserError(f"{where}: expected one of {', '.join(named)}, got {tag!r}{did_you_mean(str(tag), named)}")
        return from_dict(named[tag], data, where)
    failures = []
    for option in options:
        if option is not types.NoneType and not dataclasses.is_dataclass(option):
            try:
                return from_dict(option, data, where)
            except UserError as error:
                failures.append(error)
    raise failures[0] if failures else UserError(f"{where}: got {data!r}, which none of its types can be.")
