"""The verdict on a run, by stated thresholds."""

import pytest

from dino_ssl.collapse.checks import Finding
from dino_ssl.evals.base import below_references
from dino_ssl.report.curves import Line
from dino_ssl.report.verdict import LATE, MARGIN, verdict

REFERENCES = {"raw pixels": 18.0, "random weights": 20.0}


def curve(*values: float) -> Line:
    return list(range(1, len(values) + 1)), values


COLLAPSE = Finding("Uniform collapse", "the targets are uniform.", "Lower `method.teacher_temp`.")
NOT_YET = Finding("Not learning yet", "the loss is near chance.", "Raise `optim.lr`.", fatal=False)


@pytest.mark.parametrize(
    ("scores", "references", "findings", "kind", "sentence"),
    [
        # a run of 3 minutes on 400 images, which ended without a warning
        (curve(17.5, 12.5, 15.0), REFERENCES, (), "below",
         "No better than its reference scores: 20-NN 15.0 % is below random weights, 20.0 %; "
         "train longer, on more images, or from trained weights (`init`)."),
        (curve(10, 10, 10, 15), REFERENCES, (NOT_YET,), "below",
         "No better than its reference scores: 20-NN 15.0 % is below random weights, 20.0 %; "
         "it rose by 5.0 points in the last 25 % of the epochs: train longer."),
        (curve(10, 20 + MARGIN, 20), REFERENCES, (), "below",
         "No better than its reference scores: 20-NN 20.0 % is not clearly above random weights, 20.0 %; "
         "the best weights, of epoch 2 (22.0 %), are better."),
        (curve(60, 20 + MARGIN - 0.1), REFERENCES, (), "below", "is not clearly above random weights"),
        (curve(20 + MARGIN, 20 + MARGIN), REFERENCES, (), "learned",
         "Learned: 20-NN 22.0 % is 2.0 points above random weights; the features are ready to use."),
        (curve(30, 50, 51, 49.5), REFERENCES, (), "learned", "29.5 points above random weights; the features"),
        (curve(30, 60, 50, 50), REFERENCES, (), "learned", "; the best weights, of epoch 2 (60.0 %), are better."),
        (curve(30, 50, 48, 50 + MARGIN), REFERENCES, (), "rising",
         "Learned and still rising: 20-NN 52.0 % is 32.0 points above random weights, "
         "and rose by 2.0 points in the last 25 % of the epochs; train longer."),
        (curve(30, 50, 48, 50 + MARGIN - 0.1), REFERENCES, (), "learned", "ready"),
        (curve(30, 20, 20, 50.5, 50, 50), REFERENCES, (), "learned", "ready"),  # rose before the last quarter
        (curve(80.0), REFERENCES, (NOT_YET,), "learned", "train longer: one evaluation does not show whether it still"),
        (curve(80.0), REFERENCES, (NOT_YET, COLLAPSE), "collapsed", "Collapsed (uniform collapse): Lower `method"),
        (curve(), {}, (COLLAPSE,), "collapsed", "Collapsed (uniform collapse): Lower `method.teacher_temp`."),
        (curve(), REFERENCES, (NOT_YET,), "unmeasured", "Not judged without online evaluation: look at"),
        (curve(80.0), {}, (), "unmeasured", "Not judged without reference scores: look at the maps"),
    ],
)  # fmt: skip
def test_verdicts(scores: Line, references: dict, findings: tuple, kind: str, sentence: str) -> None:
    judged = verdict("20-NN", scores, references, findings)
    assert judged.kind == kind
    assert sentence in judged.sentence
    assert judged.sentence[-1] == "."


def test_a_gain_counts_after_three_quarters_of_the_epochs() -> None:
    for epoch, kind in ((LATE, "learned"), (LATE + 0.01, "rising")):
        assert verdict("20-NN", ([0.2, epoch, 1.0], [30, 40, 40]), REFERENCES).kind == kind


def test_scores_below_a_reference_are_named() -> None:
    references = {"raw_pixels": {"20-NN": 30.0}, "random_weights": {"20-NN": 15.0, "rank": 3.0}}
    assert (
        below_references({"20-NN": 15.0, "rank": 2.0}, references)
        == "Below raw pixels: 20-NN. Below random weights: rank."
    )
    assert below_references({"20-NN": 30.0, "rank": 3.0, "20-NN top-5": 0.0}, references) == ""
    assert below_references({"effective rank": 2.0}, {"raw_pixels": {"effective rank": 9.0}}) == ""  # no score
