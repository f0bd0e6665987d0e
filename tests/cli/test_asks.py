"""`--evals`: what is typed becomes settings, is shown as it is typed, and slips are said before training."""

import pytest

from dino_ssl.cli.eval_spec import parse_ask
from dino_ssl.config import from_dict, to_dict
from dino_ssl.errors import UserError
from dino_ssl.evals import EVALUATIONS, find_evaluation
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.low_shot import LowShot
from dino_ssl.evals.scheduled import ScheduledEval, Settings
from dino_ssl.run import Run

TYPED = {
    "knn train/ val/": ScheduledEval(evaluation=KNN(), sources=("train/", "val/")),
    "knn 'my photos/' --k 5 20 --every-epochs 0.5": ScheduledEval(
        evaluation=KNN(k=(5, 20)), sources=("my photos/",), every_epochs=0.5
    ),
    "low-shot photos/ --share 1 --per-class 1 5 --no-normalize --every-epochs 10": ScheduledEval(
        evaluation=LowShot(share=(1.0,), per_class=(1, 5), normalize=False), sources=("photos/",), every_epochs=10
    ),
    "retrieval rparis6k --size 512 --multiscale --query whole": None,
    "copy-detection scenes none more --no-whiten": None,
    "linear scenes --lr 0.1 --patches True": None,
    "attention-masks scenes --mass 0.6 --objects instance": None,
    "video-segmentation DAVIS --radius 6": None,
}


@pytest.mark.parametrize("words", TYPED)
def test_what_is_typed_is_what_is_asked_and_shown_and_saved(words):
    ask = parse_ask(words)
    assert TYPED[words] in (None, ask)
    assert parse_ask(str(ask)) == ask
    assert ask.evaluation.name == words.split()[0]
    assert ask.evaluation != type(ask.evaluation)() or words == "knn train/ val/"
    run = Run(evals=(ask,))
    assert from_dict(Run, to_dict(run)) == run


def test_every_evaluation_can_be_asked_while_training():
    assert {kind.name for kind in Settings.__args__} == set(EVALUATIONS)  # what a run.json may name
    for name in EVALUATIONS:
        (first, *_) = find_evaluation(name).sources
        assert parse_ask(f"{name} {first.name}").label == f"{name} {first.name}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "together in quotes"),
        ("photos/", "comes before it"),
        ("knm train val", "did you mean 'knn'"),
        ("knn 'a", "No closing quotation"),
        ("knn a --every-epochs -1", "--every-epochs must be 0"),
        ("knn a --temperature 0", "--temperature must be above 0"),
    ],
)
def test_slips_are_said(words, said):
    with pytest.raises(UserError, match=said):
        parse_ask(words)


def test_a_missing_source_and_a_wrong_flag_are_said_as_dino_eval_says_them(dino):
    for words, said in (("knn", "TRAIN"), ("knn a --kk 5", "--kk"), ("knn a --k five", "five")):
        ran = dino("train", "scenes", "--evals", words)
        assert ran.code == 2
        assert said in ran.err + ran.out


def test_from_python_too_a_source_must_be_there_and_nothing_is_asked_twice():
    with pytest.raises(UserError, match=r"knn expected TRAIN \[VAL\]; got nothing"):
        ScheduledEval(evaluation=KNN(), sources=())
    with pytest.raises(UserError, match="twice: knn a"):
        Run(evals=(parse_ask("knn a"), parse_ask("knn a --every-epochs 3")))


def test_a_run_shows_its_evaluations_as_they_are_typed(dino, photos, tiny):
    words = f"knn '{photos}' --k 3 --every-epochs 2"
    ran = dino("train", photos, *tiny, "--evals", words, "retrieval scenes", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    run = from_dict(Run, ran.json["run"])
    assert [str(ask) for ask in run.evals] == [words, "retrieval scenes"]
    assert {row["name"] for row in ran.json["plan"]} >= {"--evals"}
    assert "knn" in next(row["value"] for row in ran.json["plan"] if row["name"] == "--evals")
    assert '"NAME DATA..."' in dino("train", "--help").out
