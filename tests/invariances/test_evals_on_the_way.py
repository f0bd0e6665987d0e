"""A run's `evals`: asked when they are due, of the network that comes out, with no trace in what is learned."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import CPU, edit, fit, last, same_training, tiny

from dino_ssl.config import from_dict
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_masks import AttentionMasks
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.scheduled import ScheduledEval
from dino_ssl.events import EvalDone, EvalStarted, Logged
from dino_ssl.metrics import read_metrics
from dino_ssl.models.pretrained import load
from dino_ssl.models.timm import Timm
from dino_ssl.report.run_report import write_report
from dino_ssl.run import Run, read_run
from dino_ssl.training import train

PHOTOS = Scenes(count=24, size=32, classes=4, seed=3)
EVERY = ScheduledEval(evaluation=KNN(k=(3,), val_fraction=0.5), sources=(PHOTOS,), every_epochs=2)
AT_THE_END = ScheduledEval(
    evaluation=AttentionMasks(mass=(0.6,), size=32), sources=(Scenes(count=4, size=32, part="val"),)
)
KNN_LABEL, MASKS_LABEL = EVERY.label, AT_THE_END.label


def asking(out: Path) -> Run:
    return tiny(out, evals=(EVERY, AT_THE_END))


def told(run: Run) -> dict[str, list[dict]]:
    """The answers in metrics.jsonl, by what was asked."""
    lines = [line for line in read_metrics(Path(run.out)) if "eval" in line]
    return {label: [line for line in lines if line["eval"] == label] for label in (KNN_LABEL, MASKS_LABEL)}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list]:
    run = asking(tmp_path_factory.mktemp("asked") / "run")
    return run, fit(run)


def test_they_are_asked_when_they_are_due(asked: tuple[Run, list]) -> None:
    """Three epochs of five steps: before the first step, after the second epoch and at the end; or at the end alone."""
    run, events = asked
    assert [(e.name, e.clock.step) for e in events if isinstance(e, EvalDone)] == [
        (KNN_LABEL, 0), (KNN_LABEL, 10), (KNN_LABEL, 15), (MASKS_LABEL, 15),
    ]  # fmt: skip
    for before, event in pairwise(events):
        assert not isinstance(event, EvalDone) or before == EvalStarted(event.clock, event.name)
    answers = told(run)
    assert [(line["step"], line["epoch"]) for line in answers[KNN_LABEL]] == [(0, 0), (10, 2), (15, 3)]
    assert [line["step"] for line in answers[MASKS_LABEL]] == [15]


def test_the_last_answer_is_that_of_the_network_that_comes_out(asked: tuple[Run, list]) -> None:
    """Of the teacher: the student's attention is another."""
    run, _ = asked
    for ask in run.evals:
        values = ask.evaluation.bind(ask.sources, EvalContext(size=32))(load(run.out))
        line = told(run)[ask.label][-1]
        assert {name: line[name] for name in values} == pytest.approx(dict(values))
    student = AT_THE_END.evaluation.bind(AT_THE_END.sources, EvalContext(size=32))(load(run.out, which="student"))
    assert student["jaccard 60%"] != pytest.approx(line["jaccard 60%"])


def test_a_run_keeps_what_it_asks(asked: tuple[Run, list]) -> None:
    run, _ = asked
    assert read_run(Path(run.out)).evals == run.evals
    assert from_dict(Run, last(run)["run"]).evals == run.evals


def test_what_is_learned_does_not_know_of_them(asked: tuple[Run, list], tmp_path: Path) -> None:
    run, _ = asked
    plain = tiny(tmp_path / "plain")
    fit(plain)
    assert not same_training(run, plain)


def test_a_run_that_goes_on_asks_on(asked: tuple[Run, list], tmp_path: Path) -> None:
    """Stopped in the third epoch; before it had asked twice, afterwards it asks once more, and of the same network."""
    whole, _ = asked
    run = asking(tmp_path / "run")
    fit(run, until=12)
    assert [line["step"] for line in told(run)[KNN_LABEL]] == [0, 10]
    events = fit(read_run(Path(run.out)), resume=True)
    assert [(e.name, e.clock.step) for e in events if isinstance(e, EvalDone)] == [(KNN_LABEL, 15), (MASKS_LABEL, 15)]
    assert told(run) == told(whole)


def test_what_a_stop_left_unasked_is_asked_when_the_run_goes_on(asked: tuple[Run, list], tmp_path: Path) -> None:
    """Stopped at the end of the second epoch, when it was due; and once more, when the answer is there."""
    whole, _ = asked
    run = asking(tmp_path / "run")
    for event in train(run, CPU, run.data.open()):
        if isinstance(event, EvalStarted) and event.clock.step == 10:
            break
    assert [line["step"] for line in told(run)[KNN_LABEL]] == [0]
    events = fit(read_run(Path(run.out)), resume=True, until=12)
    assert [(e.name, e.clock.step) for e in events if isinstance(e, EvalDone)] == [(KNN_LABEL, 10)]
    fit(read_run(Path(run.out)), resume=True)
    assert told(run) == told(whole)


def test_training_is_saved_before_what_may_take_long(tmp_path: Path) -> None:
    run = edit(asking(tmp_path / "run"), save_minutes=60.0)
    for event in train(run, CPU, run.data.open()):
        if isinstance(event, EvalStarted) and event.clock.step:
            assert last(run)["step"] == event.clock.step == 10
            break


@pytest.mark.parametrize(
    ("ask", "change", "said"),
    [
        (
            ScheduledEval(evaluation=KNN(), sources=("nowhere",)),
            {},
            r'--evals "knn nowhere" cannot be asked: .*nowhere',
        ),
        (AT_THE_END, dict(backbone=Timm(name="test_resnet")), "attention-masks scenes .*expected a Vision Transformer"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_first_step(
    ask: ScheduledEval, change: dict, said: str, tmp_path: Path
) -> None:
    run = tiny(tmp_path / "run", evals=(ask,), **change)
    events = []
    with pytest.raises(UserError, match=said):
        events += fit(run)
    assert not any(isinstance(event, Logged) for event in events)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_report_shows_them(asked: tuple[Run, list], tmp_path: Path) -> None:
    run, _ = asked
    shutil.copytree(run.out, tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    section = page.partition("<h2>Evaluations</h2>")[2].partition("</section>")[0]
    first, *_, last_one = told(run)[KNN_LABEL]
    assert f"<h3>{KNN_LABEL}</h3>" in section
    assert section.count("<svg") == 1  # the one that was asked more than once
    assert f"<td>{first['3-NN']:.1f}</td><td>{last_one['3-NN']:.1f}</td>" in section.replace(' class=""', "")
    assert f"<h3>{MASKS_LABEL}</h3>" in section
    assert f"{KNN_LABEL} --every-epochs 2" in page  # among the settings, as it is typed


def test_tensorboard_has_them(asked: tuple[Run, list]) -> None:
    """Under what was asked, so that two evaluations do not share a curve."""
    written = b"".join(file.read_bytes() for file in Path(asked[0].out, "tensorboard").iterdir())
    assert b"knn_scenes_--k_3_--val-fraction_0.5/3-NN" in written
    assert re.search(rb"attention-masks_scenes[-\w.]*/jaccard_60", written)
