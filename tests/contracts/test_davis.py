"""DAVIS-2017: reading sequences and masks, and errors for other layouts."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dino_ssl.data.benchmarks.davis import open_davis
from dino_ssl.data.masks import PALETTE, read_mask, write_mask
from dino_ssl.errors import UserError
from dino_ssl.evals.davis_score import score_results

MASK = np.pad(np.array([[1, 2]], np.uint8), ((1, 2), (2, 3)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with two sequences of four frames, 7 x 4 pixels."""
    root = tmp_path / "DAVIS"
    for name in ("swan", "car"):
        for i in range(4):
            write_mask(root / f"Annotations/480p/{name}/{i:05d}.png", MASK)
            frame = root / f"JPEGImages/480p/{name}/{i:05d}.jpg"
            frame.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(frame), np.full((4, 7, 3), 10 * i, np.uint8))
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("swan\ncar\n\n")
    return root


@pytest.fixture
def results(root: Path) -> Path:
    folder = root.parent / "results"
    for name in ("swan", "car"):
        for i in (1, 2):
            write_mask(folder / name / f"{i:05d}.png", MASK)
    return folder


def test_masks_are_indexed_png_files_in_the_palette_of_davis(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "new/mask.png", MASK)
    assert (read_mask(path) == MASK).all()
    with Image.open(path) as image:
        assert image.mode == "P"
        assert (np.array(image) == MASK).all()  # as the official scorer reads it
        assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert PALETTE[[8, 9, 255]].tolist() == [[64, 0, 0], [192, 0, 0], [224, 224, 192]]
    assert len({tuple(colour) for colour in PALETTE.tolist()}) == 256
    Image.fromarray(MASK).save(tmp_path / "grey.png")
    assert (read_mask(tmp_path / "grey.png") == MASK).all()
    Image.fromarray(MASK > 0).save(tmp_path / "two.png")
    assert (read_mask(tmp_path / "two.png") == (MASK > 0)).all()


def test_the_palette_equals_the_official_files(shared) -> None:
    with Image.open(next((shared / "data/davis/Annotations/480p/blackswan").iterdir())) as image:
        assert (np.array(image.getpalette()).reshape(-1, 3) == PALETTE[: len(image.getpalette()) // 3]).all()


def test_invalid_masks_are_reported(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colours.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    Image.fromarray(MASK).save(tmp_path / "photo.jpg")
    for name, message in (("colours", "color image"), ("broken", "cannot be read"), ("none", "mask is missing")):
        with pytest.raises(UserError, match=message):
            read_mask(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="indexed PNG"):
        read_mask(tmp_path / "photo.jpg")


def test_sequences_are_in_the_order_of_the_list(root: Path) -> None:
    clips = open_davis(root)
    assert [clip.name for clip in clips] == ["swan", "car"]
    assert clips[0].frame_names == ["00000", "00001", "00002", "00003"]
    assert [int(frame.mean()) for frame in clips[0].frames()] == pytest.approx([0, 10, 20, 30], abs=2)
    assert all((mask == MASK).all() for mask in clips[0].masks())
    before = clips[0].fingerprint
    assert before != clips[1].fingerprint
    write_mask(root / "Annotations/480p/swan/00000.png", MASK[::-1])
    assert open_davis(root)[0].fingerprint != before


def broken(root: Path, what: str) -> Path:
    if what == "no list":
        (root / "ImageSets/2017/val.txt").rename(root / "ImageSets/2017/vall.txt")
    elif what == "no frames":
        (root / "JPEGImages/480p/car").rename(root / "JPEGImages/480p/cart")
    elif what == "no masks":
        (root / "Annotations/480p/car").rename(root / "Annotations/480p/cart")
    elif what == "one mask less":
        (root / "Annotations/480p/car/00002.png").unlink()
    elif what == "empty list":
        (root / "ImageSets/2017/val.txt").write_text("\n")
    elif what == "a list that leads out":
        (root / "ImageSets/2017/val.txt").write_text("../../home\n")
    return root / "nowhere" if what == "nowhere" else root


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no list", "did you mean 'vall'"),
        ("no frames", r"car has 0 frames \(\*.jpg\) and 4 masks"),
        ("no masks", r"car has 4 frames \(\*.jpg\) and 0 masks"),
        ("one mask less", "car: a frame or a mask is missing for 00002"),
        ("empty list", "is empty"),
        ("a list that leads out", "not the name of a file or folder"),
        ("nowhere", "there is no .*nowhere"),
    ],
)
def test_errors_show_the_expected_layout(root: Path, what: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_davis(broken(root, what))
    assert re.search(message, str(caught.value))
    for line in (
        "ImageSets/2017/val.txt",
        "JPEGImages/480p/blackswan/00000.jpg",
        "Annotations/480p/blackswan/00000.png",
    ):
        assert line in str(caught.value)


def test_scoring_needs_no_frames(root: Path, results: Path) -> None:
    for file in (root / "JPEGImages").rglob("*.jpg"):
        file.unlink()
    calls = []
    result = score_results(results, root, progress=lambda done, total: calls.append((done, total)))
    assert result["J&F-Mean"] == 1
    assert list(result) == ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay", "per_object"]
    assert list(result["per_object"]) == ["swan_1", "swan_2", "car_1", "car_2"]
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_first_and_last_frames_are_not_scored_and_void_is_background(root: Path, results: Path) -> None:
    for i in (0, 3):
        write_mask(results / f"swan/{i:05d}.png", MASK * 0)
    void = np.where(MASK == 0, 255, MASK).astype(np.uint8)
    for i in range(4):
        write_mask(root / f"Annotations/480p/car/{i:05d}.png", void)
    assert score_results(results, root)["J-Mean"] == 1


def test_result_masks_of_wrong_size_or_labels_are_rejected(root: Path, results: Path) -> None:
    path = results / "car/00002.png"
    write_mask(path, MASK[:, :-1])
    with pytest.raises(UserError, match=r"car/00002.png: expected .* and 7 x 4 pixels, .* and 6 x 4"):
        score_results(results, root)
    write_mask(path, MASK + 1)
    with pytest.raises(UserError, match=r"expected labels 0 to 2 .*; got labels up to 3"):
        score_results(results, root)
    path.unlink()
    with pytest.raises(UserError, match=r"1 of the 4 masks to score do not exist, .*car/00002.png"):
        score_results(results, root)
    for i in range(4):
        for name in ("swan", "car"):
            write_mask(root / f"Annotations/480p/{name}/{i:05d}.png", MASK * 0)
    write_mask(path, MASK * 0)
    (results / "swan").rename(results / "other")
    (results / "car").rename(results / "swan")
    (root / "ImageSets/2017/val.txt").write_text("swan\n")
    write_mask(results / "swan/00001.png", MASK * 0)
    with pytest.raises(UserError, match="No object to score"):
        score_results(results, root)
