"""The table of checks for collapse: of the settings before training, and of the logged metrics during it.

Sources are the paper's ablations (Figs. 6 and 7, Tables 14 and 15, App. C and D) and its authors' advice.
docs/collapse.md explains metrics and thresholds.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from dino_ssl.run import Run
from dino_ssl.schedules import Clock

MAX_START_TEMPERATURE, MAX_TEMPERATURE = 0.06, 0.08
"""App. D: teacher temperature that works from the first epoch on, and the highest one that works after a warm-up."""
MAX_CENTER_MOMENTUM = 0.99
"""App. D: 0.99 works, 0.999 does not."""


@dataclass(frozen=True)
class Finding:
    """A detected problem: its name, the evidence, and what to tune. fatal: continuing to train is useless."""

    name: str
    message: str
    suggestion: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.message} {self.suggestion}"


@dataclass(frozen=True)
class Check:
    """One check of a `Setup` or of `Curves`; the message formats their fields: `{0.loss:.2f}`."""

    name: str
    test: Callable[[Any], bool]
    message: str
    suggestion: str
    fatal: bool = True


def run_checks(checks: Iterable[Check], subject: "Setup | Curves") -> list[Finding]:
    """Return a finding for each check whose test is true."""
    failed = [check for check in checks if check.test(subject)]
    return [Finding(check.name, check.message.format(subject), check.suggestion, check.fatal) for check in failed]


def check_config(run: Run, steps_per_epoch: int, num_images: int) -> list[Finding]:
    """Return the problems that the settings alone predict, before the first step."""
    return run_checks((*METHOD_CHECKS, *SIZE_CHECKS), Setup(run, steps_per_epoch, num_images))


def with_causes(finding: Finding, run: Run | None) -> Finding:
    """Return the finding with settings of the run that are known to collapse at the front of its suggestion."""
    causes = [] if run is None or finding.name == "Teacher not updated" else run_checks(METHOD_CHECKS, Setup(run))
    known = [f"{cause.name}: {cause.suggestion}" for cause in causes]
    return replace(finding, suggestion=" ".join([*known, finding.suggestion]))


# -- settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """A run before its first step; steps and images are 0 if unknown."""

    run: Run
    steps_per_epoch: int = 0
    num_images: int = 0

    def get(self, name: str) -> Any:
        """Return a setting of the method; None if the method has no such setting."""
        return getattr(self.run.method, name, None)

    @property
    def is_centered(self) -> bool:
        """True if the loss is the cross-entropy with centered targets."""
        return self.get("targets") == "centering" and self.get("loss") == "cross-entropy"

    @property
    def is_hot(self) -> bool:
        """True if the teacher temperature is too high, in general or while the learning rate still rises."""
        temperature, optim = self.run.method.schedules()["teacher_temp"], self.run.optim
        warmup = range(min(optim.epochs, math.ceil(optim.warmup_epochs) or 1))
        highest = max(temperature(Clock(epoch, 1, optim.epochs)) for epoch in warmup)
        return highest > MAX_START_TEMPERATURE or self.get("teacher_temp") > MAX_TEMPERATURE

    @property
    def steps(self) -> int:
        """The steps of the run."""
        return self.steps_per_epoch * self.run.optim.epochs

    @property
    def initial_fraction(self) -> float:
        """The fraction of its initial weights that the EMA teacher keeps to the end."""
        momentum = self.run.method.schedules().get("momentum")
        if momentum is None or self.steps == 0:
            return 0.0
        points = min(self.steps, 1000)
        steps = (int(self.steps * (i + 0.5) / points) for i in range(points))
        update = sum(1 - momentum(Clock(step, self.steps_per_epoch, self.run.optim.epochs)) for step in steps)
        return math.exp(-update * self.steps / points)


METHOD_CHECKS = (
    Check(
        "No predictor",
        lambda s: s.get("predictor") is False and s.get("targets") is None,
        "BYOL without a predictor maps all images to one point (Table 14, row 8: 0.1).",
        "Set `method.predictor` to True.",
    ),
    Check(
        "No bottleneck",
        lambda s: s.get("head_bottleneck") == 0 and s.get("head_layers") >= 3,
        "{0.run.method.head_layers} head layers without the l2-normalized bottleneck do not learn (App. C: 0.1).",
        "Set `method.head_bottleneck` to 256.",
    ),
    Check(
        "No momentum",
        lambda s: s.get("targets") in ("centering", "none") and s.get("teacher") in ("student", "previous-step"),
        "the teacher is not an EMA ({0.run.method.teacher}), and centering is not enough (Fig. 6, Table 15: 0.1).",
        "Set `method.teacher` to momentum, or `method.targets` to sinkhorn.",
    ),
    Check(
        "No centering",
        lambda s: s.get("targets") == "none" and s.get("loss") == "cross-entropy",
        "all images will be assigned to one prototype (Fig. 7).",
        "Set `method.targets` to centering.",
    ),
    Check(
        "No sharpening",
        lambda s: s.get("sharpening") is False and s.get("loss") == "cross-entropy",
        "the teacher has the student's temperature, {0.run.method.student_temp:g}, and becomes uniform (Fig. 7).",
        "Set `method.sharpening` to True.",
    ),
    Check(
        "Temperature too high",
        lambda s: s.is_centered and s.get("sharpening") and s.is_hot,
        "`method.teacher_temp` {0.run.method.teacher_temp:g} is too high (App. D: in the warm-up of the learning rate "
        "0.06 works, and 0.08 gives 0.1).",
        "Start at 0.04 (`method.warmup_teacher_temp`) and warm up to 0.07 over ten epochs or more, or keep 0.04.",
        fatal=False,
    ),
    Check(
        "Center too slow",
        lambda s: s.is_centered and s.get("center_momentum") > MAX_CENTER_MOMENTUM,
        "`method.center_momentum` {0.run.method.center_momentum:g} lags behind the outputs (App. D: 0.999 gives 0.1).",
        "Set `method.center_momentum` to 0.9.",
        fatal=False,
    ),
)
"""Settings of the method with which runs have collapsed. Fatal: a required part is missing."""

SIZE_CHECKS = (
    Check(
        "Momentum too high",
        lambda s: s.initial_fraction > math.exp(-1),
        "the teacher keeps {0.initial_fraction:.0%} of its initial weights to the end (steps: {0.steps}).",
        "Lower `method.momentum`, or train for longer.",
        fatal=False,
    ),
    Check(
        "K too large",
        lambda s: (s.run.method.num_prototypes or 0) > 4 * s.num_images,
        "most of the {0.run.method.num_prototypes} prototypes stay empty (images: {0.num_images}).",
        "Lower `method.out_dim`, to four prototypes per image or less.",
        fatal=False,
    ),
)
"""Settings that do not fit the length of the run or the size of the dataset."""


# -- metrics -------------------------------------------------------------------------------------------------


@dataclass
class Curves:
    """Means over the latest log lines, and extremes of all lines; nan if unknown, which passes all checks."""

    ln_k: float = math.nan
    """nan for methods without prototypes."""
    loss: float = math.nan
    teacher_entropy: float = math.nan
    kl: float = math.nan
    marginal_entropy: float = math.nan
    prototypes_used: float = math.nan
    feature_spread: float = math.nan
    feature_rank: float = math.nan
    first_loss: float = math.nan
    lowest_loss: float = math.inf
    highest_rank: float = 0.0
    teacher_steps: int = 0
    """Steps since the first line."""
    teacher_update: float = 0.0
    """Sum of 1 - m over these steps: the fraction of the way to the student that the EMA teacher has moved."""


DIVERGENCE = "Lower `optim.lr`, set `optim.clip_grad` to 1 or less, or set `precision` to float32."
FEATURES = "Lower the learning rate, use a longer warm-up, and check centering and sharpening, predictor or negatives."
LOSS_CHECKS = (
    Check(
        "Divergence",  # without prototypes; MoCo's loss grows while its queue fills
        lambda c: math.isnan(c.ln_k) and c.loss > 3 * c.first_loss,
        "the loss is {0.loss:.3g}, and was {0.first_loss:.3g} at the start.",
        DIVERGENCE,
    ),
)
"""Checks that also apply during the warm-up."""
OUTPUT_CHECKS = (
    Check(
        "Uniform collapse",
        lambda c: c.teacher_entropy > 0.98 * c.ln_k and c.loss > 0.98 * c.ln_k,
        "teacher entropy {0.teacher_entropy:.2f} and loss {0.loss:.2f} are at ln K = {0.ln_k:.2f}: the targets are "
        "uniform over the prototypes for every image (Fig. 7, without sharpening).",
        "Lower the teacher temperature (`method.teacher_temp`) or the learning rate; use a longer warm-up for both.",
    ),
    Check(
        "Collapse to one prototype",
        lambda c: (
            (c.ln_k > 0 and c.prototypes_used < 1.5)
            or (
                c.teacher_entropy < 0.02 * c.ln_k
                and c.kl < 0.02 * c.ln_k
                and c.prototypes_used < 0.05 * math.exp(c.ln_k)
            )
        ),
        "teacher entropy {0.teacher_entropy:.3f} and KL {0.kl:.3f} are close to 0, and {0.prototypes_used:.1f} "
        "prototypes are used: all images are assigned to one prototype (Fig. 7, without centering).",
        "Check centering (`method.targets`); lower `method.center_momentum`, or raise the teacher temperature.",
    ),
    Check(
        "Identical targets",
        lambda c: c.marginal_entropy - c.teacher_entropy < 0.01 * c.ln_k,
        "all images of a batch have the same target: the entropy of the mean target, {0.marginal_entropy:.2f}, equals "
        "that of each target, {0.teacher_entropy:.2f} of ln K = {0.ln_k:.2f}.",
        "Raise `method.momentum`, lower the learning rate, or use batch norm in the head (`method.head_norm` batch).",
    ),
    Check(
        "Divergence",
        lambda c: c.loss > 1.1 * c.ln_k and c.loss > c.lowest_loss,
        "the loss is {0.loss:.2f}, above ln K = {0.ln_k:.2f}: the student is worse than a uniform prediction.",
        DIVERGENCE,
    ),
    Check(
        "Not learning yet",
        lambda c: c.loss > 0.9 * c.ln_k and c.marginal_entropy - c.loss < 0.01 * c.ln_k,
        "the loss is {0.loss:.2f}, near chance (ln K = {0.ln_k:.2f}). Early in training this is usual.",
        "If it persists, raise the learning rate, lower the teacher's momentum (0.99 for small datasets), or use fewer "
        "prototypes.",
        fatal=False,
    ),
)
FEATURE_CHECKS = (
    Check(
        "Feature collapse",
        lambda c: c.feature_spread < 0.03,
        "the features of all images are nearly equal: their directions differ by {0.feature_spread:.3f} (0 to 1).",
        FEATURES,
    ),
    Check(
        "Feature collapse",
        lambda c: c.feature_rank < 1.2 and c.feature_rank < 0.25 * c.highest_rank,
        "the effective rank of the features fell from {0.highest_rank:.1f} to {0.feature_rank:.1f}.",
        FEATURES,
    ),
)
TEACHER_CHECKS = (
    Check(
        "Teacher not updated",
        lambda c: c.teacher_steps >= 50 and c.teacher_update <= 0.01,
        "in {0.teacher_steps} steps the teacher moved only {0.teacher_update:.2%} of the way to the student.",
        "Lower `method.momentum`: 0.996 for ten thousand steps or more, 0.97 to 0.99 for some thousand.",
    ),
)
METRIC_CHECKS = (LOSS_CHECKS, OUTPUT_CHECKS, FEATURE_CHECKS, TEACHER_CHECKS)
"""Checks of loss, targets, the backbone's features and the teacher; only the first finding of each group counts."""
