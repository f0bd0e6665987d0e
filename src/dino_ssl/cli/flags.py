"""Names of settings as flags. Nothing heavy is imported here: errors of mistyped commands need it."""

import re

known_fields: set[str] = set()
"""Dotted names of the settings of the command that is run."""


def flag(field: str) -> str:
    """Return the flag of a dotted field: optim.batch_size -> --optim.batch-size."""
    return f"--{field.replace('_', '-')}"


def with_flags(message: str) -> str:
    """Return a library's message with the settings of this command, `optim.batch_size`, written as flags."""
    return re.sub(r"`([a-z_.]+)`", lambda match: flag(match[1]) if match[1] in known_fields else match[0], message)
