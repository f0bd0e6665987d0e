"""A command's options, typed: a frozen dataclass, parsed by tyro, whose help ends with examples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from dino.terminal import is_main

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

T = TypeVar("T")

Switch = tyro.conf.FlagCreatePairsOff[bool]
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
    more: dict[str, Any] = {} if default is None else {"default": default}
    if registry is not None:
        more["registry"] = registry
    try:
        return tyro.cli(kind, prog=prog, args=list(argv), config=CONFIG, console_outputs=is_main(), **more)
    except SystemExit as stop:
        if not stop.code and is_main():
            print(f"\nexamples:\n{examples}")
        raise
