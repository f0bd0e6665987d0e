"""Detection of a collapse from the logged metrics, while a run trains and afterwards."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from dino_ssl.collapse.checks import DIVERGENCE, LOSS_CHECKS, METRIC_CHECKS, Curves, Finding, run_checks, with_causes
from dino_ssl.run import Run

LINES = 5
"""Lines of metrics that are averaged: a single one is too noisy."""
GRACE_STEPS, GRACE_FRACTION = 30, 0.1
"""Only divergence is reported during the first steps, and during the warm-up of the learning rate or this fraction of
the run, whichever is shorter: a network with random weights has the same output for all images."""
LOGGED = {field.name for field in fields(Curves)}


class Monitor:
    """Detects collapse from the lines of metrics, which are passed one by one; constant time per line.

    prototypes: K, None for a method without. run: its settings are considered in the suggestions. steps_per_epoch: the
    grace period is derived from it; without it, the period is 30 steps.
    """

    def __init__(self, prototypes: int | None, run: Run | None = None, steps_per_epoch: int | None = None) -> None:
        self._curves = Curves(math.nan if prototypes is None else math.log(prototypes))
        self._run, self._grace = run, float(GRACE_STEPS)
        if run is not None and steps_per_epoch is not None:
            epochs = min(run.optim.warmup_epochs, GRACE_FRACTION * run.optim.epochs)
            self._grace = max(GRACE_STEPS, epochs * steps_per_epoch)
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=LINES)
        self._first_step: int | None = None

    def in_grace_period(self, step: int) -> bool:
        """Return True if only divergence is reported at this step."""
        return step < self._grace

    def update(self, row: Mapping[str, Any]) -> list[Finding]:
        """Return the findings after this line, fatal ones first. Values that are not finite are None or nan."""
        if "loss" not in row:
            return []
        step = int(row.get("step", 0))
        if not _is_finite(row["loss"]):
            finding = Finding("Divergence", f"the loss is not finite at step {step}.", DIVERGENCE)
            return [with_causes(finding, self._run)]
        self._follow_teacher(step, row.get("momentum"))
        self._recent.append(row)
        if len(self._recent) < LINES:
            return []
        curves = replace(self._curves, **{name: _mean(self._recent, name) for name in LOGGED & row.keys()})
        if math.isnan(curves.first_loss):
            curves.first_loss = curves.loss
        if "prototypes_used" not in row:
            curves.prototypes_used = math.exp(curves.marginal_entropy)
        groups = (LOSS_CHECKS,) if self.in_grace_period(step) else METRIC_CHECKS
        findings = [finding for group in groups for finding in run_checks(group, curves)[:1]]
        curves.lowest_loss = min(curves.lowest_loss, curves.loss)
        curves.highest_rank = max(curves.highest_rank, curves.feature_rank)
        self._curves = curves
        return sorted((with_causes(item, self._run) for item in findings), key=lambda finding: not finding.fatal)

    def _follow_teacher(self, step: int, momentum: float | None) -> None:
        """Sum 1 - m over the steps; each line has the m of its last step."""
        if momentum is None:
            return
        if self._first_step is None:
            self._first_step = step
        steps = step - self._first_step
        self._curves.teacher_update += (steps - self._curves.teacher_steps) * (1 - momentum)
        self._curves.teacher_steps = steps


def diagnose(
    history: Sequence[Mapping[str, Any]],
    prototypes: int | None,
    run: Run | None = None,
    steps_per_epoch: int | None = None,
) -> list[Finding]:
    """Return the findings at the end of logged metrics; after a loss that is not finite, later lines are ignored."""
    monitor = Monitor(prototypes, run, steps_per_epoch)
    findings: list[Finding] = []
    for row in history:
        if "loss" in row:
            findings = monitor.update(row)
            if not _is_finite(row["loss"]):
                break
    return findings


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _mean(rows: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return the mean of the finite values; nan if there are none."""
    values = [float(row[name]) for row in rows if name in row and _is_finite(row[name])]
    return sum(values) / len(values) if values else math.nan
