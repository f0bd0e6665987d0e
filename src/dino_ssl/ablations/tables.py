"""All tables and figures of the paper that are reproduced, by the name of `dino ablate NAME`."""

from dino_ssl.ablations import tables_appendix, tables_main
from dino_ssl.ablations.table import Table
from dino_ssl.errors import UserError, did_you_mean

TABLES: dict[str, Table] = {table.name: table for table in (*tables_main.TABLES, *tables_appendix.TABLES)}
"""Main text first, then the appendix."""


def get_table(name: str) -> Table:
    """Return the table of this name. Raise UserError with similar names if there is none."""
    if name not in TABLES:
        raise UserError(f"Unknown table {name!r}{did_you_mean(name, TABLES)}\nTables: {', '.join(TABLES)}.")
    return TABLES[name]
