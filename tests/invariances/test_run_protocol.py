"""`dino eval` of a run without data gives exactly the scores of its online evaluation, for last and best weights."""

from pathlib import Path

import pytest
from tiny import fit, tiny

from dino_ssl.api.calls import evaluate
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.linear import Linear
from dino_ssl.evals.scheduled import ScheduledEval
from dino_ssl.events import EvalDone, Evaluated, Started
from dino_ssl.models.pretrained import Weights, load
from dino_ssl.models.vit import ViT
from dino_ssl.models.weights import save_backbone
from dino_ssl.run import Run

LINEAR = Linear(epochs=1, crops=1, lr=(0.1,))
FEWER = KNN(k=(5,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list]:
    """A run that differs from every default of the evaluation: size, seed of the split, fraction, voters."""
    run = tiny(
        tmp_path_factory.mktemp("protocol") / "run",
        data=Scenes(count=40, size=32, classes=4),
        seed=3,
        views=dict(local=0),
        optim=dict(epochs=2),
        online_eval=dict(every_epochs=1, size=40, k=5, val_fraction=0.4, max_train_images=20),
        evals=tuple(ScheduledEval(evaluation=evaluation, sources=()) for evaluation in (LINEAR, FEWER)),
    )
    return run, fit(run)


@pytest.mark.parametrize("weights", ["last", "best"])
def test_the_weights_of_a_run_have_its_scores(trained: tuple[Run, list], weights: Weights) -> None:
    run, events = trained
    started, evaluated = events[0], [event for event in events if isinstance(event, Evaluated)]
    scores = {"last": evaluated, "best": [event for event in evaluated if event.is_best]}[weights][-1].values
    assert isinstance(started, Started)
    result = evaluate(run.out, KNN(k=(5, 20)), weights=weights)
    assert result["size"] == run.eval_size == 40
    assert (result["data"]["train"]["images"], result["data"]["val"]["images"]) == (20, 16)
    assert {name: result["values"][name] for name in scores} == scores
    references = {name: {key: row[key] for key in scores} for name, row in result["references"].items()}
    assert references == started.reference_scores


def test_the_last_weights_are_not_the_best(trained: tuple[Run, list]) -> None:
    """The comparison above can fail."""
    run, events = trained
    assert [event.is_best for event in events if isinstance(event, Evaluated)][-1] is False
    last, best = (load(run.out, weights=weights).state_dict() for weights in ("last", "best"))
    assert any((last[name] != best[name]).any() for name in last)


def test_a_scheduled_evaluation_without_data_is_that_of_the_run(trained: tuple[Run, list]) -> None:
    run, events = trained
    assert {event.name: event.values for event in events if isinstance(event, EvalDone)} == {
        "linear --epochs 1 --crops 1 --lr 0.1": evaluate(run.out, LINEAR, references=False)["values"],
        "knn --k 5": evaluate(run.out, FEWER, references=False)["values"],
    }


def test_weights_without_a_run_need_images(tmp_path: Path) -> None:
    network = ViT(width=48, depth=1, heads=1, patch=8, image_size=32)
    path = save_backbone(network, network.build().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"knn expected images; got none, .*x\.safetensors is not the folder of a run\.\nTRAIN: Folder"
    ):
        evaluate(path, "knn")
