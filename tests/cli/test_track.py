"""dino track: masks, overlay and preview from frames and a first mask; reading of painted masks."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dino_ssl
from dino_ssl.data.masks import read_mask, write_mask
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.video_segmentation import VideoSegmentation
from dino_ssl.models import ViT
from dino_ssl.models.weights import save_backbone
from dino_ssl.viz.tracking import BRIGHT_PALETTE, frame_strip, overlay_mask, read_first_mask, too_small_objects

FRAMES = 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with frames/8.png ... 12.png of two objects, the masks mask.png and last.png, net.safetensors."""
    folder = tmp_path_factory.mktemp("clip")
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


def test_track_writes_masks_overlay_and_preview(dino, clip: Path, tmp_path: Path) -> None:
    ran = dino("track", clip / "net.safetensors", clip / "frames", "--mask", clip / "mask.png", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    result, out = ran.json, tmp_path / "out"
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["10.png", "11.png", "12.png", "8.png", "9.png"]
    assert (read_mask(out / "masks/8.png") == read_mask(clip / "mask.png")).all()
    predicted, true = read_mask(out / "masks/12.png"), read_mask(clip / "last.png")
    for label in (1, 2):  # even features of random weights follow colors: far better than repeating the first mask
        intersection, union = (predicted == label) & (true == label), (predicted == label) | (true == label)
        assert intersection.sum() / union.sum() > 0.4
    assert [entry["object"] for entry in result["objects"]] == [1, 2]
    assert [len(entry["area"]) for entry in result["objects"]] == [FRAMES, FRAMES]
    assert result["objects"][0]["area"][-1] == pytest.approx((predicted == 1).mean(), abs=1e-5)
    assert result["frames"] == FRAMES
    assert result["size"] == 48
    overlay = cv2.VideoCapture(result["overlay"])
    assert overlay.get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES
    overlay.release()
    with Image.open(result["strip"]) as strip:
        assert strip.height == 160


def test_track_reads_a_video_file(dino, clip: Path, tmp_path: Path) -> None:
    from dino_ssl.viz.video import open_video, write_video

    write_video(tmp_path / "clip.mp4", open_video(clip / "frames"), 10)
    ran = dino("track", clip / "net.safetensors", "clip.mp4", "--mask", clip / "mask.png", "-o", "out")
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == [f"0000{i}.png" for i in range(FRAMES)]
    assert open_video(tmp_path / "out/overlay.mp4").fps == 10
    assert "object 2:" in ran.out


def test_a_missing_codec_is_an_error(dino, clip: Path, monkeypatch) -> None:
    monkeypatch.setattr("dino_ssl.viz.video.CODECS", ())
    ran = dino("track", clip / "net.safetensors", clip / "frames", "--mask", clip / "mask.png", "-o", "out")
    assert ran.code == 2
    assert "no MP4 codec" in ran.err


def test_help_has_examples_and_describes_the_mask(dino) -> None:
    ran = dino("track", "--help")
    assert ran.code == 0
    assert "dino track " in ran.out.partition("\nexamples:\n")[2]
    assert "indexed PNG" in ran.out


@pytest.mark.parametrize(
    ("frames", "mask", "message"),
    [
        ("nowhere", "mask.png", "nowhere"),
        ("frames", "none.png", "none.png cannot be read as PNG"),
        ("frames", "frames/8.png", "colors: expected black"),
        ("frames", "background.png", "has no object"),
        ("frames", "wide.png", "96 x 48 pixels and the first frame 48 x 48"),
        ("mask.txt", "mask.png", "OpenCV cannot read the video"),
    ],
)
def test_errors_name_the_bad_input(dino, clip: Path, frames: str, mask: str, message: str) -> None:
    write_mask(clip / "background.png", np.zeros((48, 48), np.uint8))
    write_mask(clip / "wide.png", np.ones((48, 96), np.uint8))
    (clip / "mask.txt").write_text("hello")
    ran = dino("track", clip / "net.safetensors", clip / frames, "--mask", clip / mask)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err


def paint(folder: Path, pixels: list, mode: str | None = None) -> Path:
    Image.fromarray(np.array([pixels], np.uint8)).convert(mode).save(folder / "painted.png")
    return folder / "painted.png"


def test_painted_masks_are_read_as_labels(tmp_path: Path) -> None:
    black, red, green = (0, 0, 0), (255, 0, 0), (0, 255, 0)
    assert read_first_mask(paint(tmp_path, [0, 255, 255]), 1, 3).tolist() == [[0, 1, 1]]  # black and white
    assert read_first_mask(paint(tmp_path, [0, 255, 0], "1"), 1, 3).tolist() == [[0, 1, 0]]
    assert read_first_mask(paint(tmp_path, [black, red, green, red]), 1, 4).tolist() == [[0, 1, 2, 1]]
    assert read_first_mask(paint(tmp_path, [red, green]), 1, 2).tolist() == [[1, 2]]  # no background
    assert read_first_mask(paint(tmp_path, [(*red, 0), (*red, 255)]), 1, 2).tolist() == [
        [0, 1]
    ]  # transparent background
    assert read_first_mask(paint(tmp_path, [0, 255]), 2, 4).tolist() == [[0, 0, 1, 1]] * 2  # the same proportions
    write_mask(tmp_path / "void.png", np.array([[0, 255, 1]], np.uint8))
    assert read_first_mask(tmp_path / "void.png", 1, 3).tolist() == [[0, 0, 1]]
    with pytest.raises(UserError, match="expected the same size"):
        read_first_mask(paint(tmp_path, [0] * 9 + [3]), 3, 10)


def test_objects_without_a_patch_are_too_small() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40], mask[62, 62] = 1, 5
    assert too_small_objects(mask, 8, VideoSegmentation(size=64, multiple=1)) == [5]
    assert too_small_objects(mask, 1, VideoSegmentation(size=64, multiple=1)) == []


def test_the_overlay_colors_objects_only() -> None:
    frame, mask = np.full((20, 20, 3), 100, np.uint8), np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 2
    drawn = overlay_mask(frame, mask)
    assert (drawn[mask == 0] == 100).all()
    assert drawn[5, 5].tolist() == BRIGHT_PALETTE[2].tolist()  # its edge
    assert drawn[10, 10, 1] > 150 > 60 > drawn[10, 10, 0] - 1
    strip = frame_strip((np.full((10, 20, 3), i, np.uint8) for i in range(50)), 50, num_tiles=3, height=10)
    assert strip.shape == (10, 68, 3)
    assert strip[0, [0, 24, 67], 0].tolist() == [0, 24, 49]


def test_objects_are_discovered_in_the_first_frame(dino, clip: Path) -> None:
    network, frames = clip / "net.safetensors", clip / "frames"
    ran = dino("track", network, frames, "--discover", "attention", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    found = dino_ssl.segment(network, frames / "8.png", method="attention")
    np.testing.assert_array_equal(read_mask(Path("out/masks/8.png")), found.labels)
    assert len(ran.json["objects"]) == 1
    for words in ((), ("--mask", clip / "mask.png", "--discover", "lost")):
        assert "as --mask, or a method as --discover" in dino("track", network, frames, *words).err


def test_a_first_frame_without_an_object_is_an_error(dino, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    cv2.imwrite(str(tmp_path / "plain/1.png"), np.full((40, 48, 3), 9, np.uint8))
    ran = dino("track", clip / "net.safetensors", tmp_path / "plain", "--discover", "tokencut")
    assert ran.code == 2
    assert "No object was found in the first frame: the image has one color" in ran.err
