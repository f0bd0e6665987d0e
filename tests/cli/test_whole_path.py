"""From a folder of pictures to features, as a person goes: train, look, evaluate, attend, embed."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import dino_ssl as package
from dino_ssl.data.folder import Folder
from dino_ssl.data.transforms.eval import eval_transform, normalize
from dino_ssl.evals.knn import KNN
from dino_ssl.metrics import read_metrics


def test_train_writes_all_that_it_promises(trained):
    run, ran = trained
    result = ran.json
    assert result["finished"]
    assert result["step"] == result["steps"] == 2 * (36 // 8)  # 40 pictures, a tenth of each class held back
    files = "run.json plan.json metrics.jsonl skipped.jsonl backbone.safetensors report.html"
    more = "checkpoints/last.pt checkpoints/best.pt snapshots/neighbours.json"
    for name in f"{files} {more}".split():
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    page = (run / "report.html").read_text()
    assert "not a picture.jpg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_what_was_set_holds_and_the_plan_says_so(trained):
    run, ran = trained
    written = json.loads((run / "run.json").read_text())["run"]
    assert (written["backbone"]["width"], written["backbone"]["depth"]) == (48, 2)
    assert (written["method"]["out_dim"], written["optim"]["batch_size"]) == (32, 8)
    assert written["backbone"]["image_size"] == 32  # follows the crops that were set
    assert written["optim"]["warmup_epochs"] <= 0.2  # fits into two epochs
    plan = {row["name"]: row for row in json.loads((run / "plan.json").read_text())["plan"]}
    assert plan["K"]["value"] == "32"
    assert plan["K"]["why"].startswith("you set it")
    assert "you set it" not in plan["teacher"]["why"]
    assert "expected time" in plan
    assert "The plan" in ran.err


def test_messages_name_what_was_left_out(trained):
    run, ran = trained
    assert "star/empty.png: empty file" in ran.err
    names = {json.loads(line)["name"] for line in (run / "skipped.jsonl").read_text().splitlines()}
    assert names == {"star/empty.png", "star/not a picture.jpg"}


def test_quality_is_measured_beside_its_floors(trained):
    _, ran = trained
    result = ran.json
    assert set(result["reference_scores"]) == {"raw_pixels", "random_weights"}
    assert 0 <= result["quality"]["20-NN"] <= result["best"]["value"] <= 100


def test_eval_says_value_protocol_data_and_checkpoint(trained, photos, dino):
    run, _ = trained
    ran = dino("eval", "knn", run, photos, "--k", "1", "5", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert set(result["references"]) == {"raw_pixels", "random_weights"}
    assert result["checkpoint"]["size"] == 32
    assert result["data"]["val"]["images"] == 8
    assert json.loads(Path(result["file"]).read_text()) == {k: v for k, v in result.items() if k != "file"}
    assert result["file"].startswith(str(run))
    # the file in the run and the run are the same checkpoint, and one evaluation gives one value
    again = dino("eval", "knn", run / "backbone.safetensors", photos, "--k", "1", "5", "--json", "--no-references").json
    assert again["checkpoint"]["hash"] == result["checkpoint"]["hash"]
    assert again["values"] == result["values"]
    assert package.evaluate(run, KNN(k=(1, 5)), photos, references=False)["values"] == result["values"]


def test_pictures_that_vote_for_themselves_are_right_and_that_is_no_evaluation(trained, photos, dino, tmp_path):
    run, _ = trained
    words = ("eval", "knn", run, photos, "--k", "1", "--no-references", "--json")
    shutil.copytree(photos, tmp_path / "again", copy_function=shutil.copyfile)  # files of a later time
    assert dino(*words[:4], tmp_path / "again", *words[4:]).json["values"]["1-NN"] == 100
    refused = dino(*words[:4], photos, *words[4:])
    assert refused.code == 2
    assert "each image would match itself" in refused.err


def test_eval_prints_a_table(trained, photos, dino):
    run, _ = trained
    ran = dino("eval", "knn", run, photos, "--k", "5")
    assert "raw pixels" in ran.out
    assert "random weights" in ran.out
    assert "5-NN" in ran.out


@pytest.mark.parametrize("ending", ["parquet", "npz", "csv"])
def test_embed_gives_the_backbones_features(trained, photos, dino, tmp_path, ending):
    run, _ = trained
    ran = dino("embed", run, photos, "-o", f"deep/features.{ending}", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["images"] == 40
    assert {item["name"] for item in ran.json["skipped"]} == {"star/empty.png", "star/not a picture.jpg"}
    path = tmp_path / f"deep/features.{ending}"
    assert [child.name for child in path.parent.iterdir()] == [path.name]  # nothing is left beside it
    if ending == "parquet":
        table = pyarrow.parquet.read_table(path).to_pydict()
        names, labels, features = table["name"], table["label"], np.array(table["feature"])
    elif ending == "npz":
        with np.load(path) as table:
            names, labels, features = table["name"].tolist(), table["label"].tolist(), table["feature"]
    else:
        rows = list(csv.reader(path.read_text().splitlines()))[1:]
        names, labels = [row[0] for row in rows], [row[1] for row in rows]
        features = np.array([row[2:] for row in rows], dtype=np.float32)
    assert labels == [name.split("/")[0] for name in names]
    dataset = Folder(path=str(photos)).open()
    place = dataset.names.index(names[7])
    image = torch.from_numpy(eval_transform(dataset.read(place), 32))[None].movedim(-1, 1)
    with torch.no_grad():
        expected = package.load(run)(normalize(image))[0].numpy()
    np.testing.assert_allclose(features[7], expected, atol=1e-5)


def test_attention_draws_every_head_the_mean_and_the_mask(trained, photos, dino, tmp_path):
    run, _ = trained
    picture = sorted((photos / "star").glob("train*"))[0]
    ran = dino("attention", run, picture, "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    (drawn,) = ran.json["images"]
    assert (drawn["heads"], drawn["grid"], drawn["layer"]) == (2, [8, 8], 1)
    names = {path.name for path in (tmp_path / "maps" / picture.stem).iterdir()}
    assert names == {"image.png", "mean.png", "overlay.png", "mask-60.png", "heads.png", "head-0.png", "head-1.png"}
    point = dino("attention", run, picture, "--point", "5", "30", "--layer", "0", "-o", "point", "--json")
    assert point.json["images"][0]["layer"] == 0
    one, other = (np.asarray(Image.open(tmp_path / name / picture.stem / "mean.png")) for name in ("maps", "point"))
    assert one.shape == other.shape == (384, 384, 3)  # large enough to look at
    assert (one != other).any()


def test_attention_of_a_point_outside_says_where_inside_is(trained, photos, dino):
    run, _ = trained
    picture = sorted((photos / "star").glob("train*"))[0]
    ran = dino("attention", run, picture, "--point", "500", "3")
    assert ran.code == 2
    assert "0 .. 39" in ran.err


def test_report_can_be_written_again(trained, dino):
    run, _ = trained
    (run / "report.html").unlink()
    ran = dino("report", run, "--json")
    assert ran.json["report"] == str(run / "report.html")
    assert (run / "report.html").is_file()


def test_show_tells_the_run_as_flags_that_train_takes(trained, photos, dino):
    run, _ = trained
    ran = dino("show", run)
    flags = dict(
        line.split(None, 1) for line in ran.out.splitlines() if line.startswith("--") and len(line.split()) > 1
    )
    assert flags["--backbone.width"].strip() == "48"
    assert flags["--views.blur"].strip() == "1 0.1 0.5"
    assert dino("show", run, "--json").json["backbone"]["width"] == 48


def test_python_calls_do_the_same(photos, tmp_path, capsys):
    run = package.train(
        photos,
        preset=package.Run(
            backbone=package.ViT(width=48, depth=1, heads=1, patch=8, image_size=32),
            precision="float32",
        ),
        out=tmp_path / "run",
        quiet=True,
        workers=0,
        method=dict(out_dim=32, head_hidden=32),
        views=dict(global_size=32, local=0),
        optim=dict(epochs=1, batch_size=18, warmup_epochs=0),
    )
    assert run.finished
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [2]
    assert capsys.readouterr().out == ""
    embedding = package.embed(run.folder, photos)
    assert embedding.features.shape == (40, 48)
    with pytest.raises(package.UserError, match="resume=True"):
        package.train(photos, out=tmp_path / "run")
