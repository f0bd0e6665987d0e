"""A table or figure of the paper as data: a base Run, and configurations that each change some of its settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dino_ssl.ablations.bases import Changes, conv, learning_rate, vit_300
from dino_ssl.config import edit
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.run import Run

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")

Change = Changes | Callable[[Run], Changes]
"""Changes, or a function that derives them from the base (for example three times its epochs)."""

METRICS = {
    "20-NN": ("20-NN, %", 1),
    "student 20-NN": ("student's 20-NN, %", 1),
    "linear": ("linear, %", 1),
    "hours": ("time, h", 2),
    "memory": ("memory, GB", 1),
    "throughput": ("throughput, images/s", 0),
    "entropy": ("teacher entropy / ln K, %", 1),
    "kl": ("KL to the student, nats", 2),
    "loss": ("loss, nats", 2),
}
"""Title and decimals of each result of a configuration: the columns of a table."""
CURVES = ("loss", "20-NN", "student 20-NN", "entropy", "kl")
"""Metrics that are measured during training."""


@dataclass(frozen=True)
class Configuration:
    """One configuration: the settings it changes in the table's base, and the results that the paper reports."""

    name: str
    """Short; also the name of its folder."""
    title: str
    """Description in the printed table."""
    change: Change
    """Difference from the base, at both scales unless `small` is set."""
    paper: tuple[float | None, ...] = ()
    """The paper's results in the order of the table's metrics; None or omitted: not reported."""
    small: Change | None = None
    """Difference from the base at scale small, if the paper's values make no sense there."""
    small_lr: float = 1.0
    """Learning rate at scale small, divided by the base's."""

    def changes(self, scale: Scale, base: Run) -> Changes:
        """Return the changes at this scale."""
        change = self.small if scale == "small" and self.small is not None else self.change
        changes = change(base) if callable(change) else change
        if scale == "paper" or self.small_lr == 1:
            return changes
        rates = learning_rate(self.small_lr * base.optim.lr)(base)["optim"]
        return {**changes, "optim": {**changes.get("optim", {}), **rates}}


def row(
    name: str, title: str, change: Change, *paper: float | None, small: Change | None = None, small_lr: float = 1.0
) -> Configuration:
    """Return a configuration as a row of the paper's table."""
    return Configuration(name, title, change, paper, small, small_lr)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or figure of the paper as a set of training runs."""

    name: str
    """Argument of `dino ablate NAME`."""
    title: str
    conclusion: str
    """The paper's conclusion."""
    configurations: tuple[Configuration, ...]
    note: str = ""
    """The paper's protocol, where it is not that of the base, and the source of results."""
    paper_base: Callable[[], Run] = vit_300
    """The base at the paper's scale: ImageNet, many GPUs."""
    small_base: Callable[[], Run] = conv
    """The base at scale small: one CPU core, minutes per run."""
    metrics: tuple[str, ...] = ("20-NN", "linear")
    """The columns, the most important first: names of METRICS."""

    def base(self, scale: Scale) -> Run:
        """Return the base Run at this scale."""
        return self.small_base() if scale == "small" else self.paper_base()

    def run(self, configuration: Configuration, scale: Scale, base: Run | None = None) -> Run:
        """Return the Run of a configuration; `base` replaces the table's own base."""
        base = base or self.base(scale)
        return edit(base, **configuration.changes(scale, base))

    def paper_results(self, configuration: Configuration) -> dict[str, float]:
        """Return the paper's results of a configuration by metric."""
        values = zip(self.metrics, configuration.paper, strict=False)
        return {name: value for name, value in values if value is not None}

    def select(self, names: Sequence[str]) -> list[Configuration]:
        """Return the named configurations in the table's order, or all. Raise UserError if a name is unknown."""
        known = [item.name for item in self.configurations]
        for name in names:
            if name not in known:
                raise UserError(
                    f"{self.name} has no configuration {name!r}{did_you_mean(name, known)}\n"
                    f"Configurations: {', '.join(known)}."
                )
        return [item for item in self.configurations if not names or item.name in names]
