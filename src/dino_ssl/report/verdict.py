"""The verdict on a run in one sentence: whether it learned, why, and what to do next.

It compares the online evaluation (20-NN accuracy; without labels, two-crop retrieval) with its reference scores.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dino_ssl.collapse.checks import Finding
from dino_ssl.collapse.monitor import diagnose
from dino_ssl.evals.base import below_references
from dino_ssl.report.curves import History, Line, Rows, line, read_history, score_names
from dino_ssl.run import Run, read_description

ONLINE = ("knn", "accuracy", "two-crop-retrieval")
"""Names of the online evaluation in metrics.jsonl; its result is at the top of the page."""
EFFECTIVE_RANK = "effective rank"
"""Name of the second score of two-crop retrieval."""
MIN_MARGIN = 2.0
"""Points of percent that count as a difference at least."""
LATE = 0.75
"""Fraction of the evaluated epochs after which a gain of the margin means that the score still rises."""


class Verdict(NamedTuple):
    """The judgment of a run."""

    kind: Literal["learned", "rising", "below", "collapsed", "unmeasured"]
    sentence: str
    """What happened, the reason, and the next step."""

    @property
    def learned(self) -> bool:
        """True if the network is better than its reference scores."""
        return self.kind in ("learned", "rising")


class Results(NamedTuple):
    """The measurements of a run, read from its folder."""

    info: Mapping[str, Any]
    """run.json."""
    history: History
    findings: list[Finding]
    """Problems at the end of the curves."""
    rows: Rows
    """Lines of the online evaluation in metrics.jsonl."""
    metric: str
    """Its main score, as 20-NN; empty if there is none."""
    scores: Line
    """The main score over epochs."""
    references: Mapping[str, float]
    """Reference scores by name, as `raw pixels`."""
    verdict: Verdict

    @property
    def label(self) -> str:
        """A title, the metric with its kind: `20-NN accuracy`, `Two-crop retrieval`."""
        return self.metric.capitalize() if self.metric.startswith("two-crop") else f"{self.metric} accuracy"


def read_results(run_dir: Path, run: Run) -> Results:
    """Return the measurements of a finished, stopped or active run, and the verdict on it."""
    info, history = read_description(run_dir), read_history(run_dir)
    steps_per_epoch = max(1, info["data"]["trained_on"] // run.optim.batch_size)
    findings = diagnose(history.training, run.method.num_prototypes, run, steps_per_epoch)
    rows = next((history.evaluations[name] for name in ONLINE if name in history.evaluations), [])
    metric = next((name for row in rows[-1:] for name in score_names(row)), "")
    scores = line(rows, metric)
    references = references_of(info, metric)
    judged = verdict(metric, scores, references, info["data"].get("validated_on", math.inf), findings)
    return Results(info, history, findings, rows, metric, scores, references, judged)


def references_of(info: Mapping[str, Any], score: str) -> dict[str, float]:
    """Return the reference scores of run.json for a score, by name, as `raw pixels`."""
    return {name.replace("_", " "): row[score] for name, row in info["reference_scores"].items() if score in row}


def below_initial(rows: Rows) -> str:
    """Return in one line which last scores of an evaluation are below those before the first step, if any were."""
    first, last = (
        {name: row[name] for name in score_names(row) if row[name] is not None} for row in (rows[0], rows[-1])
    )
    return below_references(last, {"initial weights": first}) if rows[0]["step"] == 0 else ""


def margin(score: float, num_images: float) -> float:
    """Return the points of percent by which another score of the same images must exceed `score` to count.

    One standard error of an accuracy (of the difference, if both correlate by 1/2), at least one image and MIN_MARGIN.
    """
    return max(MIN_MARGIN, 100 / num_images, math.sqrt(score * (100 - score) / num_images))


def verdict(
    metric: str, scores: Line, references: Mapping[str, float], num_images: float, findings: Sequence[Finding] = ()
) -> Verdict:
    """Judge a run by its scores in percent and its reference scores; docs/report.md explains the thresholds.

    scores: epochs, and the value of `metric` after each. num_images: of the validation set. findings: problems at the
    end of training.
    """
    if (fatal := next((finding for finding in findings if finding.fatal), None)) is not None:
        return Verdict("collapsed", f"Collapsed ({fatal.name.lower()}): {fatal.suggestion}")
    epochs, values = scores
    if not values or not references:
        missing = "reference scores" if values else "online evaluation"
        return Verdict("unmeasured", f"Not judged without {missing}: look at the report's maps and nearest neighbors.")
    last, (best, epoch) = values[-1], max(zip(values, epochs, strict=True), key=lambda pair: pair[0])
    name, reference = max(references.items(), key=lambda item: item[1])
    before = max((y for x, y in zip(epochs, values, strict=True) if x <= LATE * epochs[-1]), default=last)
    is_rising = last >= before + margin(before, num_images)
    rise = f"rose by {last - before:.1f} points in the last {100 - 100 * LATE:.0f} % of the epochs"
    is_worse = last + margin(last, num_images) <= best
    step = f"the best weights, of epoch {epoch:.4g} ({best:.1f} %), are better" if is_worse else ""
    needed = margin(reference, num_images)
    known = f" for {num_images:,} validation images" if math.isfinite(num_images) else ""  # old runs do not say
    explained = f"(margin {needed:.1f}{known})"
    if last < reference + needed:
        relation = "is below" if last < reference else "is not clearly above"
        compared = f"{metric} {last:.1f} % {relation} {name}, {reference:.1f} % {explained}"
        if best < reference + needed:
            step = "train longer, on more images, or from trained weights (`init`)"
            step = f"it {rise}: train longer" if is_rising else step
        return Verdict("below", f"No better than its reference scores: {compared}; {step}.")
    if len(values) == 1:
        step = "train longer: one evaluation does not show whether it still rises"
    compared = f"{metric} {last:.1f} % is {last - reference:.1f} points above {name} {explained}"
    if is_rising:
        return Verdict("rising", f"Learned and still rising: {compared}, and {rise}; train longer.")
    return Verdict("learned", f"Learned: {compared}; {step or 'the features are ready to use'}.")
