"""Options of `dino train` and of `dino_ssl.train`: short names, initial weights, validation set, device."""

import json
from pathlib import Path

import pytest
import torch

import dino_ssl
from dino_ssl import runtime
from dino_ssl.api.training import PreparedRun
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.train import TrainOptions
from dino_ssl.config import edit
from dino_ssl.data.folder import Folder
from dino_ssl.errors import UserError
from dino_ssl.run import Run
from dino_ssl.training_evals import split_dataset


@pytest.fixture
def plan(photos, tmp_path, monkeypatch):
    """Return the Run that `dino_ssl.train` would train."""
    monkeypatch.setattr(PreparedRun, "train", lambda self, terminal: self.run)
    return lambda **options: dino_ssl.train(photos, out=tmp_path / "run", quiet=True, **options)


def parsed(*words: str) -> Run:
    return CommandLine(["photos", *words], kind=TrainOptions, prog="dino train", examples="").options().run


# -- short names ----------------------------------------------------------------------------------------------


def test_short_flags_are_the_long_ones():
    long = parsed("--optim.epochs", "3", "--optim.batch-size", "8", "--optim.lr=1e-3")
    assert parsed("--epochs=3", "--batch_size", "8", "--lr", "1e-3") == long
    assert (long.optim.epochs, long.optim.batch_size, long.optim.lr) == (3, 8, 1e-3)


@pytest.mark.parametrize("flag", ["--epoch", "--epcohs", "--batchsize"])
def test_a_misspelled_short_flag_is_refused_with_the_right_one(dino, photos, flag):
    output = dino("train", photos, flag, "4")
    right = "--batch-size" if "size" in flag else "--epochs"
    assert (output.code, output.err) == (2, f"dino: Unknown flag {flag}; did you mean {right}?\n")


def test_a_setting_in_both_forms_is_refused(dino, photos, plan):
    output = dino("train", photos, "--lr", "1", "--optim.lr=1")
    assert (output.code, output.err) == (2, "dino: --lr and --optim.lr are the same setting: give only one of them.\n")
    for optim in ({"lr": 1.0}, dino_ssl.Run().optim):
        with pytest.raises(UserError, match=r"`lr` and `optim` both set `optim.lr`"):
            plan(lr=1.0, optim=optim)


def test_short_names_and_val_in_python(plan, photos):
    run = plan(epochs=3, batch_size=4, lr=1e-3, optim={"clip_grad": 1.0}, val=str(photos))
    assert (run.optim.epochs, run.optim.batch_size, run.optim.lr, run.optim.clip_grad) == (3, 4, 1e-3, 1.0)
    assert run.val == Folder(path=str(photos))
    with pytest.raises(UserError, match="`val`: expected a folder of class folders, got a list"):
        plan(val=[torch.zeros(1)])


# -- initial weights ------------------------------------------------------------------------------------------


def test_initial_weights_bring_their_network(trained, dino, photos, plan):
    (folder, _), tiny = trained, ("--epochs", "1", "--batch-size", "8")
    result = dino("train", photos, "--init", folder, *tiny, "--backbone.drop-path", "0.2", "--dry-run", "--json").json
    run, rows = result["run"], {row["name"]: row for row in result["plan"]}
    assert rows["network"]["reason"] == "that of the initial weights"
    assert rows["init"]["value"] == str(folder)
    assert not [name for name in rows if name.startswith("backbone.")]
    assert (run["backbone"]["width"], run["backbone"]["drop_path"], run["init"]) == (48, 0.2, str(folder))
    assert plan(init=str(folder), backbone={"drop_path": 0.2}).backbone == parsed(
        "--init", str(folder), "--backbone.drop-path", "0.2"
    ).backbone  # fmt: skip
    shape = ("--backbone.width", "48", "--backbone.depth", "2", "--backbone.heads", "2")
    named = dino("train", photos, "--init", folder, "--network", "vit_tiny/8", *shape, *tiny, "--dry-run", "--json")
    assert named.json["run"]["backbone"]["image_size"] == 32  # that of the position embeddings


def test_initial_weights_of_another_network_are_refused_before_data_is_read(trained, dino, plan, tmp_path):
    folder, _ = trained
    (tmp_path / "empty").mkdir()
    output = dino("train", "empty", "--init", folder, "--network", "vit_tiny/16", "--dry-run")
    assert output.code == 2
    for part in (f"--init {folder} are those of ViT-tiny/8", "run is ViT-tiny/16: cls_token: expected [1, 1, 192]"):
        assert part in output.err
    with pytest.raises(UserError, match="run is ViT-small/16"):
        plan(init=str(folder), backbone=dino_ssl.ViT())


# -- device ---------------------------------------------------------------------------------------------------


def test_device_is_chosen_by_name(monkeypatch, dino, photos, trained):
    assert runtime.machine("cpu").device == torch.device("cpu")
    output = dino("embed", trained[0], photos, "--device", "cuda")
    assert (output.code, "--device cuda is not available: torch finds cpu" in output.err) == (2, True)
    with pytest.raises(UserError, match="`device` gpu is not available"):
        dino_ssl.train(photos, device="gpu", out="run")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = (None, "cpu", "cuda", "cuda:1")
    assert [str(runtime._choose_device(name)) for name in names] == ["cuda:0", "cpu", "cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="cuda:2 is not available: torch finds cpu, cuda:0, cuda:1"):
        runtime._choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [str(runtime._choose_device(name)) for name in ("cuda", "cpu", "cuda:1")] == ["cuda:1", "cpu", "cuda:1"]
    with pytest.raises(UserError, match="one GPU for 2 processes"):
        runtime._choose_device("cuda:0")


# -- an existing run ------------------------------------------------------------------------------------------


def test_run_json_without_its_data_is_refused(trained, dino, tmp_path):
    content = json.loads((trained[0] / "run.json").read_text())
    del content["data"]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.pt").symlink_to(Path(trained[0]).resolve() / "checkpoints/last.pt")
    (tmp_path / "run/run.json").write_text(json.dumps(content))
    output = dino("train", "--resume", "run")
    assert (output.code, "run/run.json lacks data.trained_on" in output.err) == (2, True)


def test_the_training_images_are_no_validation_set(photos):
    star = photos / "star"  # without class folders
    for train, val in ((photos, photos), (star, star), (photos, star), (star, photos)):
        run = edit(dino_ssl.Run(data=Folder(path=str(train))), val=Folder(path=str(val)))
        with pytest.raises(UserError, match=f"The validation set {val} has images of the training set"):
            split_dataset(run, run.data.open())
    other = next(path for path in photos.iterdir() if path.is_dir() and path != star)
    run = edit(dino_ssl.Run(data=Folder(path=str(star))), val=Folder(path=str(other)))
    _, val_set = split_dataset(run, run.data.open())
    assert val_set is not None
