"""What a table of the paper is here: a value. Its rows are edits of one Run, at the paper's scale or at a small one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dino_ssl.config import edit
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.run import Run

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")

Changes = Mapping[str, Any]
"""What `edit` takes: fields of a Run, those of nested values as dicts."""
Change = Changes | Callable[[Run], Changes]
"""Changes, or what makes them of the table's base: three times its epochs."""


class Figure(NamedTuple):
    """One figure of a row: what it is called in results and in `Row.paper`, and how it is shown."""

    name: str
    title: str
    unit: str = "%"
    digits: int = 1


KNN = Figure("20-NN", "20-NN")
STUDENT = Figure("student 20-NN", "student's 20-NN")
LINEAR = Figure("linear", "linear")
HOURS = Figure("hours", "time", "h", 2)
MEMORY = Figure("memory", "memory", "GB")
SPEED = Figure("throughput", "throughput", "images/s", 0)
ENTROPY = Figure("entropy", "teacher entropy / ln K")
KL = Figure("kl", "KL to the student", "nats", 2)


class Curve(NamedTuple):
    """One chart with a line for each row: a training metric, or a figure of the evaluations."""

    name: str
    title: str
    unit: str = ""
    from_zero: bool = False
    of_ln_k: bool = False
    """Whether ln K is drawn beside it."""


QUALITY = Curve("20-NN", "20-NN of the teacher", " %", from_zero=True)
STUDENTS = Curve("student 20-NN", "20-NN of the student", " %", from_zero=True)
LOSS = Curve("loss", "Loss")
ENTROPIES = Curve("teacher_entropy", "Entropy of the teacher h(P_t)", from_zero=True, of_ln_k=True)
KLS = Curve("kl", "KL(P_t || P_s)", from_zero=True)


@dataclass(frozen=True)
class Row:
    """One row: what it changes in the table's base, and what the paper reports for it."""

    name: str
    """Short, and the name of its folder."""
    what: str
    """In words, as it stands in the table."""
    change: Change = field(default_factory=dict)
    """What differs from the base, at both scales unless `small` is given."""
    small: Change | None = None
    """What stands for it at scale small, where the paper's values would make no sense there."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's figures, by the names of the table's figures."""
    note: str = ""

    def changes(self, scale: Scale, base: Run) -> Changes:
        change = self.small if scale == "small" and self.small is not None else self.change
        return change(base) if callable(change) else change


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or a figure of the paper, as runs."""

    name: str
    """As in `dino ablate NAME`."""
    title: str
    protocol: str
    """How the paper measured, in a line."""
    paper: Callable[[], Run]
    """The base at the paper's scale: ImageNet, many GPUs."""
    small: Callable[[], Run]
    """The base at scale small: one processor core, minutes a row."""
    rows: tuple[Row, ...]
    figures: tuple[Figure, ...] = (KNN, LINEAR)
    """The columns, the one that matters first."""
    curves: tuple[Curve, ...] = (QUALITY, LOSS)
    students: bool = False
    """Whether the student is measured beside the teacher at every evaluation."""
    shows: str = ""
    """What the paper concludes."""

    def base(self, scale: Scale) -> Run:
        return self.small() if scale == "small" else self.paper()

    def run(self, row: Row, scale: Scale, base: Run | None = None) -> Run:
        """The Run of a row: the base with what the row changes. base: another one than the table's own."""
        base = base or self.base(scale)
        return edit(base, **row.changes(scale, base))

    def row(self, name: str) -> Row:
        """The row of that name, or of that number from 1. Raises UserError with the nearest names."""
        named = {row.name: row for row in self.rows}
        if name in named:
            return named[name]
        if name.isdigit() and 1 <= int(name) <= len(self.rows):
            return self.rows[int(name) - 1]
        raise UserError(
            f"{self.name} has no row {name!r}{did_you_mean(name, named)}\n"
            f"Rows: {', '.join(named)}; or their numbers, 1 to {len(self.rows)}."
        )

    def select(self, names: Sequence[str]) -> list[Row]:
        """The rows of these names in the table's order; all of them without any."""
        chosen = [self.row(name).name for name in names]
        return [row for row in self.rows if not chosen or row.name in chosen]


def named(changes: Any, prefix: str = "") -> list[str]:
    """The dotted fields that changes name; a value that is replaced whole has one name."""
    if not isinstance(changes, Mapping):
        return [prefix]
    inner: Iterable[list[str]] = (named(item, f"{prefix}.{name}".lstrip(".")) for name, item in changes.items())
    return [name for names in inner for name in names]
