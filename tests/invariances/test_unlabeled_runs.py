"""Training without labels: held-out images, two-crop retrieval during training, and exact resume."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import edit, fit, last, same_training, tiny

from dino_ssl.api.calls import evaluate
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.online import OnlineEval
from dino_ssl.evals.two_crop_retrieval import TwoCropRetrieval
from dino_ssl.events import Ended, Evaluated, Event, Started
from dino_ssl.metrics import read_metrics
from dino_ssl.report.run_report import write_report
from dino_ssl.run import Run
from dino_ssl.training_evals import split_dataset

SCORES = ["two-crop retrieval", "two-crop retrieval top-5", "effective rank"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Event]]:
    """A run on a flat folder of 50 images, of which 5 are held out."""
    folder, scenes = tmp_path_factory.mktemp("unlabeled"), Scenes(count=50, size=32).open()
    (folder / "photos").mkdir()
    for i in range(50):
        Image.fromarray(scenes.read(i)).save(folder / f"photos/{i:02}.png")
    narrow = dict(backbone=dict(width=24, depth=1, heads=2), optim=dict(epochs=2), online_eval=dict(every_epochs=1))
    run = tiny(folder / "run", data=Folder(path=str(folder / "photos")), seed=3, **narrow)
    return run, fit(run)


@pytest.fixture(scope="module")
def photos(trained: tuple[Run, list[Event]]) -> ImageDataset:
    return trained[0].data.open()


def test_a_tenth_is_held_out_and_selects_the_best_checkpoint(
    trained: tuple[Run, list[Event]], photos: ImageDataset
) -> None:
    run, (started, *events) = trained
    assert isinstance(started, Started)
    assert started.val_set is not None
    assert (len(started.train_set), len(started.val_set)) == (45, 5)
    assert {*started.train_set.names, *started.val_set.names} == {*photos.names}
    assert started.reference_scores.keys() == {"raw_pixels", "random_weights"}
    assert all(list(scores) == SCORES for scores in started.reference_scores.values())
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [(event.name, event.clock.step) for event in evaluated] == [("two-crop-retrieval", n) for n in (5, 10)]
    assert last(run)["best"]["name"] == SCORES[0]
    assert last(run)["best"]["value"] == max(event.values[SCORES[0]] for event in evaluated)
    assert Path(run.out, "checkpoints/best.pt").is_file()
    assert [line["step"] for line in read_metrics(Path(run.out)) if line.get("eval") == evaluated[0].name] == [5, 10]
    result = evaluate(run.out, "two-crop-retrieval")
    assert result["values"] == pytest.approx(evaluated[-1].values)
    assert result["references"]["raw_pixels"] == started.reference_scores["raw_pixels"]


def test_a_resumed_run_equals_an_uninterrupted_one(trained: tuple[Run, list[Event]], tmp_path: Path) -> None:
    whole, _ = trained
    run = edit(whole, out=str(tmp_path / "run"))
    fit(run, until=7)
    assert isinstance(fit(run, resume=True)[-1], Ended)
    assert not same_training(run, whole)
    evaluations = [[line for line in read_metrics(Path(r.out)) if "eval" in line] for r in (run, whole)]
    assert evaluations[0] == evaluations[1]


def test_the_report_shows_both_figures_next_to_the_reference_scores(trained: tuple[Run, list[Event]]) -> None:
    page = write_report(trained[0].out).read_text()
    assert "Two-crop retrieval on the validation set" in page
    assert 'alt="Two-crop retrieval"' in page
    assert 'alt="Effective rank of the validation set"' in page
    assert "<h2>Evaluations</h2>" not in page


def test_nothing_is_held_out_of_few_images_or_without_evaluation(
    trained: tuple[Run, list[Event]], photos: ImageDataset
) -> None:
    run, _ = trained
    assert split_dataset(edit(run, online_eval=dict(every_epochs=0)), photos) == (photos, None)
    few = photos.subset(range(44))  # 4 images
    assert split_dataset(run, few) == (few, None)
    assert split_dataset(edit(run, online_eval=dict(val_fraction=0.12)), few)[1] is not None


def test_a_run_that_held_out_no_images_needs_some() -> None:
    with pytest.raises(UserError, match="two-crop-retrieval expected IMAGES: the run held out none"):
        TwoCropRetrieval().prepare((), EvalContext())


def test_a_validation_set_replaces_held_out_images(trained: tuple[Run, list[Event]], photos: ImageDataset) -> None:
    train_set, val_set = split_dataset(edit(trained[0], val=Scenes(count=7, size=32)), photos)
    assert train_set is photos
    assert val_set is not None
    assert len(val_set) == 7


@pytest.mark.parametrize(("count", "held_out"), [(49, 5), (2_000, 200), (1_000_000, 2_000)])
def test_the_number_of_held_out_images_is_limited(count: int, held_out: int) -> None:
    class Many(ImageDataset):
        def __init__(self) -> None:
            super().__init__(names=[], sizes=np.empty((0, 2)))

        def __len__(self) -> int:
            return count

        def read(self, index: int) -> np.ndarray:
            raise NotImplementedError

    assert round(OnlineEval().held_out_fraction(Many()) * count) == held_out
    assert not OnlineEval(every_epochs=0).held_out_fraction(Many())
