"""Typed options of a command: a frozen dataclass parsed by tyro, with examples below the help."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from dino_ssl.cli.flags import known_fields
from dino_ssl.terminal import is_rank0

T = TypeVar("T")

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""A flag without a negative form: `--json`, and no `--no-json`."""


def plain(help: str, metavar: str | None = None) -> Any:
    """Return the description of an option, without its default; of `--no-NAME` for a flag that is set by default."""
    return tyro.conf.arg(help=help, metavar=metavar, help_behavior_hint="")


Json = Annotated[Flag, plain("Print one JSON object to standard output, messages to standard error.")]
Device = Annotated[str | None, plain("cpu, cuda, cuda:1, ... or mps. Default: a GPU if there is one.", "NAME")]
Weights = Annotated[
    Literal["last", "best"],
    tyro.conf.arg(help="Of a run: the last weights, or those of the best epoch, which the validation set selected."),
]
NumHeads = Annotated[
    int | None, plain("Heads of a ViT of which the file has only weights. Default: of 64 channels.", "N")
]
Trust = Annotated[Flag, plain("Import types that the checkpoint names, which runs their code.")]

CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.PositionalMetavarFromFieldName)
RULES = ConstructorRegistry()
"""Changes how tyro reads options."""


@RULES.struct_rule
def one_line_help(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return tyro's fields of a dataclass, with docstrings in one line, which tyro wraps; it would keep line breaks."""
    if one_line_help in info.markers or not dataclasses.is_dataclass(info.type):
        return None  # tyro's own rule is next
    spec: Any = ConstructorRegistry.get_struct_spec(dataclasses.replace(info, markers=(*info.markers, one_line_help)))
    fields = (
        dataclasses.replace(field, helptext=lambda text=field.helptext: " ".join((text() or "").split()))
        for field in spec.fields
    )
    return dataclasses.replace(spec, fields=tuple(fields))


def parse(
    kind: type[T],
    argv: Sequence[str],
    prog: str,
    examples: str,
    default: Any = tyro.MISSING_NONPROP,
    registry: ConstructorRegistry = RULES,
) -> T:
    """Return the options in argv. Help and invalid options end the process with exit code 0 or 2, as tyro does.

    registry: parsers of types that tyro does not know.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(kind.__doc__ or ""))
    description = "\n\n".join(" ".join(text.split()) for text in paragraphs)
    register_fields(kind if default is tyro.MISSING_NONPROP else default)
    options: Any = {"prog": prog, "description": description, "args": list(argv), "console_outputs": is_rank0()}
    try:
        return tyro.cli(kind, default=default, config=CONFIG, registry=registry, **options)
    except SystemExit as stop:
        if not stop.code and is_rank0():
            print(f"\nexamples:\n{examples}")
        raise


def register_fields(settings: Any) -> None:
    """Let messages write the fields of these options as flags."""
    known_fields.update(_dotted_fields(settings))


def _dotted_fields(settings: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields; those of `run`, `settings`, ... are flags without a prefix."""
    for field in dataclasses.fields(settings):
        name = "" if field.name in ("run", "protocol", "common", "settings", "find") else f"{prefix}{field.name}"
        if name:
            yield name
        factory = field.default_factory
        value = getattr(settings, field.name, None if factory is dataclasses.MISSING else factory())
        if dataclasses.is_dataclass(value):
            yield from _dotted_fields(value, f"{name}." if name else prefix)
