"""dino eval finetune: a trained backbone, trained on with labels, from the command line to a run's files."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dino_ssl.api.checkpoints import open_checkpoint
from dino_ssl.api.resolve import starting_from
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.train import EXAMPLES, TrainOptions
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.run import read_run

QUICK = "--optim.epochs 2 --optim.batch-size 12 --workers 0 --precision float32 --views.size 32".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val") / "other photos"
    Scenes(count=12, size=40, classes=4, part="val").write(folder)
    return folder


def test_it_trains_the_checkpoints_network_and_measures_its_classifier(trained, photos, val, dino) -> None:
    run, _ = trained
    ran = dino("eval", "finetune", run, photos, val, *QUICK, "--out", "tuned", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["finished"]
    assert result["steps"] == 2 * (40 // 12)  # nothing is held back: there are pictures to be asked about
    assert {"top-1", "top-5"} <= result["quality"].keys()
    assert result["reference_scores"]["majority_class"]["top-1"] == pytest.approx(25)
    tuned = read_run(Path("tuned"))
    assert tuned.init == str(run)
    assert (tuned.backbone.width, tuned.backbone.drop_path) == (
        48,
        0.1,
    )  # the checkpoint's, with the recipe's drop-path
    assert tuned.method.classifies
    page = Path("tuned/report.html").read_text()
    assert "trained with labels" in page
    assert "top-1" in page
    assert "majority class" in page
    again = dino(
        "eval", "knn", "tuned", photos, "--k", "1", "--no-references", "--json"
    )  # what comes out is a checkpoint
    assert again.code == 0, again.err


def test_without_val_a_part_is_held_back_and_a_preset_keeps_its_rates(trained, photos, dino) -> None:
    run, _ = trained
    line = ("eval", "finetune", run, photos, "--preset", "finetune-cifar100", "--optim.batch-size", "12")
    ran = dino(*line, "--views.size", "32", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    given = ran.json["run"]
    assert given["val"] is None
    assert (given["optim"]["epochs"], given["optim"]["lr"], given["views"]["repeats"]) == (1000, 2.5e-6, 3)
    assert given["backbone"]["width"] == 48
    assert "held back" in ran.err
    assert not Path("runs").exists()


def test_a_stopped_one_goes_on_as_any_run_does(trained, photos, dino, process, tmp_path) -> None:
    run, _ = trained
    ran = dino("eval", "finetune", run, photos, *QUICK, "--name", "tuned", "--json")
    assert ran.code == 0, ran.err
    described = json.loads(Path("runs/tuned/run.json").read_text())
    described["run"]["optim"]["epochs"] = 3  # as if it had been stopped after two of three
    Path("runs/tuned/run.json").write_text(json.dumps(described))
    ran = dino("eval", "finetune", "--resume", "runs/tuned", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["finished"]
    assert ran.json["step"] == 9
    assert dino("train", "--resume", "runs/tuned").code == 2  # finished


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Expected dino eval finetune CHECKPOINT TRAIN"),
        (("RUN",), "Which pictures"),
        (("RUN", "PHOTOS", "--network", "vit_tiny/16"), "--network chooses a network to train from scratch"),
        (("nowhere", "PHOTOS"), "Nothing to load at 'nowhere'"),
        (("RUN", "PHOTOS", "--preset", "finetune-cifar"), "finetune-cifar10"),
        (("RUN", "FLAT"), "a folder of its own"),
    ],
)
def test_what_is_wrong_is_said(trained, photos, dino, words, said, tmp_path) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"flat/{number}.png")
    places = {"RUN": trained[0], "PHOTOS": photos, "FLAT": tmp_path / "flat"}
    ran = dino("eval", "finetune", *(places.get(word, word) for word in words))
    assert ran.code == 2
    assert said in ran.err


def test_help_lists_it_and_its_flags(dino) -> None:
    assert "finetune" in dino("eval", "--help").out
    out = dino("eval", "finetune", "--help").out
    for words in ("CHECKPOINT TRAIN VAL", "--method.mixup", "--optim.layer-decay", "--views.magnitude", "examples:"):
        assert words in out


def test_the_networks_drop_path_and_the_views_size_are_the_runs(trained) -> None:
    from dino_ssl.presets import resolve

    found = open_checkpoint(trained[0])
    run = starting_from(resolve("finetune"), found, size=found.size)
    assert run.views.size == 32
    assert run.backbone.drop_path == 0.1
    assert starting_from(resolve("finetune"), found).views.size == 224
    line = dict(kind=TrainOptions, prog="dino train", examples=EXAMPLES)
    assert CommandLine(["a", "scenes"], **line).drawn() == "scenes"
    assert CommandLine(["a", "scenes"], **line, drawn=None).drawn() is None
