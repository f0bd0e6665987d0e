"""dino attention, tsne and pca as a person types them: folders, points, videos, and what is said of mistakes."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.models.vit import ViT
from dino_ssl.models.weights import save_backbone


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ViT with two blocks and three heads."""
    config = ViT(size="tiny", patch=8, image_size=32, width=24, depth=2, heads=3)
    return save_backbone(config, config.build().state_dict(), tmp_path_factory.mktemp("net") / "tiny.safetensors")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures in four class folders, and a file that is none."""
    folder = tmp_path_factory.mktemp("drawn")
    Scenes(count=8, size=40, classes=4).write(folder)
    (folder / "star" / "broken.jpg").write_text("hello")
    return folder


def shape(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_attention_of_a_folder_leaves_out_what_is_no_picture(network, drawn, dino):
    ran = dino("attention", network, drawn, "--size", "32", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    assert len(ran.json["images"]) == 8
    files = ran.json["images"][0]["files"]
    assert [Path(file).name for file in files] == [
        "picture.png", "mean.png", "overlay.png", "mask-60.png", "heads.png", "head-0.png", "head-1.png", "head-2.png",
    ]  # fmt: skip
    assert Path(files[0]).parts[:2] == ("maps", "fish" if "fish" in files[0] else Path(files[0]).parts[1])
    assert len({file for one in ran.json["images"] for file in one["files"]}) == 64
    assert min(shape(files[1])) >= 384  # a small network's maps are large enough to be read
    assert shape(ran.json["figure"])[1] > 8 * 2 * 224


def test_attention_of_points_has_a_colour_for_each(network, drawn, dino):
    picture = next(drawn.glob("star/*.png"))
    points = ("--point", "5", "30", "--point", "30", "5")
    ran = dino("attention", network, picture, *points, "--layer", "0", "--heads", "1", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    (seen,) = ran.json["images"]
    assert (seen["points"], seen["layer"], seen["heads"]) == ([[5.0, 30.0], [30.0, 5.0]], 0, 1)
    assert len(seen["mask_share"]) == 2
    assert [Path(file).name for file in seen["files"]] == ["picture.png", "points.png", "point-1.png", "point-2.png"]
    one, two = (np.asarray(Image.open(file)).astype(int) for file in seen["files"][2:])
    assert one[..., 0].sum() > one[..., 2].sum()  # the first is red, the second blue
    assert two[..., 2].sum() > two[..., 0].sum()


def test_a_video_goes_in_and_a_video_comes_out(network, tmp_path, dino):
    from dino_ssl.viz.video import open_video, write_video

    write_video(tmp_path / "walk.mp4", Scenes(count=1, size=64).video(0, frames=3).frames, 5)
    ran = dino("attention", network, tmp_path / "walk.mp4", "--size", "32", "--json", "-o", "out")
    assert ran.code == 0, ran.err
    (video,) = ran.json["videos"]
    assert (video["frames"], video["fps"], ran.json["figure"]) == (3, 5.0, None)
    frames = list(open_video(video["file"]))
    assert len(frames) == 3
    assert frames[0].shape == (384, 3 * 384, 3)  # frame, mean, heads in colours
    Scenes(count=2, size=40).write("frames")
    for number, file in enumerate(sorted(Path("frames").rglob("*.png"))):
        file.rename(f"frames/{number}.png")
    ran = dino("attention", network, "frames", "--video", "--fps", "2", "--size", "32", "--json", "-o", "out")
    assert ran.json["videos"][0]["file"] == "out/frames.mp4"
    assert (ran.json["videos"][0]["frames"], ran.json["videos"][0]["fps"]) == (2, 2.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heads", "3"], "0 .. 2"),
        (["--layer", "2"], "-2 .. 1"),
        (["--mass", "2"], "mass"),
        (["--point", "99", "1"], "outside of the picture"),
    ],
)
def test_attention_that_is_not_there_is_said(network, drawn, dino, words, said):
    ran = dino("attention", network, next(drawn.glob("star/*.png")), "--size", "32", *words)
    assert ran.code == 2
    assert said in ran.err


def test_tsne_of_pictures_and_of_classes(network, drawn, dino):
    ran = dino("tsne", network, drawn, "--iterations", "30", "--json", "-o", "out/tsne.png")
    assert ran.code == 0, ran.err
    assert (ran.json["of"], ran.json["points"]) == ("images", 8)
    assert 0 <= ran.json["same class nearest"] <= 100
    assert min(shape(ran.json["file"])) > 500
    rows = list(csv.DictReader(Path(ran.json["table"]).read_text().splitlines()))
    assert [row["name"].split("/")[0] for row in rows] == [row["label"] for row in rows]
    assert len({(row["x"], row["y"]) for row in rows}) == 8
    thumbs = dino("tsne", network, drawn, "--thumbnails", "--iterations", "30", "--max-points", "5", "-o", "thumbs.png")
    assert "5 of 8 pictures" in thumbs.out
    classes = dino("tsne", network, drawn, "--of", "classes", "--iterations", "30", "--json", "-o", "classes.svg")
    assert (classes.json["points"], classes.json["perplexity"]) == (4, 1.0)
    assert "mug" in Path("classes.svg").read_text() or "star" in Path("classes.csv").read_text()


def test_tsne_says_what_would_do(network, drawn, dino):
    for words, said in (
        (["-o", "tsne.txt"], ".png, .pdf, .svg"),
        (["--of", "classes", "--thumbnails"], "--of pictures"),
        (["--max-points", "2"], "at most 5000"),
        (["--perplexity", "0"], "at least 1"),
    ):
        ran = dino("tsne", network, drawn, *words)
        assert (ran.code, said in ran.err) == (2, True), ran.err
    ran = dino("tsne", network, drawn / "star", "--of", "classes")
    assert "--of pictures" in ran.err


def test_pca_of_files_and_a_folder(network, drawn, dino):
    ran = dino("pca", network, drawn, next(drawn.glob("star/*.png")), "--size", "32", "--json", "-o", "maps")
    assert ran.code == 0, ran.err
    assert len(ran.json["images"]) == 9
    assert ran.json["variance"] == sorted(ran.json["variance"], reverse=True)
    assert len({one["file"] for one in ran.json["images"]}) == 9
    assert min(shape(ran.json["images"][0]["file"])) >= 384
    some = dino("pca", network, drawn / "star", "--size", "32", "--foreground", "0.5", "--json")
    assert all(one["foreground"] < 1 for one in some.json["images"])
    assert dino("pca", network).code == 2


@pytest.mark.parametrize("word", ["tsne", "pca"])
def test_help_has_examples(dino, word):
    ran = dino(word, "--help")
    assert ran.code == 0
    assert f"dino {word} runs/photos" in ran.out
