"""The verdict on a run, by stated thresholds."""

import numpy as np
import pytest

from dino_ssl.collapse.checks import Finding
from dino_ssl.evals.base import below_references
from dino_ssl.report.curves import Line
from dino_ssl.report.verdict import LATE, MIN_MARGIN, margin, verdict

REFERENCES = {"raw pixels": 18.0, "random weights": 20.0}
MANY = 2500
"""Validation images, for which the margin is the smallest."""


def curve(*values: float) -> Line:
    return list(range(1, len(values) + 1)), values


COLLAPSE = Finding("Uniform collapse", "the targets are uniform.", "Lower `method.teacher_temp`.")
NOT_YET = Finding("Not learning yet", "the loss is near chance.", "Raise `optim.lr`.", fatal=False)


@pytest.mark.parametrize(
    ("scores", "references", "findings", "kind", "sentence"),
    [
        # a run of 3 minutes on 400 images, which ended without a warning
        (curve(17.5, 12.5, 15.0), REFERENCES, (), "below",
         "No better than its reference scores: 20-NN 15.0 % is below random weights, 20.0 % "
         "(margin 2.0 for 2,500 validation images); "
         "train longer, on more images, or from trained weights (`init`)."),
        (curve(10, 10, 10, 15), REFERENCES, (NOT_YET,), "below",
         "No better than its reference scores: 20-NN 15.0 % is below random weights, 20.0 % "
         "(margin 2.0 for 2,500 validation images); "
         "it rose by 5.0 points in the last 25 % of the epochs: train longer."),
        (curve(10, 20 + MIN_MARGIN, 20), REFERENCES, (), "below",
         "No better than its reference scores: 20-NN 20.0 % is not clearly above random weights, 20.0 % "
         "(margin 2.0 for 2,500 validation images); "
         "the best weights, of epoch 2 (22.0 %), are better."),
        (curve(60, 20 + MIN_MARGIN - 0.1), REFERENCES, (), "below", "is not clearly above random weights"),
        (curve(20 + MIN_MARGIN, 20 + MIN_MARGIN), REFERENCES, (), "learned",
         "Learned: 20-NN 22.0 % is 2.0 points above random weights "
         "(margin 2.0 for 2,500 validation images); the features are ready to use."),
        (curve(30, 50, 51, 49.5), REFERENCES, (), "learned", "29.5 points above random weights (margin"),
        (curve(30, 60, 50, 50), REFERENCES, (), "learned", "; the best weights, of epoch 2 (60.0 %), are better."),
        (curve(30, 50, 48, 50 + MIN_MARGIN), REFERENCES, (), "rising",
         "Learned and still rising: 20-NN 52.0 % is 32.0 points above random weights "
         "(margin 2.0 for 2,500 validation images), "
         "and rose by 2.0 points in the last 25 % of the epochs; train longer."),
        (curve(30, 50, 48, 50 + MIN_MARGIN - 0.1), REFERENCES, (), "learned", "ready"),
        (curve(30, 20, 20, 50.5, 50, 50), REFERENCES, (), "learned", "ready"),  # rose before the last quarter
        (curve(80.0), REFERENCES, (NOT_YET,), "learned", "train longer: one evaluation does not show whether it still"),
        (curve(80.0), REFERENCES, (NOT_YET, COLLAPSE), "collapsed", "Collapsed (uniform collapse): Lower `method"),
        (curve(), {}, (COLLAPSE,), "collapsed", "Collapsed (uniform collapse): Lower `method.teacher_temp`."),
        (curve(), REFERENCES, (NOT_YET,), "unmeasured", "Not judged without online evaluation: look at"),
        (curve(80.0), {}, (), "unmeasured", "Not judged without reference scores: look at the report's maps"),
    ],
)  # fmt: skip
def test_verdicts(scores: Line, references: dict, findings: tuple, kind: str, sentence: str) -> None:
    judged = verdict("20-NN", scores, references, MANY, findings)
    assert judged.kind == kind
    assert sentence in judged.sentence
    assert judged.sentence[-1] == "."


@pytest.mark.parametrize(
    ("num_images", "score", "points"),
    [
        (15, 20, 10.3), (15, 43, 12.8), (100, 20, 4.0), (300, 50, 2.9), (625, 50, 2.0), (10**6, 50, 2.0),
        (15, 0, 6.7), (15, 100, 6.7),  # one image
    ],
)  # fmt: skip
def test_few_images_need_a_larger_margin(num_images: int, score: float, points: float) -> None:
    """The margin is the standard error of an accuracy, known from many draws."""
    assert margin(score, num_images) == pytest.approx(points, abs=0.05)
    draws = np.random.default_rng(0).binomial(num_images, score / 100, 4000) / num_images
    assert margin(score, num_images) == pytest.approx(max(100 * draws.std(), 2, 100 / num_images), rel=0.05)


def test_a_small_validation_set_changes_the_verdict() -> None:
    """One of 15 images is 6.7 points: neither better than the references nor a rise."""
    for last, kind in ((20 + 6.7, "below"), (20 + 10.4, "rising")):
        judged = verdict("20-NN", curve(20, 20, 20, last), REFERENCES, 15)
        assert judged.kind == kind
        assert "(margin 10.3 for 15 validation images)" in judged.sentence
    assert verdict("20-NN", curve(60, 60, 60, 66.7), REFERENCES, 15).kind == "learned"


def test_a_gain_counts_after_three_quarters_of_the_epochs() -> None:
    for epoch, kind in ((LATE, "learned"), (LATE + 0.01, "rising")):
        assert verdict("20-NN", ([0.2, epoch, 1.0], [30, 40, 40]), REFERENCES, MANY).kind == kind


def test_scores_below_a_reference_are_named() -> None:
    references = {"raw_pixels": {"20-NN": 30.0}, "random_weights": {"20-NN": 15.0, "rank": 3.0}}
    assert (
        below_references({"20-NN": 15.0, "rank": 2.0}, references)
        == "Below raw pixels: 20-NN. Below random weights: rank."
    )
    assert below_references({"20-NN": 30.0, "rank": 3.0, "20-NN top-5": 0.0}, references) == ""
    assert below_references({"effective rank": 2.0}, {"raw_pixels": {"effective rank": 9.0}}) == ""  # no score
