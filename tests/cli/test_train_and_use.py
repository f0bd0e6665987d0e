"""From a folder of images to features: train, report, evaluate, attention maps, embed."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.numpy import save_file

import dino_ssl
from dino_ssl import checkpoint, html
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.evals.knn import KNN
from dino_ssl.metrics import read_metrics
from dino_ssl.preprocessing import Preprocessing, normalize


def test_training_writes_all_files_of_a_run(trained):
    run, output = trained
    assert output.json["finished"]
    assert output.json["step"] == output.json["steps"] == 2 * (36 // 8)  # 40 images, a tenth of each class held out
    names = """run.json plan.json metrics.jsonl skipped.jsonl backbone.safetensors report.html backbone-best.safetensors
        checkpoints/last.pt checkpoints/best.pt snapshots/neighbors.json"""
    for name in names.split():
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    page = (run / "report.html").read_text()
    assert "not an image.jpg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_every_data_file_of_a_run_has_a_format_version(trained, photos, dino):
    run, _ = trained
    assert dino("eval", "knn", run, photos).code == 0
    versions = {}
    for path in filter(Path.is_file, run.rglob("*")):
        match path.suffix:
            case ".json" | ".jsonl":
                texts = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
                versions[path] = [json.loads(text).get("format") for text in texts]
            case ".safetensors":
                with safetensors.safe_open(path, framework="np") as file:
                    metadata = file.metadata()
                described = json.loads(metadata.get("backbone", "{}"))
                versions[path] = [described.get("format") or int(metadata["format_version"])]
            case ".pt":
                versions[path] = [checkpoint.load(path)["format"]]
    assert {path.suffix for path in versions} == {".json", ".jsonl", ".safetensors", ".pt"}
    assert all(set(found) <= {1} for found in versions.values()), versions


def test_another_format_version_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"format": 2, "step": 1}\n')
    with pytest.raises(dino_ssl.UserError, match="has format 2; this version of dino reads format 1"):
        read_metrics(tmp_path)
    metadata = {"backbone": '{"format": 2, "type": "ViT"}'}
    save_file({"x": np.zeros(1)}, tmp_path / "backbone.safetensors", metadata)
    with pytest.raises(dino_ssl.UserError, match="has format 2; this version of dino reads format 1"):
        dino_ssl.load(tmp_path)


def test_settings_of_the_user_are_trained_and_marked_in_the_plan(trained):
    run, output = trained
    saved = json.loads((run / "run.json").read_text())["run"]
    assert (saved["backbone"]["width"], saved["backbone"]["depth"]) == (48, 2)
    assert (saved["method"]["out_dim"], saved["optim"]["batch_size"]) == (32, 8)
    assert saved["backbone"]["image_size"] == 32  # follows the size of the views
    assert saved["optim"]["warmup_epochs"] <= 0.2  # fits into two epochs
    plan = {row["name"]: row for row in json.loads((run / "plan.json").read_text())["plan"]}
    assert plan["K"]["value"] == "32"
    assert plan["K"]["reason"].startswith("set by you")
    assert "set by you" not in plan["teacher"]["reason"]
    assert "expected time" in plan
    assert "The plan" in output.err


def test_skipped_files_are_printed_and_listed(trained):
    run, output = trained
    assert "star/empty.png: empty file" in output.err
    names = {json.loads(line)["name"] for line in (run / "skipped.jsonl").read_text().splitlines()}
    assert names == {"star/empty.png", "star/not an image.jpg"}


def test_accuracy_is_reported_with_its_reference_scores(trained):
    run, output = trained
    result = output.json
    last, best = result["quality"]["20-NN"], result["best"]
    assert set(result["reference_scores"]) == {"raw_pixels", "random_weights"}
    assert 0 <= last <= best["value"] <= 100
    sentence = result["verdict"]["sentence"]
    assert "for 4 validation images)" in sentence
    summary = output.err[output.err.index(sentence.partition("`")[0]) :].splitlines()  # fields are written as flags
    assert summary[1] == (
        f"20-NN at 32 px: last {last:.1f} %, best {best['value']:.1f} % in epoch {best['epoch']:.0f} "
        "(selected on the validation set)"
    )
    assert [line.split()[0] for line in summary[2:]] == ["Report", "Last", "Best"]
    assert "Reference scores (20-NN at 32 px): raw pixels" in output.err
    page = (run / "report.html").read_text()
    assert f'<p class="verdict {result["verdict"]["kind"]}">{html.message(sentence)}</p>' in page


def test_classes_of_one_image_train_without_an_accuracy(dino, tmp_path, tiny):
    Scenes(count=8, size=40, classes=8).write(tmp_path / "each")
    output = dino("train", "each", *tiny, "--optim.epochs", "1", "--out", "run", "--json")
    assert output.code == 0, output.err
    plan = {row["name"]: row for row in json.loads((tmp_path / "run/plan.json").read_text())["plan"]}
    assert "accuracy cannot be measured" in plan["quality"]["reason"]
    assert output.json["quality"] == {}


def test_result_of_an_evaluation_has_scores_protocol_data_and_checkpoint(trained, photos, dino):
    run, _ = trained
    output = dino("eval", "knn", run, photos, "--k", "1", "5", "--json")
    assert output.code == 0, output.err
    result = output.json
    assert set(result["references"]) == {"raw_pixels", "random_weights"}
    assert result["checkpoint"]["size"] == 32
    assert (result["size"], result["data"]["val"]["images"]) == (32, 4)
    assert json.loads(Path(result["file"]).read_text()) == {k: v for k, v in result.items() if k != "file"}
    assert result["file"].startswith(str(run))
    # The run and its exported backbone are the same checkpoint, and one evaluation gives one value.
    again = dino("eval", "knn", run / "backbone.safetensors", photos, "--k", "1", "5", "--json", "--no-references").json
    assert again["checkpoint"]["hash"] == result["checkpoint"]["hash"]
    assert again["values"] == result["values"]
    assert dino_ssl.evaluate(run, KNN(k=(1, 5)), photos, references=False)["values"] == result["values"]


def test_validation_set_equal_to_the_training_set_is_refused(trained, photos, dino, tmp_path):
    line = ("eval", "knn", trained[0], photos)
    options = ("--k", "1", "--no-references", "--json")
    shutil.copytree(photos, tmp_path / "again", copy_function=shutil.copyfile)  # with other modification times
    assert dino(*line, tmp_path / "again", *options).json["values"]["1-NN"] == 100
    output = dino(*line, photos, *options)
    assert output.code == 2
    assert "has images of the training set" in output.err


def test_evaluation_prints_a_table(trained, photos, dino):
    output = dino("eval", "knn", trained[0], photos, "--k", "5")
    for part in ("raw pixels", "random weights", "5-NN"):
        assert part in output.out


def test_embedding_images_of_which_none_can_be_read_is_an_error(trained, photos, dino, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    Image.open(next(photos.glob("star/train*.png"))).save(folder / "a.jpg")
    data = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(data[:-100] + b"\xff\xd9")  # the header is complete
    output = dino("embed", trained[0], folder, "-o", "features.parquet")
    assert output.code == 2
    assert "None of the 1 images can be read. a.jpg: Corrupt JPEG data" in output.err
    assert not Path("features.parquet").exists()


@pytest.mark.parametrize("suffix", ["parquet", "npz", "csv"])
def test_embed_writes_the_features_of_the_backbone(trained, photos, dino, tmp_path, suffix):
    run, _ = trained
    output = dino("embed", run, photos, "-o", f"deep/features.{suffix}", "--precision", "float32", "--json")
    assert output.code == 0, output.err
    assert output.json["images"] == 40
    assert {item["name"] for item in output.json["skipped"]} == {"star/empty.png", "star/not an image.jpg"}
    path = tmp_path / f"deep/features.{suffix}"
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    if suffix == "parquet":
        table = pyarrow.parquet.read_table(path).to_pydict()
        names, labels, features = table["name"], table["label"], np.array(table["feature"])
    elif suffix == "npz":
        with np.load(path) as table:
            names, labels, features = table["name"].tolist(), table["label"].tolist(), table["feature"]
    else:
        rows = list(csv.reader(path.read_text().splitlines()))[1:]
        names, labels = [row[0] for row in rows], [row[1] for row in rows]
        features = np.array([row[2:] for row in rows], dtype=np.float32)
    assert labels == [name.split("/")[0] for name in names]
    dataset = Folder(path=str(photos)).open()
    pixels = dataset.read(dataset.names.index(names[7]))
    image = torch.from_numpy(Preprocessing(size=32).center_crop(pixels))[None].movedim(-1, 1)
    with torch.no_grad():
        expected = dino_ssl.load(run)(normalize(image))[0].numpy()
    np.testing.assert_allclose(features[7], expected, atol=1e-5)


def test_attention_writes_the_map_of_every_head_the_mean_and_the_mask(trained, photos, dino, tmp_path):
    run, _ = trained
    image = sorted((photos / "star").glob("train*"))[0]
    output = dino("attention", run, image, "--json", "-o", "maps")
    assert output.code == 0, output.err
    (maps,) = output.json["images"]
    assert (maps["grid"], maps["layer"]) == ([8, 8], 1)
    names = {path.name for path in (tmp_path / "maps" / image.stem).iterdir()}
    assert names == {"image.png", "mean.png", "overlay.png", "mask-60.png", "heads.png", "head-0.png", "head-1.png"}
    point = dino("attention", run, image, "--point", "5", "30", "--layer", "0", "-o", "point", "--json")
    assert point.json["images"][0]["layer"] == 0
    means = [np.asarray(Image.open(tmp_path / name / image.stem / "mean.png")) for name in ("maps", "point")]
    assert means[0].shape == means[1].shape == (384, 384, 3)
    assert (means[0] != means[1]).any()


def test_attention_of_a_point_outside_the_image_is_refused(trained, photos, dino):
    image = sorted((photos / "star").glob("train*"))[0]
    output = dino("attention", trained[0], image, "--point", "500", "3")
    assert output.code == 2
    assert "40 x 40 pixels" in output.err


def test_report_can_be_written_again(trained, dino):
    run, _ = trained
    (run / "report.html").unlink()
    output = dino("report", run, "--json")
    assert output.json["report"] == str(run / "report.html")
    assert (run / "report.html").is_file()


def test_show_prints_a_run_as_flags_of_train(trained, dino):
    run, _ = trained
    output = dino("show", run)
    flags = dict(
        line.split(None, 1) for line in output.out.splitlines() if line.startswith("--") and len(line.split()) > 1
    )
    assert flags["--backbone.width"].strip() == "48"
    assert flags["--views.blur"].strip() == "1 0.1 0.5"
    assert dino("show", run, "--json").json["backbone"]["width"] == 48


def test_python_calls_train_and_embed_silently(photos, tmp_path, capsys):
    outcome = dino_ssl.train(
        photos,
        preset=dino_ssl.Run(
            backbone=dino_ssl.ViT(width=48, depth=1, heads=1, patch=8, image_size=32),
            precision="float32",
        ),
        out=tmp_path / "run",
        quiet=True,
        workers=0,
        method=dict(out_dim=32, head_hidden=32),
        views=dict(global_size=32, local=0),
        optim=dict(epochs=1, batch_size=18, warmup_epochs=0),
    )
    assert outcome.finished
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [2]
    assert capsys.readouterr().out == ""
    assert dino_ssl.embed(outcome.folder, photos).features.shape == (40, 48)
    with pytest.raises(dino_ssl.UserError, match="resume=True"):
        dino_ssl.train(photos, out=tmp_path / "run")


@pytest.mark.parametrize("name", ["", "moved.safetensors", "checkpoints/best.pt"])
def test_a_path_and_the_loaded_backbone_give_the_same_results(trained, photos, tmp_path, name):
    source = trained[0] / name
    if name == "moved.safetensors":  # without its run.json
        source = shutil.copy(trained[0] / "backbone.safetensors", tmp_path / name)
    backbone = dino_ssl.load(source)
    assert backbone.transform == Preprocessing(size=32)
    features = [dino_ssl.embed(network, photos).features for network in (source, backbone)]
    np.testing.assert_array_equal(*features)
    maps = [dino_ssl.attention(network, Scenes(size=40).read(0)) for network in (source, backbone)]
    np.testing.assert_array_equal(*(each.heads for each in maps))
    results = [dino_ssl.evaluate(network, KNN(k=(5,)), photos, cache=False) for network in (source, backbone)]
    for result in results:
        result["checkpoint"] = result["checkpoint"]["hash"]
    assert results[0] == results[1]
    assert set(results[0]["references"]) == {"raw_pixels", "random_weights"}
