"""`--evals`: parsing, formatting, and errors before training; the output of `dino eval`."""

import json

import pytest

from dino_ssl.cli.eval_spec import parse_scheduled_eval
from dino_ssl.cli.evaluate import show
from dino_ssl.config import from_dict, to_dict
from dino_ssl.errors import UserError
from dino_ssl.evals import EVALUATIONS, davis_score, find_evaluation
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.low_shot import LowShot
from dino_ssl.evals.retrieval import Retrieval
from dino_ssl.evals.scheduled import ScheduledEval
from dino_ssl.run import Run
from dino_ssl.terminal import Terminal

SPECS = {
    "knn train/ val/": ScheduledEval(evaluation=KNN(), sources=("train/", "val/")),
    "knn 'my photos/' --k 5 20 --every-epochs 0.5": ScheduledEval(
        evaluation=KNN(k=(5, 20)), sources=("my photos/",), every_epochs=0.5
    ),
    "low-shot photos/ --share 1 --per-class 1 5 --every-epochs 10": ScheduledEval(
        evaluation=LowShot(share=(1.0,), per_class=(1, 5)), sources=("photos/",), every_epochs=10
    ),
    "retrieval rparis6k --size 512 --multiscale --query whole": None,
    "copy-detection scenes none more --gem 3": None,
    "linear scenes --lr 0.1 --patches True": None,
    "attention-masks scenes --mass 0.6 --layer 0": None,
    "video-segmentation DAVIS --radius 6": None,
    "two-crop-retrieval photos/ --max-images 500 --seed 1": None,
}


@pytest.mark.parametrize("words", SPECS)
def test_a_spec_is_parsed_printed_and_saved_without_change(words):
    scheduled = parse_scheduled_eval(words)
    assert SPECS[words] in (None, scheduled)
    assert parse_scheduled_eval(str(scheduled)) == scheduled
    assert scheduled.evaluation.name == words.split()[0]
    assert scheduled.evaluation != type(scheduled.evaluation)() or words == "knn train/ val/"
    run = Run(evals=(scheduled,))
    assert from_dict(Run, to_dict(run)) == run


def test_every_evaluation_can_be_scheduled():
    for name in EVALUATIONS:
        (first, *_) = find_evaluation(name).sources
        assert parse_scheduled_eval(f"{name} {first.name}").label == f"{name} {first.name}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "in quotes"),
        ("photos/", "comes before this option"),
        ("knm train val", "did you mean 'knn'"),
        ("knn 'a", "No closing quotation"),
        ("knn a --every-epochs -1", "`every_epochs` must be at least 0"),
        ("knn a --temperature 0", "`temperature` must be above 0"),
    ],
)
def test_invalid_specs_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_scheduled_eval(words)


def test_missing_sources_and_unknown_flags_are_reported_as_by_dino_eval(dino):
    for words, message in (("retrieval", "BENCHMARK"), ("knn a --kk 5", "--kk"), ("knn a --k five", "five")):
        ran = dino("train", "scenes", "--evals", words)
        assert ran.code == 2
        assert message in ran.err + ran.out


def test_missing_sources_and_duplicates_are_refused_from_python():
    with pytest.raises(UserError, match=r"retrieval expected BENCHMARK; got nothing"):
        ScheduledEval(evaluation=Retrieval(), sources=())
    with pytest.raises(UserError, match="twice: knn a"):
        Run(evals=(parse_scheduled_eval("knn a"), parse_scheduled_eval("knn a --every-epochs 3")))


def test_the_plan_shows_evals_as_typed(dino, photos, tiny):
    words = f"knn '{photos}' --k 3 --every-epochs 2"
    ran = dino("train", photos, *tiny, "--evals", words, "retrieval scenes", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    run = from_dict(Run, ran.json["run"])
    assert [str(scheduled) for scheduled in run.evals] == [words, "retrieval scenes"]
    assert {row["name"] for row in ran.json["plan"]} >= {"evals"}
    assert "knn" in next(row["value"] for row in ran.json["plan"] if row["name"] == "evals")
    assert '"NAME DATA..."' in dino("train", "--help-all").out


# -- output of dino eval ----------------------------------------------------------------------------------------


def test_the_selected_learning_rate_is_printed(capsys):
    details = {"selected": {"lr": 0.3}, "sweep": [{"lr": 0.1}, {"lr": 0.3}]}
    result = {"evaluation": "linear", "size": 32, "values": {"top-1": 50.0}, "references": {}, "data": {}}
    show({**result, "details": details}, "run", Terminal())
    assert "Selected on held-out training images: lr 0.3" in capsys.readouterr().out
    show({**result, "details": {**details, "sweep": details["sweep"][:1]}}, "run", Terminal())
    assert "Selected" not in capsys.readouterr().out


def test_scores_of_existing_results_are_written(dino, monkeypatch, tmp_path):
    monkeypatch.setattr(davis_score, "score_results", lambda *arguments, **options: {"J&F-Mean": 0.5})
    output = dino("eval", "video-segmentation", "results", "DAVIS", "--score", "-o", "scores", "--json")
    assert output.json == {"J&F-Mean": 0.5, "file": "scores/scores.json"}
    assert json.loads((tmp_path / "scores/scores.json").read_text()) == {"J&F-Mean": 0.5}
