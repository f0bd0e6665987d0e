"""A table or figure of the paper as data: a base Run, and configurations that each change some of its settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dino_ssl.config import edit
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.run import Run

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")

Changes = Mapping[str, Any]
"""Keyword arguments of `edit`: fields of a Run; a nested mapping changes fields of a nested value."""
Change = Changes | Callable[[Run], Changes]
"""Changes, or a function that derives them from the base (for example three times its epochs)."""


class Metric(NamedTuple):
    """One result of a configuration, a column of the table."""

    name: str
    """Key in results and in `Configuration.paper`."""
    title: str
    unit: str = "%"
    digits: int = 1


METRICS = {
    metric.name: metric
    for metric in (
        Metric("20-NN", "20-NN"),
        Metric("student 20-NN", "student's 20-NN"),
        Metric("linear", "linear"),
        Metric("hours", "time", "h", 2),
        Metric("memory", "memory", "GB"),
        Metric("throughput", "throughput", "images/s", 0),
        Metric("entropy", "teacher entropy / ln K"),
        Metric("kl", "KL to the student", "nats", 2),
    )
}


class Curve(NamedTuple):
    """One chart with a line for each configuration: a training metric, or a result of the evaluations."""

    name: str
    title: str
    unit: str = ""
    from_zero: bool = False
    show_ln_k: bool = False
    """Draw ln K as a dashed line."""


CURVES = {
    curve.name: curve
    for curve in (
        Curve("20-NN", "20-NN of the teacher", " %", from_zero=True),
        Curve("student 20-NN", "20-NN of the student", " %", from_zero=True),
        Curve("loss", "Loss"),
        Curve("teacher_entropy", "Entropy of the teacher h(P_t)", from_zero=True, show_ln_k=True),
        Curve("kl", "KL(P_t || P_s)", from_zero=True),
    )
}


@dataclass(frozen=True)
class Configuration:
    """One configuration: the settings it changes in the table's base, and the results that the paper reports."""

    name: str
    """Short; also the name of its folder."""
    title: str
    """Description in the printed table."""
    change: Change = field(default_factory=dict)
    """Difference from the base, at both scales unless `small` is set."""
    small: Change | None = None
    """Difference from the base at scale small, if the paper's values make no sense there."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's results by the names of the table's metrics."""
    note: str = ""

    def changes(self, scale: Scale, base: Run) -> Changes:
        """Return the changes at this scale."""
        change = self.small if scale == "small" and self.small is not None else self.change
        return change(base) if callable(change) else change


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or figure of the paper as a set of training runs."""

    name: str
    """Argument of `dino ablate NAME`."""
    title: str
    protocol: str
    """The paper's protocol in one line."""
    paper: Callable[[], Run]
    """The base at the paper's scale: ImageNet, many GPUs."""
    small: Callable[[], Run]
    """The base at scale small: one CPU core, minutes per run."""
    configurations: tuple[Configuration, ...]
    metrics: tuple[str, ...] = ("20-NN", "linear")
    """The columns, the most important first: names of METRICS."""
    curves: tuple[str, ...] = ("20-NN", "loss")
    """Names of CURVES."""
    evaluate_student: bool = False
    """Evaluate the student as well as the teacher."""
    conclusion: str
    """The paper's conclusion."""

    def base(self, scale: Scale) -> Run:
        """Return the base Run at this scale."""
        return self.small() if scale == "small" else self.paper()

    def run(self, configuration: Configuration, scale: Scale, base: Run | None = None) -> Run:
        """Return the Run of a configuration; `base` replaces the table's own base."""
        base = base or self.base(scale)
        return edit(base, **configuration.changes(scale, base))

    def configuration(self, name: str) -> Configuration:
        """Return a configuration by its name or its number from 1. Raise UserError if there is none."""
        known = {configuration.name: configuration for configuration in self.configurations}
        if name in known:
            return known[name]
        if name.isdigit() and 1 <= int(name) <= len(known):
            return self.configurations[int(name) - 1]
        raise UserError(
            f"{self.name} has no configuration {name!r}{did_you_mean(name, known)}\n"
            f"Configurations: {', '.join(known)}; or a number from 1 to {len(known)}."
        )

    def select(self, names: Sequence[str]) -> list[Configuration]:
        """Return the named configurations in the table's order; all of them if no name is given."""
        selected = {self.configuration(name).name for name in names}
        return [item for item in self.configurations if not selected or item.name in selected]
