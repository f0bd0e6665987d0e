"""A command's options, typed: a frozen dataclass, parsed by tyro, whose help ends with examples."""

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from dino_ssl.terminal import is_rank0

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

T = TypeVar("T")

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""A flag that is off without it: `--json`, and no `--no-json`."""

CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.PositionalMetavarFromFieldName)


def parse(
    kind: type[T],
    argv: Sequence[str],
    prog: str,
    examples: str,
    default: Any = None,
    registry: "ConstructorRegistry | None" = None,
) -> T:
    """The options in argv; help and mistakes end the process as tyro does it, with exit code 0 or 2.

    registry: how types that tyro does not know are read.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(kind.__doc__ or ""))
    more: dict[str, Any] = {"description": "\n\n".join(" ".join(one.split()) for one in paragraphs)}
    if default is not None:
        more["default"] = default
    if registry is not None:
        more["registry"] = registry
    try:
        return tyro.cli(kind, prog=prog, args=list(argv), config=CONFIG, console_outputs=is_rank0(), **more)
    except SystemExit as stop:
        if not stop.code and is_rank0():
            print(f"\nexamples:\n{examples}")
        raise
