"""PASCAL VOC 2012: layout, masks, and errors for other layouts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_ssl.data.benchmarks.voc import Masked, open_voc
from dino_ssl.data.dataset import BadImage
from dino_ssl.data.masks import read_mask
from dino_ssl.errors import UserError


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Return a folder with two images and masks, in the layout of the benchmark."""
    home = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    for number, name in enumerate(("2007_000001", "2007_000002")):
        Image.fromarray(np.full((20, 30, 3), 100, np.uint8)).save(home / f"JPEGImages/{name}.jpg")
        mask = np.zeros((20, 30), np.uint8)
        mask[:5], mask[5] = 15 + number, 255
        image = Image.fromarray(mask, mode=None).convert("P")
        image.putdata(mask.ravel().tolist())  # the numbers, whatever the palette
        image.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
        image.save(home / f"SegmentationClass/{name}.png")
    (home / "ImageSets/Segmentation/val.txt").write_text("2007_000001\n2007_000002\n")
    (home / "ImageSets/Segmentation/train.txt").write_text("2007_000002\n")
    return home


def test_images_and_masks_are_read(voc: Path) -> None:
    dataset = open_voc(voc)
    assert isinstance(dataset, Masked)
    assert dataset.names == ["2007_000001", "2007_000002"]
    assert dataset.sizes.tolist() == [[30, 20], [30, 20]]
    assert dataset.read(0).shape == (20, 30, 3)
    assert np.unique(dataset.mask(0)).tolist() == [0, 15, 255]
    assert np.unique(dataset.mask(1)).tolist() == [0, 16, 255]
    assert open_voc(voc, split="train").names == ["2007_000002"]


def test_parent_folders_are_accepted(voc: Path) -> None:
    assert len({open_voc(folder).fingerprint for folder in (voc, voc.parent, voc.parent.parent)}) == 1


def test_errors_show_the_expected_layout(voc: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", voc / "JPEGImages"):
        with pytest.raises(UserError, match=r"(?s)Expected the layout.*ImageSets/Segmentation/val.txt"):
            open_voc(folder)
    with pytest.raises(UserError, match=r"did you mean 'train'\?.*\n.*Lists: train, val"):
        open_voc(voc, split="trian")
    (voc / "JPEGImages/2007_000002.jpg").unlink()
    with pytest.raises(UserError, match=r"1 files are missing, .*JPEGImages/2007_000002.jpg"):
        open_voc(voc)
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val\.txt is empty"):
        open_voc(voc)


def test_invalid_masks_are_reported(voc: Path, tmp_path: Path) -> None:
    dataset = open_voc(voc)
    mask = voc / "SegmentationClass/2007_000001.png"
    Image.new("P", (9, 9)).save(mask)
    with pytest.raises(BadImage, match="is 9x9 pixels, its image 30x20"):
        dataset.mask(0)
    Image.new("RGB", (30, 20)).save(mask)
    with pytest.raises(BadImage, match="indexed PNG"):
        dataset.mask(0)
    mask.write_bytes(b"hello")
    with pytest.raises(BadImage, match="indexed PNG"):
        read_mask(mask)
    (voc / "JPEGImages/2007_000001.jpg").write_bytes(b"hello")
    with pytest.raises(UserError, match="not an image"):
        open_voc(voc)


def test_original_files(shared: Path) -> None:
    folder = shared / "data/voc12"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    dataset = open_voc(folder)
    assert len(dataset) == 12
    for index in range(len(dataset)):
        labels = set(np.unique(dataset.mask(index)).tolist())
        assert labels <= {*range(21), 255}
        assert len(labels & set(range(1, 21))) >= 1
