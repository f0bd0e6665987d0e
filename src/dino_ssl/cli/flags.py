"""Names of settings as flags. Nothing heavy is imported here: errors of mistyped commands need it."""

import difflib
import re
from collections.abc import Sequence

from dino_ssl.errors import UserError

SHORT_FLAGS = {f"--{name}": f"--optim.{name}" for name in ("epochs", "batch-size", "lr")}
"""Short forms of the flags of a training run that are used most."""

known_fields: set[str] = set()
"""Dotted names of the settings of the command that is run."""


def flag(field: str) -> str:
    """Return the flag of a dotted field: optim.batch_size -> --optim.batch-size."""
    return f"--{field.replace('_', '-')}"


def expand_short_flags(argv: Sequence[str]) -> list[str]:
    """Return the arguments with short flags in full. Raise UserError if one is misspelled, or given in both forms."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in argv]
    for short, long in SHORT_FLAGS.items():
        if short in flags and long in flags:
            raise UserError(f"{short} and {long} are the same setting: give only one of them.")
    for name in flags:
        if name not in SHORT_FLAGS and (close := difflib.get_close_matches(name, SHORT_FLAGS, n=1, cutoff=0.85)):
            raise UserError(f"Unknown flag {name}; did you mean {close[0]}?")
    return [
        SHORT_FLAGS[name] + argument[len(name) :] if name in SHORT_FLAGS else argument
        for name, argument in zip(flags, argv, strict=True)
    ]


def with_flags(message: str) -> str:
    """Return a library's message with the settings of this command, `optim.batch_size`, written as (short) flags."""
    short = {long: name for name, long in SHORT_FLAGS.items()}

    def written(match: re.Match[str]) -> str:
        return short.get(flag(match[1]), flag(match[1])) if match[1] in known_fields else match[0]

    return re.sub(r"`([a-z_.]+)`", written, message)
