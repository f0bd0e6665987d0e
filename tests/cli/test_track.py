"""dino track, from frames and a mask to masks, an overlay and a strip; and the masks that people paint."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dino_ssl.data.masks import read_mask, write_mask
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.video_segmentation import VideoSegmentation
from dino_ssl.models import ViT
from dino_ssl.models.weights import save_backbone
from dino_ssl.viz.tracking import BRIGHT, first_mask, side_by_side, tint, too_small

FRAMES = 5


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """frames/ 8.png ... 12.png with two objects, mask.png of the first, net.safetensors."""
    folder = tmp_path_factory.mktemp("film")
    video = Scenes(size=48, part="val").video(1, FRAMES)
    (folder / "frames").mkdir()
    for number, frame in enumerate(video.frames, 8):
        cv2.imwrite(str(folder / "frames" / f"{number}.png"), frame[..., ::-1])
    write_mask(folder / "mask.png", video.masks[0])
    write_mask(folder / "last.png", video.masks[-1])
    torch.manual_seed(0)
    network = ViT(patch=4, width=32, depth=1, heads=2, image_size=24)
    save_backbone(network, network.build(drop_path=0.0).state_dict(), folder / "net.safetensors")
    return folder


def test_frames_and_a_mask_in_masks_and_a_film_out(dino, film: Path, tmp_path: Path) -> None:
    ran = dino("track", film / "net.safetensors", film / "frames", "--mask", film / "mask.png", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    result, out = ran.json, tmp_path / "out"
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["10.png", "11.png", "12.png", "8.png", "9.png"]
    assert (read_mask(out / "masks/8.png") == read_mask(film / "mask.png")).all()
    mine, true = read_mask(out / "masks/12.png"), read_mask(film / "last.png")
    for label in (1, 2):  # random weights follow colours and places: far better than standing still
        assert ((mine == label) & (true == label)).sum() / ((mine == label) | (true == label)).sum() > 0.4
    assert [entry["object"] for entry in result["objects"]] == [1, 2]
    assert [len(entry["area"]) for entry in result["objects"]] == [FRAMES, FRAMES]
    assert result["objects"][0]["area"][-1] == pytest.approx((mine == 1).mean(), abs=1e-5)
    assert result["frames"] == FRAMES
    assert result["size"] == 48
    overlay = cv2.VideoCapture(result["overlay"])
    assert overlay.get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES
    overlay.release()
    with Image.open(result["strip"]) as strip:
        assert strip.height == 160


def test_a_video_file_in_a_gif_out(dino, film: Path, tmp_path: Path) -> None:
    from dino_ssl.viz.video import open_video, write_video

    write_video(tmp_path / "film.mp4", open_video(film / "frames"), 10)
    ran = dino(
        "track", film / "net.safetensors", "film.mp4", "--mask", film / "mask.png", "-o", "out", "--video", "gif"
    )
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == [f"0000{i}.png" for i in range(FRAMES)]
    with Image.open(tmp_path / "out/overlay.gif") as gif:
        assert gif.n_frames == FRAMES
        assert gif.info["duration"] == 100
    assert "object 2:" in ran.out


def test_without_a_codec_the_overlay_is_a_gif(dino, film: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dino_ssl.viz.video.CODECS", ())
    ran = dino("track", film / "net.safetensors", film / "frames", "--mask", film / "mask.png", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["overlay"].endswith("overlay.gif")
    assert (tmp_path / "out/overlay.gif").stat().st_size > 1000


def test_help_teaches(dino) -> None:
    ran = dino("track", "--help")
    assert ran.code == 0
    assert "dino track " in ran.out.partition("\nexamples:\n")[2]
    assert "indexed PNG" in ran.out


@pytest.mark.parametrize(
    ("frames", "mask", "said"),
    [
        ("nowhere", "mask.png", "There is no video"),
        ("frames", "none.png", "There is no mask"),
        ("frames", "frames/8.png", "colours; expected black"),
        ("frames", "ground.png", "shows no object"),
        ("frames", "wide.png", "96 x 48 pixels, and the first frame 48 x 48"),
        ("mask.txt", "mask.png", "no video that OpenCV can read"),
    ],
)
def test_what_cannot_be_followed_is_said(dino, film: Path, frames: str, mask: str, said: str) -> None:
    write_mask(film / "ground.png", np.zeros((48, 48), np.uint8))
    write_mask(film / "wide.png", np.ones((48, 96), np.uint8))
    (film / "mask.txt").write_text("hello")
    ran = dino("track", film / "net.safetensors", film / frames, "--mask", film / mask)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def painted(folder: Path, pixels: list, mode: str | None = None) -> Path:
    Image.fromarray(np.array([pixels], np.uint8)).convert(mode).save(folder / "painted.png")
    return folder / "painted.png"


def test_masks_as_people_paint_them(tmp_path: Path) -> None:
    black, red, green, dark_green = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 128, 0)
    assert first_mask(painted(tmp_path, [0, 255, 255]), 1, 3).tolist() == [[0, 1, 1]]  # black and white
    assert first_mask(painted(tmp_path, [0, 255, 0], "1"), 1, 3).tolist() == [[0, 1, 0]]
    assert first_mask(painted(tmp_path, list(range(0, 256, 5))), 1, 52).tolist() == [[0] * 26 + [1] * 26]  # soft edges
    assert first_mask(painted(tmp_path, [0, 3, 7]), 1, 3).tolist() == [[0, 3, 7]]  # numbers
    assert first_mask(painted(tmp_path, [black, red, green, red]), 1, 4).tolist() == [[0, 2, 1, 2]]  # any colours
    assert first_mask(painted(tmp_path, [black, dark_green]), 1, 2).tolist() == [[0, 2]]  # DAVIS' colours
    assert first_mask(painted(tmp_path, [(*red, 0), (*red, 255)]), 1, 2).tolist() == [[0, 1]]  # transparent ground
    assert first_mask(painted(tmp_path, [0, 3]), 2, 4).tolist() == [[0, 0, 3, 3]] * 2  # in proportion
    write_mask(tmp_path / "void.png", np.array([[0, 255, 1]], np.uint8))
    assert first_mask(tmp_path / "void.png", 1, 3).tolist() == [[0, 0, 1]]
    with pytest.raises(UserError, match="expected one size"):
        first_mask(painted(tmp_path, [0] * 9 + [3]), 3, 10)


def test_objects_that_no_patch_sees_are_named() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40], mask[62, 62] = 1, 5
    assert too_small(mask, 8, VideoSegmentation(size=64, multiple=1)) == [5]
    assert too_small(mask, 1, VideoSegmentation(size=64, multiple=1)) == []


def test_objects_are_coloured_and_the_ground_is_not() -> None:
    frame, mask = np.full((20, 20, 3), 100, np.uint8), np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 2
    drawn = tint(frame, mask)
    assert (drawn[mask == 0] == 100).all()
    assert drawn[5, 5].tolist() == BRIGHT[2].tolist()  # its edge
    assert drawn[10, 10, 1] > 150 > 60 > drawn[10, 10, 0] - 1
    strip = side_by_side((np.full((10, 20, 3), i, np.uint8) for i in range(50)), 50, shown=3, height=10)
    assert strip.shape == (10, 68, 3)
    assert strip[0, [0, 24, 67], 0].tolist() == [0, 24, 49]
