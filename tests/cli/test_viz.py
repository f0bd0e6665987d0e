"""dino attention, tsne and pca: folders, points, videos, and error messages."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dino_ssl
from dino_ssl.data.synthetic.scenes import SMALL_OBJECTS, Scenes
from dino_ssl.models.vit import ViT
from dino_ssl.models.weights import save_backbone


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of an untrained ViT with two blocks and three heads."""
    torch.manual_seed(0)
    config = ViT(size="tiny", patch=8, image_size=32, width=24, depth=2, heads=3)
    return save_backbone(config, config.build().state_dict(), tmp_path_factory.mktemp("net") / "tiny.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with eight images in four class folders, and a broken file."""
    folder = tmp_path_factory.mktemp("images")
    Scenes(count=8, size=40, classes=4).write(folder)
    (folder / "star" / "broken.jpg").write_text("hello")
    return folder


def shape(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_attention_of_a_folder_skips_broken_files(network, images, dino):
    ran = dino("attention", network, images / "star", "--size", "32", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    assert len(ran.json["images"]) == 2
    assert [item["name"] for item in ran.json["skipped"]] == ["broken.jpg"]
    files = ran.json["images"][0]["files"]
    assert [Path(file).name for file in files] == [
        "image.png", "mean.png", "overlay.png", "mask-60.png", "heads.png", "head-0.png", "head-1.png", "head-2.png",
    ]  # fmt: skip
    assert len({file for result in ran.json["images"] for file in result["files"]}) == 16
    assert min(shape(files[1])) >= 384  # maps of a small network are enlarged
    assert shape("maps/all.png")[0] > 1300
    assert "Overview of 2 images: maps/all.png" in ran.err
    assert f"Panels of 2 images: {Path(files[0]).parent}/, ..." in ran.err


def test_the_overview_has_the_first_images_and_is_written_first(network, images, dino, monkeypatch):
    monkeypatch.setattr("dino_ssl.cli.attention.SHEET_PANELS", 10)  # of 8 per image
    ran = dino("attention", network, images / "star", "--size", "32", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    assert "Overview of 1 image: maps/all.png" in ran.err
    _, second = ran.json["images"]
    assert Path("maps/all.png").stat().st_mtime_ns < Path(second["files"][0]).stat().st_mtime_ns


@pytest.mark.parametrize("command", ["attention", "pca"])
def test_a_strip_and_a_long_name_do_not_stop_a_folder(network, images, dino, tmp_path, command):
    folder = tmp_path / "photos"
    folder.mkdir()
    long_name = "n" * 251 + ".png"
    shutil.copy(next(images.glob("star/*.png")), folder / long_name)
    Image.new("RGB", (5000, 1)).save(folder / "strip.png")
    ran = dino(command, network, folder, "--size", "32", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    assert [Path(item["image"]).name for item in ran.json["images"]] == [long_name]
    assert ran.json["skipped"] == [
        {"name": f"{folder}/strip.png", "reason": "5000 x 1 pixels: longer than 16 times its short side"}
    ]


def test_attention_of_synthetic_images_shows_their_objects(network, dino, monkeypatch):
    monkeypatch.setattr("dino_ssl.cli.images.NUM_SCENES", 1)
    ran = dino("attention", network, "small-objects", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    assert "Panels of 1 image: maps/" in ran.err
    first, second, *_ = ran.json["images"][0]["files"]
    assert [Path(file).name for file in (first, second)] == ["image.png", "object.png"]
    image, drawn = (np.asarray(Image.open(file)) for file in (first, second))
    inside = cv2.resize(replace(SMALL_OBJECTS, part="val").mask(0), drawn.shape[:2], interpolation=cv2.INTER_NEAREST)
    assert (drawn == image).all(axis=2)[inside > 0].mean() > 0.8  # all but the line around it
    assert (drawn == image).all(axis=2)[inside == 0].mean() < 0.1


def test_attention_of_points_has_one_color_per_point(network, images, dino):
    image = next(images.glob("star/*.png"))
    points = ("--point", "5", "30", "--point", "30", "5")
    ran = dino("attention", network, image, *points, "--layer", "0", "--heads", "1", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    (result,) = ran.json["images"]
    assert result["layer"] == 0
    assert len(result["mask_share"]) == 2
    assert [Path(file).name for file in result["files"]] == ["image.png", "points.png", "point-1.png", "point-2.png"]
    first, second = (np.asarray(Image.open(file)).astype(int) for file in result["files"][2:])
    assert first[..., 0].sum() > first[..., 2].sum()  # red
    assert second[..., 2].sum() > second[..., 0].sum()  # blue


def test_raw_attention_is_written_at_patch_and_at_pixel_size(network, images, dino):
    image = sorted(path for path in images.rglob("*.png") if path.stat().st_size > 100)[0]
    result = dino("attention", network, image, "--raw", "-o", "out", "--json").json["images"][0]
    patches, pixels = (np.load(f"out/{image.stem}/raw-{part}.npy") for part in ("patches", "pixels"))
    maps = dino_ssl.attention(network, image)
    np.testing.assert_array_equal(patches, maps.heads)
    assert list(patches.shape[1:]) == result["grid"]
    assert pixels.shape == (len(patches), *cv2.imread(str(image)).shape[:2])
    assert pixels.dtype == patches.dtype == np.float32
    assert pixels.mean() == pytest.approx(patches.mean(), rel=0.02)
    dino("attention", network, image, "--raw", "--point", "3", "4", "--point", "9", "9", "-o", "points")
    assert np.load(f"points/{image.stem}/raw-pixels.npy").shape == (2, *pixels.shape)


def test_attention_of_a_video_is_a_video(network, tmp_path, dino):
    from dino_ssl.viz.video import open_video, write_video

    write_video(tmp_path / "walk.mp4", Scenes(count=1, size=64).video(0, frames=3).frames, 5)
    ran = dino("attention", network, tmp_path / "walk.mp4", "--size", "32", "--json", "-o", "out")
    assert ran.code == 0, ran.err
    (video,) = ran.json["videos"]
    assert (video["frames"], video["fps"], ran.json["images"]) == (3, 5.0, [])
    frames = list(open_video(video["file"]))
    assert len(frames) == 3
    assert frames[0].shape == (384, 3 * 384, 3)  # frame, mean, colored heads


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heads", "3"], "0 .. 2"),
        (["--layer", "2"], "-2 .. 1"),
        (["--mass", "2"], "mass"),
        (["--point", "99", "1"], "outside of the image"),
    ],
)
def test_attention_names_the_bad_option(network, images, dino, words, message):
    ran = dino("attention", network, next(images.glob("star/*.png")), "--size", "32", *words)
    assert ran.code == 2
    assert message in ran.err


def test_tsne_of_classes(network, images, dino):
    ran = dino("tsne", network, images, "--iterations", "30", "--json", "-o", "out/tsne.png")
    assert ran.code == 0, ran.err
    assert ran.json["points"] == 4
    assert min(shape(ran.json["file"])) > 500
    rows = list(csv.DictReader(Path(ran.json["table"]).read_text().splitlines()))
    assert [row["name"] for row in rows] == sorted(path.name for path in images.iterdir() if path.is_dir())
    assert len({(row["x"], row["y"]) for row in rows}) == 4
    assert dino("tsne", network, images, "--iterations", "1", "--json", "-o", "classes.svg").code == 0
    again = dino("tsne", network, images, "-o", "classes.png")  # its table would be overwritten
    assert (again.code, "--out classes-2.png" in again.err) == (2, True)
    Path("tsne.csv").touch()
    assert dino("tsne", network, images, "--iterations", "1", "--json").json["table"] == "tsne-2.csv"


def test_tsne_errors_name_a_valid_choice(network, images, dino):
    for words, message in (
        ([images, "-o", "tsne.txt"], ".png, .pdf, .svg"),
        ([images, "--perplexity", "0"], "at least 1"),
        ([images / "star"], "A map of images: `dino map`"),
    ):
        ran = dino("tsne", network, *words)
        assert (ran.code, message in ran.err) == (2, True), ran.err


def test_pca_of_files_and_a_folder(network, images, dino):
    ran = dino("pca", network, images, next(images.glob("star/*.png")), "--size", "32", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    assert len(ran.json["images"]) == 9
    assert ran.json["variance"] == sorted(ran.json["variance"], reverse=True)
    assert len({result["file"] for result in ran.json["images"]}) == 9
    assert min(shape(ran.json["images"][0]["file"])) >= 384
    masked = dino("pca", network, images / "star", "--size", "32", "--foreground", "0.5", "--json")
    assert any(result["foreground"] < 1 for result in masked.json["images"])
    assert dino("pca", network).code == 2


@pytest.mark.parametrize("word", ["tsne", "pca"])
def test_help_has_examples(dino, word):
    ran = dino(word, "--help")
    assert ran.code == 0
    assert f"dino {word} runs/photos" in ran.out
