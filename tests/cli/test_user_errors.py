"""Errors that a user can fix: one message with a remedy, exit code 2, no traceback."""

import json

import pytest
import torch

from dino_ssl.errors import UserError


def assert_refused(output, *parts):
    assert output.code == 2
    assert output.out == ""
    assert "Traceback" not in output.err
    for part in parts:
        assert part in output.err, output.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["'trian'", "did you mean 'train'"]),
        (["eval", "kn", "x", "y"], ["did you mean 'knn'"]),
        (["eval", "finetun", "x", "y"], ["did you mean 'finetune'"]),
        (["train"], ["No dataset given", "dino train photos/"]),
        (["train", "nowhere"], ["There is no file or folder nowhere"]),
        (["train", "empty"], ["There are no images in empty"]),
        (["train", "bad"], ["one.jpg"]),
        (["train", "bad/one.jpg"], ["Expected a folder", "the file bad/one.jpg", "Did you mean its folder, bad/?"]),
        (["train", "PHOTOS", "--preset", "vits61"], ["did you mean", "'vits16'"]),
        (["train", "PHOTOS", "--network", "vit_smal/16"], ["did you mean", "'vit_small/16'", "timm:NAME"]),
        (["train", "PHOTOS", "--method", "simclr"], ["'simclr'", "byol"]),
        (["train", "PHOTOS", "--optim.epoch", "3"], ["--optim.epochs"]),
        (["train", "PHOTOS", "--optim.epochs", "0"], ["--epochs must be at least 1; got 0"]),
        (["train", "PHOTOS", "--minutes", "-3"], ["--minutes must be above 0; got -3"]),
        (["train", "PHOTOS", "--log-every", "0"], ["--log-every must be at least 1; got 0"]),
        (["train", "PHOTOS", "--workers", "-1"], ["--workers must be at least 0; got -1"]),
        (
            ["train", "PHOTOS", "--online_eval.val-fraction", "1.5"],
            ["--online-eval.val-fraction must be above 0 and below 1; got 1.5"],
        ),
        (["train", "PHOTOS", "--out", "file"], ["file", "--out"]),
        (["train", "PHOTOS", "--out", "file/deeper"], ["file", "another path"]),
        (["train", "--resume", "nothing"], ["Nothing to resume in nothing"]),
        (["train", "--resume", "RUN", "--out", "elsewhere"], ["--out is for a new run"]),
        (["train", "--resume", "RUN", "--minutes", "3"], ["--minutes is for a new run"]),
        (["train", "--resume", "RUN"], ["is finished", "--out"]),
        (["embed", "RUN", "PHOTOS", "--size", "0"], ["--size must be at least 1; got 0"]),
        (["embed", "RUN", "PHOTOS", "--batch-size", "0"], ["--batch-size must be at least 1"]),
        (["embed", "RUN", "PHOTOS", "-o", "file/features.npz"], ["file", "another path"]),
        (["tsne", "RUN", "PHOTOS", "-o", "file/map.png"], ["file", "another path"]),
        (["embed", "RUN", "PHOTOS", "-o", "features.txt"], [".parquet", "features.txt"]),
        (["embed", "dino_vits17", "PHOTOS"], ["dino_vits17", "did you mean", "dino_vits16"]),
        (["embed", "empty", "PHOTOS"], ["empty", "last.pt"]),
        (["eval", "knn", "RUN", "PHOTOS/star"], ["labels", "photos/cat/1.jpg"]),
        (["attention", "RUN", "missing.jpg"], ["missing.jpg"]),
        (["attention", "RUN", "PHOTOS/star/empty.png"], ["empty file"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].islower() else "",
)
def test_message_names_what_is_wrong_and_what_to_do(dino, photos, trained, tmp_path, arguments, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/one.jpg").write_text("no image")
    (tmp_path / "file").touch()
    paths = {"PHOTOS": str(photos), "RUN": str(trained[0])}
    for name, path in paths.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert_refused(dino(*arguments), *parts)


@pytest.mark.usefixtures("tiny_preset")
def test_batch_larger_than_the_dataset_is_refused(dino, photos):
    output = dino("train", photos, "--preset", "tiny_recipe:run", "--optim.batch-size", "37", "--json")
    assert_refused(output, "37", "36", "dino: --batch-size")


def test_dry_run_refuses_what_training_would(dino, photos, tiny, tmp_path):
    for flags, message in (
        (("--optim.batch-size", "64"), "--batch-size 64 with 36 images"),
        (("--evals", "knn nowhere"), '--evals "knn nowhere" is not possible'),
        (("--val", "nowhere"), "There is no file or folder nowhere"),
        (("--method.head-norm", "batch", "--optim.micro-batch", "2"), "batch norm"),
    ):
        output = dino("train", photos, *tiny, *flags, "--optim.epochs", "1", "--dry-run")
        assert output.code == 2, flags
        assert message in output.err
    assert list(tmp_path.iterdir()) == []


class Harmful:
    def __reduce__(self):
        return open, ("harmed", "w")


@pytest.mark.parametrize("name", ["cut.safetensors", "garbage.pth", "code.pt"])
def test_damaged_or_malicious_checkpoint_is_refused(dino, photos, trained, tmp_path, name):
    path = tmp_path / name
    if name.startswith("cut"):
        path.write_bytes((trained[0] / "backbone.safetensors").read_bytes()[:5000])
    elif name.startswith("garbage"):
        path.write_bytes(b"garbage" * 100)
    else:
        torch.save({"weights": Harmful()}, path)
    assert_refused(dino("embed", path, photos), name)
    assert not (tmp_path / "harmed").exists()


def test_finished_run_is_not_overwritten(dino, photos, trained):
    before = (trained[0] / "run.json").read_bytes()
    assert_refused(dino("train", photos, "--out", trained[0]), "has a run already", f"--resume {trained[0]}", "run-2")
    assert_refused(dino("train", photos, "--out", trained[0], "-y"), "has a finished run", "run-2")
    assert (trained[0] / "run.json").read_bytes() == before


def test_output_is_not_data(dino, photos, trained, tiny):
    assert_refused(dino("train", trained[0], "--out", "run"), "was written by dino")
    for out in (photos, photos / "star"):
        refused = dino("train", photos, *tiny, "--out", out, "--dry-run")
        assert (refused.code, f"{out} has images of the dataset" in refused.err) == (2, True)


def test_unknown_field_in_run_json_is_refused(dino, trained, tmp_path):
    content = json.loads((trained[0] / "run.json").read_text())
    content["run"]["optim"]["bathc_size"] = 8
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(content))
    assert_refused(dino("show", "run"), "bathc_size", "'batch_size'")


def test_dino_debug_raises_the_error(dino, monkeypatch):
    monkeypatch.setenv("DINO_DEBUG", "1")
    with pytest.raises(UserError):
        dino("train", "nowhere")
