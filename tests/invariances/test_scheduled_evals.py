"""The `evals` of a run: evaluated on schedule, on the exported network, without an effect on training."""

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
REPEATED = ScheduledEval(evaluation=KNN(k=(3,), val_fraction=0.5), sources=(PHOTOS,), every_epochs=2)
LAST = ScheduledEval(evaluation=AttentionMasks(mass=(0.6,), size=32), sources=(Scenes(count=4, size=32, part="val"),))
KNN_LABEL, MASKS_LABEL = REPEATED.label, LAST.label


def run_with_evals(out: Path) -> Run:
    return tiny(out, evals=(REPEATED, LAST))


def logged(run: Run) -> dict[str, list[dict]]:
    """Return the rows of each evaluation in metrics.jsonl."""
    lines = [line for line in read_metrics(Path(run.out)) if "eval" in line]
    return {label: [line for line in lines if line["eval"] == label] for label in (KNN_LABEL, MASKS_LABEL)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list]:
    run = run_with_evals(tmp_path_factory.mktemp("trained") / "run")
    return run, fit(run)


def test_evaluations_follow_their_schedule(trained: tuple[Run, list]) -> None:
    """Three epochs of five steps: before the first step, after the second epoch and at the end; or only at the end."""
    run, events = trained
    assert [(e.name, e.clock.step) for e in events if isinstance(e, EvalDone)] == [
        (KNN_LABEL, 0), (KNN_LABEL, 10), (KNN_LABEL, 15), (MASKS_LABEL, 15),
    ]  # fmt: skip
    for before, event in pairwise(events):
        assert not isinstance(event, EvalDone) or before == EvalStarted(event.clock, event.name)
    rows = logged(run)
    assert [(line["step"], line["epoch"]) for line in rows[KNN_LABEL]] == [(0, 0), (10, 2), (15, 3)]
    assert [line["step"] for line in rows[MASKS_LABEL]] == [15]


def test_the_last_scores_are_those_of_the_exported_network(trained: tuple[Run, list]) -> None:
    """It is the teacher; the student's attention differs."""
    run, _ = trained
    for scheduled in run.evals:
        values = scheduled.evaluation.prepare(scheduled.sources, EvalContext(size=32))(load(run.out))
        line = logged(run)[scheduled.label][-1]
        assert {name: line[name] for name in values} == pytest.approx(dict(values))
    student = LAST.evaluation.prepare(LAST.sources, EvalContext(size=32))(load(run.out, which="student"))
    assert student["jaccard 60%"] != pytest.approx(line["jaccard 60%"])


def test_evals_are_saved_with_the_run(trained: tuple[Run, list]) -> None:
    run, _ = trained
    assert read_run(Path(run.out)).evals == run.evals
    assert from_dict(Run, last(run)["run"]).evals == run.evals


def test_evaluations_do_not_change_training(trained: tuple[Run, list], tmp_path: Path) -> None:
    run, _ = trained
    plain = tiny(tmp_path / "plain")
    fit(plain)
    assert not same_training(run, plain)


def test_a_resumed_run_repeats_an_interrupted_evaluation(trained: tuple[Run, list], tmp_path: Path) -> None:
    """Stopped during the evaluation at the end of the second epoch, for which a checkpoint is saved, and after it."""
    expected, _ = trained
    run = edit(run_with_evals(tmp_path / "run"), save_minutes=60.0)
    for event in train(run, CPU, run.data.open()):
        if isinstance(event, EvalStarted) and event.clock.step == 10:
            assert last(run)["step"] == 10
            break
    assert [line["step"] for line in logged(run)[KNN_LABEL]] == [0]
    events = fit(read_run(Path(run.out)), resume=True, until=12)
    assert [(e.name, e.clock.step) for e in events if isinstance(e, EvalDone)] == [(KNN_LABEL, 10)]
    events = fit(read_run(Path(run.out)), resume=True)
    assert [(e.name, e.clock.step) for e in events if isinstance(e, EvalDone)] == [(KNN_LABEL, 15), (MASKS_LABEL, 15)]
    assert logged(run) == logged(expected)


@pytest.mark.parametrize(
    ("scheduled", "change", "message"),
    [
        (
            ScheduledEval(evaluation=KNN(), sources=("nowhere",)),
            {},
            r'`evals` "knn nowhere" is not possible: .*nowhere',
        ),
        (LAST, dict(backbone=Timm(name="test_resnet")), "attention-masks scenes .*expected a Vision Transformer"),
    ],
)
def test_unsuitable_evaluations_are_refused_before_the_first_step(
    scheduled: ScheduledEval, change: dict, message: str, tmp_path: Path
) -> None:
    run = tiny(tmp_path / "run", evals=(scheduled,), **change)
    events = []
    with pytest.raises(UserError, match=message):
        events += fit(run)
    assert not any(isinstance(event, Logged) for event in events)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_report_shows_evaluations(trained: tuple[Run, list], tmp_path: Path) -> None:
    run, _ = trained
    shutil.copytree(run.out, tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    section = page.partition("<h2>Evaluations</h2>")[2].partition("</section>")[0]
    first, *_, final = logged(run)[KNN_LABEL]
    assert f"<h3>{KNN_LABEL}</h3>" in section
    assert section.count("data:image/svg+xml") == 1  # only the repeated one has a curve
    assert f"<td>{first['3-NN']:.1f}</td><td>{final['3-NN']:.1f}</td>" in section.replace(' class=""', "")
    assert f"<h3>{MASKS_LABEL}</h3>" in section
    assert f"{KNN_LABEL} --every-epochs 2" in page  # among the settings


def test_tensorboard_has_a_curve_per_evaluation(trained: tuple[Run, list]) -> None:
    written = b"".join(file.read_bytes() for file in Path(trained[0].out, "tensorboard").iterdir())
    assert f"{KNN_LABEL}/3-NN".encode() in written
    assert f"{MASKS_LABEL}/jaccard 60%".encode() in written
