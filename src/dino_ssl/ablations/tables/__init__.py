"""The paper's ablations as values: one module per table or figure, found by the name of `dino ablate NAME`."""

import importlib

from dino_ssl.ablations.table import Table
from dino_ssl.errors import UserError, did_you_mean

HOMES = {
    "table7": "table7:TABLE",
    "table8": "table8:TABLE",
    "table9": "table9:TABLE",
    "table13": "table13:TABLE",
    "table14": "table14:TABLE",
    "table15": "table15:TABLE",
    "fig5": "fig5:TABLE",
    "fig6": "fig6:TABLE",
    "fig7": "fig7:TABLE",
    "head-norm": "heads:HEAD_NORM",
    "head-layers": "heads:HEAD_LAYERS",
    "prototypes": "heads:PROTOTYPES",
    "temperatures": "temperatures:TABLE",
    "center-momentum": "center_momentum:TABLE",
    "multi-crop": "multi_crop:TABLE",
    "crop-scales": "crop_scales:TABLE",
    "length": "length:TABLE",
    "attention-heads": "attention_heads:TABLE",
}
"""module:value of each table."""


def table(name: str) -> Table:
    """The table of that name. Raises UserError with the nearest names."""
    if name not in HOMES:
        raise UserError(f"There is no table {name!r}{did_you_mean(name, HOMES)}\nTables: {', '.join(HOMES)}.")
    module, _, value = HOMES[name].partition(":")
    return getattr(importlib.import_module(f"dino_ssl.ablations.tables.{module}"), value)


def tables() -> list[Table]:
    """All of them, in the paper's order."""
    return [table(name) for name in HOMES]
