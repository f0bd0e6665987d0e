"""Is it learning, or has it collapsed, and which way? From what is logged anyway, in words that say what to turn.

`Monitor` sees each line of metrics as it comes, `diagnose` a whole history; `advice.check_config` reads the settings before
the first step. docs/collapse.md tells how to read the numbers and what each threshold stands for.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from dino_ssl.collapse.checks import Finding, advise
from dino_ssl.run import Run

LINES = 5
"""A line alone says little: what is judged is the mean of so many."""
GRACE_STEPS, GRACE_SHARE = 30, 0.1
"""Before so many steps, and before the learning rate has risen or this share of the run has passed, whichever is less,
nothing but a number that is none is called a collapse: a fresh network gives one output for everything."""
NEAR_TOP = 0.98
"""Of ln K: a teacher's entropy above it says the same of every picture."""
NO_MESSAGE = 0.01
"""Of ln K: where the entropy of the batch's mean target is above the mean entropy of its targets by less, they are one
target."""
WORSE_THAN_GUESSING = 1.1
"""Of ln K: a loss above it is of a student that is sure and wrong."""
ONE_PROTOTYPE = 1.5
"""Prototypes in use, exp of the entropy of their shares: fewer are one."""
RISEN = 3.0
"""Without prototypes: times the loss of the first lines (MoCo's rises by itself, while its queue fills)."""
SILENT, FEW_PROTOTYPES = 0.02, 0.05
"""Entropy and KL below the first, of ln K, are 0; then fewer prototypes than the second, of K, are too few as well."""
NO_SPREAD = 0.03
"""Features whose directions differ by less than this, as a share of their length, are one feature."""
ONE_DIRECTION, RANK_LOST = 1.2, 0.25
"""An effective rank below the first is a line; it is lost where it is below the second of what it once was."""
STILL = 0.01
"""A teacher that has taken less than this of the student in `STILL_STEPS` steps does not move."""
STILL_STEPS = 50


class Monitor:
    """Sees one line of metrics after the other, and says what stands now; a line costs the same, however long the run.

    prototypes: K, None for a method without. run: with it the advice names its own settings. steps_per_epoch: with it
    the first part of a run is known, in which nothing is judged.
    """

    def __init__(self, prototypes: int | None, run: Run | None = None, steps_per_epoch: int | None = None) -> None:
        self._top = None if prototypes is None else math.log(prototypes)
        self._run, self._grace = run, GRACE_STEPS
        if run is not None and steps_per_epoch is not None:
            warm = run.optim.warmup_epochs * steps_per_epoch
            self._grace = max(GRACE_STEPS, min(warm, GRACE_SHARE * run.optim.epochs * steps_per_epoch))
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=LINES)
        self._first_loss, self._lowest_loss, self._highest_rank = math.nan, math.inf, 0.0
        self._taken, self._since = 0.0, None  # share of the student that the teacher took on, and from which step on

    def judges(self, step: int) -> bool:
        """Whether the first part of the run is over, in which only what has no excuse is named."""
        return step >= self._grace

    def see(self, row: Mapping[str, Any]) -> list[Finding]:
        """The findings that stand after this line, the gravest first. A number that is none is None or NaN in it."""
        if "loss" not in row:
            return []
        step = int(row.get("step", 0))
        if not _finite(row["loss"]):
            return [self._finding("Divergence", f"the loss stopped being a number at step {step}.")]
        self._follow_teacher(step, row.get("momentum"))
        self._recent.append(row)
        if len(self._recent) < LINES:
            return []
        now = {name: value for name in row if (value := _mean(self._recent, name)) is not None}
        if math.isnan(self._first_loss):
            self._first_loss = now["loss"]
        found = self._risen(now)
        if self.judges(step):
            found += [*self._outputs(now), *self._features(now), *self._teacher(step, now)]
        self._lowest_loss = min(self._lowest_loss, now["loss"])
        self._highest_rank = max(self._highest_rank, now.get("feature_rank", 0.0))
        return sorted(found, key=lambda finding: not finding.grave)

    def _risen(self, now: Mapping[str, float]) -> list[Finding]:
        """Without prototypes, no loss is known for guessing: what is left is to have become much worse."""
        loss = now["loss"]
        if self._top is not None or loss <= RISEN * self._first_loss:
            return []
        return [self._finding("Divergence", f"the loss is {loss:.3g}, and was {self._first_loss:.3g} at first.")]

    def _outputs(self, now: Mapping[str, float]) -> list[Finding]:
        """Fig. 7's two collapses, their kin, and a student that is worse than guessing."""
        loss, entropy, kl = now["loss"], now.get("teacher_entropy"), now.get("kl")
        if self._top is None or entropy is None or kl is None:
            return []
        top = self._top
        of_top = f"ln K = {top:.2f}"
        if entropy > NEAR_TOP * top and loss > NEAR_TOP * top:
            text = (
                f"teacher entropy {entropy:.2f} and loss {loss:.2f} stand at {of_top}: the teacher gives every picture "
                "all prototypes alike (Fig. 7, without sharpening)."
            )
            return [self._finding("Uniform collapse", text)]
        together = now.get("marginal_entropy", top)
        used = now.get("prototypes_used", math.exp(together))
        unknown = "marginal_entropy" not in now  # curves of before it was logged
        silent = entropy < SILENT * top and kl < SILENT * top
        if used < ONE_PROTOTYPE or (silent and (unknown or used < FEW_PROTOTYPES * math.exp(top))):
            text = (
                f"teacher entropy {entropy:.3f} and KL {kl:.3f} are close to 0"
                + ("" if unknown else f", and {used:.1f} prototypes of {math.exp(top):.0f} are used")
                + ": one output takes every picture (Fig. 7, without centering)."
            )
            return [self._finding("Collapse to one prototype", text)]
        if together - entropy < NO_MESSAGE * top:
            text = (
                f"every picture gets the same target: the entropy of a batch's mean target, {together:.2f}, is that of "
                f"each, {entropy:.2f} of {of_top}, so there is nothing in it to learn."
            )
            return [self._finding("One target for all", text)]
        if loss > WORSE_THAN_GUESSING * top and loss > self._lowest_loss:
            text = (
                f"the loss is {loss:.2f}, above {of_top}: the student is sure of itself and wrong, worse than guessing."
            )
            return [self._finding("Divergence", text)]
        grasped = self._first_loss - loss if unknown else together - loss
        if loss > 0.9 * top and grasped < (0.1 if unknown else NO_MESSAGE) * top:
            text = f"the loss is {loss:.2f} of {of_top}, near to guessing. Early on this is usual. If it stays:"
            return [self._finding("Not learning yet", text, grave=False)]
        return []

    def _features(self, now: Mapping[str, float]) -> list[Finding]:
        spread, rank = now.get("feature_spread"), now.get("feature_rank")
        if spread is not None and spread < NO_SPREAD:
            text = f"the backbone gives every picture nearly the same feature: directions differ by {spread:.3f} of 1."
        elif rank is not None and rank < ONE_DIRECTION and rank < RANK_LOST * self._highest_rank:
            text = f"the effective rank of the features fell from {self._highest_rank:.1f} to {rank:.1f}, to a line."
        else:
            return []
        return [self._finding("Feature collapse", text)]

    def _teacher(self, step: int, now: Mapping[str, float]) -> list[Finding]:
        if self._since is None or step - self._since < STILL_STEPS or self._taken > STILL:
            return []
        apart = now.get("teacher_distance")
        text = (
            f"in {step - self._since} steps the teacher took on {self._taken:.2%} of the student"
            + (f" and is {apart:.1%} of its length away from it" if apart is not None else "")
            + ": its targets are those of the network it began as."
        )
        return [self._finding("The teacher does not move", text)]

    def _follow_teacher(self, step: int, momentum: float | None) -> None:
        """A teacher of momentum m takes 1 - m of the student in each step; lines give m at their last one."""
        if momentum is None:
            return
        if self._since is None:
            self._since = self._last = step
        self._taken += (step - self._last) * (1 - momentum)
        self._last = step

    def _finding(self, name: str, seen: str, *, grave: bool = True) -> Finding:
        return Finding(name, seen, advise(name, self._run), grave)


def diagnose(
    history: Sequence[Mapping[str, Any]],
    prototypes: int | None,
    run: Run | None = None,
    steps_per_epoch: int | None = None,
) -> list[Finding]:
    """What is wrong at the end of logged training metrics, in order; empty where nothing is.

    What ended the run counts: a line whose loss is no number stays the last word.
    """
    monitor = Monitor(prototypes, run, steps_per_epoch)
    found: list[Finding] = []
    for row in history:
        if "loss" in row:
            found = monitor.see(row)
            if not _finite(row["loss"]):
                return found
    return found


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _mean(rows: Sequence[Mapping[str, Any]] | deque[Mapping[str, Any]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
    return sum(values) / len(values) if values else None
