"""dino eval finetune: supervised fine-tuning of a checkpoint, from the command line to the files of the run."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dino_ssl.api.resolve import starting_from
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.loading import open_checkpoint
from dino_ssl.presets import resolve
from dino_ssl.run import read_run

OPTIONS = """
    --optim.epochs 2 --optim.batch-size 12 --workers 0 --precision float32 --views.size 32
""".split()  # noqa: SIM905 - as typed


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val") / "other photos"
    Scenes(count=12, size=40, classes=4, part="val").write(folder)
    return folder


def test_finetuning_trains_the_network_of_the_checkpoint_and_measures_the_classifier(trained, photos, val, dino):
    run, _ = trained
    output = dino("eval", "finetune", run, photos, val, *OPTIONS, "--out", "tuned", "--json")
    assert output.code == 0, output.err
    result = output.json
    assert result["finished"]
    assert result["steps"] == 2 * (40 // 12)  # nothing is held out: there is a validation set
    assert {"top-1", "top-5"} <= result["quality"].keys()
    assert result["reference_scores"]["majority_class"]["top-1"] == pytest.approx(25)
    tuned = read_run(Path("tuned"))
    assert tuned.init == str(run)
    assert (tuned.backbone.width, tuned.backbone.drop_path) == (48, 0.1)  # the checkpoint's, and the preset's
    assert tuned.method.classifies
    page = Path("tuned/report.html").read_text()
    for part in ("trained by Supervised", "top-1", "majority class"):
        assert part in page
    assert dino("eval", "knn", "tuned", photos, "--k", "1", "--no-references").code == 0  # it is a checkpoint


def test_without_a_validation_set_images_are_held_out_and_a_preset_keeps_its_rates(trained, photos, dino):
    line = ("eval", "finetune", trained[0], photos, "--preset", "finetune-cifar100", "--optim.batch-size", "12")
    output = dino(*line, "--views.size", "32", "--weights", "best", "--dry-run", "--json")
    assert output.code == 0, output.err
    run = output.json["run"]
    assert (run["val"], run["init"]) == (None, str(trained[0] / "backbone-best.safetensors"))
    assert (run["optim"]["epochs"], run["optim"]["lr"], run["views"]["repeats"]) == (1000, 2.5e-6, 3)
    assert run["backbone"]["width"] == 48
    assert "held out" in output.err
    assert not Path("runs").exists()


def test_stopped_finetuning_is_resumed(trained, photos, dino):
    output = dino("eval", "finetune", trained[0], photos, *OPTIONS, "--out", "runs/tuned", "--json")
    assert output.code == 0, output.err
    content = json.loads(Path("runs/tuned/run.json").read_text())
    content["run"]["optim"]["epochs"] = 3  # as if it had been stopped after two of three epochs
    Path("runs/tuned/run.json").write_text(json.dumps(content))
    output = dino("eval", "finetune", "--resume", "runs/tuned", "--json")
    assert output.code == 0, output.err
    assert output.json["finished"]
    assert output.json["step"] == 9
    assert dino("train", "--resume", "runs/tuned").code == 2  # finished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Expected dino eval finetune CHECKPOINT TRAIN"),
        (("RUN",), "No dataset given"),
        (("RUN", "PHOTOS", "--network", "vit_tiny/16"), "fine-tuning uses the checkpoint's network"),
        (("RUN", "PHOTOS", "--init", "RUN"), "Fine-tuning starts from CHECKPOINT"),
        (("RUN", "PHOTOS", "--weights", "first"), "Invalid choice"),
        (("nowhere", "PHOTOS"), "There is no file 'nowhere'"),
        (("RUN", "PHOTOS", "--preset", "finetune-cifar"), "finetune-cifar10"),
        (("RUN", "FLAT"), "put the images of each class in a folder"),
    ],
)
def test_message_names_what_is_missing(trained, photos, dino, arguments, message, tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"flat/{number}.png")
    paths = {"RUN": trained[0], "PHOTOS": photos, "FLAT": tmp_path / "flat"}
    output = dino("eval", "finetune", *(paths.get(argument, argument) for argument in arguments))
    assert output.code == 2
    assert message in output.err


def test_help_has_the_flags_of_finetuning(dino):
    assert "finetune" in dino("eval", "--help").out
    text = dino("eval", "finetune", "--help-all").out
    for part in ("CHECKPOINT TRAIN VAL", "--method.mixup", "--optim.layer-decay", "--views.magnitude", "examples:"):
        assert part in text


def test_drop_path_and_size_of_the_views_come_from_the_preset(trained):
    checkpoint = open_checkpoint(trained[0])
    run = starting_from(resolve("finetune"), checkpoint, size=checkpoint.backbone.transform.size)
    assert run.views.size == 32
    assert run.backbone.drop_path == 0.1
    assert starting_from(resolve("finetune"), checkpoint).views.size == 224
