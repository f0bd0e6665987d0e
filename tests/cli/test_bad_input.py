"""What cannot work is said in one message with a way out, exit code 2, and no traceback."""

import json

import pytest
import torch

from dino_ssl.errors import UserError


def refused(ran, *parts):
    assert ran.code == 2
    assert ran.out == ""
    assert "Traceback" not in ran.err
    for part in parts:
        assert part in ran.err, ran.err


def test_unknown_command(dino):
    refused(dino("trian"), "'trian'", "did you mean 'train'")


def test_unknown_evaluation(dino):
    refused(dino("eval", "kn", "x", "y"), "did you mean 'knn'")
    refused(dino("eval", "finetun", "x", "y"), "did you mean 'finetune'")


def test_no_folder(dino):
    refused(dino("train"), "Expected a folder", "dino train photos/")


def test_missing_folder(dino):
    refused(dino("train", "nowhere"), "nowhere")


def test_empty_folder(dino, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(dino("train", "empty"), "empty")


def test_file_instead_of_folder(dino, tmp_path):
    (tmp_path / "file.jpg").touch()
    refused(dino("train", "file.jpg"), "file.jpg", "is a file")


def test_all_files_bad(dino, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/one.jpg").write_text("no picture")
    refused(dino("train", "bad"), "one.jpg")


@pytest.mark.usefixtures("tiny_preset")
def test_batch_larger_than_the_data(dino, photos):
    ran = dino("train", photos, "--preset", "tiny_recipe:run", "--optim.batch-size", "37", "--json")
    refused(ran, "37", "36", "--optim.batch-size")


def test_unknown_preset(dino, photos):
    refused(dino("train", photos, "--preset", "vits61"), "did you mean", "'vits16'")


def test_unknown_network(dino, photos):
    refused(dino("train", photos, "--network", "vit_smal/16"), "did you mean", "'vit_small/16'", "timm:NAME")


def test_unknown_field_names_the_nearest(dino, photos):
    refused(dino("train", photos, "--optim.epoch", "3"), "--optim.epochs")


def test_value_that_a_field_cannot_have(dino, photos):
    refused(dino("train", photos, "--optim.epochs", "0"), "optim.epochs must be at least 1")
    refused(dino("train", photos, "--minutes", "-3"), "--minutes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--log-every", "0"], "log_every must be at least 1; got 0"),
        (["--workers", "-1"], "workers must be at least 0; got -1"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--online_eval.val-fraction", "1.5"], "online_eval.val_fraction must be above 0 and below 1; got 1.5"),
        (["--online_eval.k", "0"], "online_eval.k must be at least 1"),
    ],
)
def test_settings_that_no_run_can_have(dino, photos, words, said):
    refused(dino("train", photos, *words), said)


def test_a_run_goes_on_in_its_own_folder(dino, trained):
    refused(dino("train", "--resume", trained[0], "--out", "elsewhere"), "its own folder", "elsewhere")


def test_features_of_no_size_or_in_no_folder(dino, photos, trained, tmp_path):
    refused(dino("embed", trained[0], photos, "--size", "0"), "size must be at least 1; got 0")
    refused(dino("embed", trained[0], photos, "--batch-size", "0"), "batch_size must be at least 1")
    (tmp_path / "file").touch()
    refused(dino("embed", trained[0], photos, "-o", "file/features.npz"), "file", "--out")


def test_unknown_checkpoint(dino, photos):
    refused(dino("embed", "dino_vits17", photos), "dino_vits17", "did you mean", "dino_vits16")


@pytest.mark.parametrize("name", ["cut.safetensors", "garbage.pth", "code.pt"])
def test_file_that_is_no_checkpoint(dino, photos, trained, tmp_path, name):
    path = tmp_path / name
    if name.startswith("cut"):
        path.write_bytes((trained[0] / "backbone.safetensors").read_bytes()[:5000])
    elif name.startswith("garbage"):
        path.write_bytes(b"garbage" * 100)
    else:
        torch.save({"weights": Harmful()}, path)
    refused(dino("embed", path, photos), name)
    assert not (tmp_path / "harmed").exists()


class Harmful:
    def __reduce__(self):
        return open, ("harmed", "w")


def test_checkpoint_of_a_run_that_saved_nothing(dino, photos, tmp_path):
    (tmp_path / "run").mkdir()
    refused(dino("embed", "run", photos), "run", "last.pt")


def test_out_that_is_a_file(dino, photos, tmp_path):
    (tmp_path / "file").touch()
    refused(dino("train", photos, "--out", "file"), "file", "--out")
    refused(dino("train", photos, "--out", "file/deeper"), "file", "--out")


def test_output_format_that_is_not_known(dino, photos, trained):
    refused(dino("embed", trained[0], photos, "-o", "features.txt"), ".parquet", "features.txt")


def test_evaluation_without_labels(dino, photos, trained):
    refused(dino("eval", "knn", trained[0], photos / "star"), "labels", "photos/cat/1.jpg")


def test_picture_that_is_none(dino, photos, trained):
    refused(dino("attention", trained[0], "missing.jpg"), "missing.jpg")
    refused(dino("attention", trained[0], photos / "star/empty.png"), "empty file")


def test_resume_of_nothing_names_the_runs_there(dino, trained):
    refused(dino("train", "--resume", trained[0].parent / "rum"), "nothing to resume", str(trained[0]))


def test_resume_of_a_finished_run(dino, trained):
    refused(dino("train", "--resume", trained[0]), "is finished", "--out")


def test_finished_run_is_not_written_over(dino, photos, trained):
    before = (trained[0] / "run.json").read_bytes()
    refused(dino("train", photos, "--out", trained[0]), "finished run", "run-2")
    assert (trained[0] / "run.json").read_bytes() == before


def test_run_json_that_was_tampered_with(dino, trained, tmp_path):
    described = json.loads((trained[0] / "run.json").read_text())
    described["run"]["optim"]["bathc_size"] = 8
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(described))
    refused(dino("show", "run"), "bathc_size", "'batch_size'")


def test_debug_shows_where_it_came_from(dino, monkeypatch):
    monkeypatch.setenv("DINO_DEBUG", "1")
    with pytest.raises(UserError):
        dino("train", "nowhere")
