"""Weak segmentation: pseudo-labels, the linear head as a 1 x 1 convolution, mean IoU, and the order of the rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dino_ssl
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.segmentation_head import SegmentationHead, fit_head
from dino_ssl.evals.weak_segmentation import (
    UNLABELED,
    WeakSegmentation,
    class_iou,
    class_map,
    class_mask,
    image_class,
    patch_classes,
    patch_votes,
)
from dino_ssl.models.vit import ViT


def test_the_head_is_a_one_by_one_convolution_that_separates_the_classes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 100 + 30 * torch.randn(3, 5, generator=generator)  # far from zero: standardized for the fit
    labels = torch.arange(300) % 3
    features = centers[labels] + torch.randn(300, 5, generator=generator)
    weight, bias = fit_head(features, labels, 3, 1e-4)
    assert ((features @ weight.T + bias).argmax(1) == labels).float().mean() > 0.98
    head = SegmentationHead(weight, bias, ("a", "b"), "hash", 64)
    patches = features.reshape(2, 10, 15, 5)
    torch.testing.assert_close(head(patches), (patches @ weight.T + bias).permute(0, 3, 1, 2), atol=1e-3, rtol=1e-4)
    loaded = SegmentationHead.load(head.save(tmp_path / "head.safetensors"))
    assert torch.equal(loaded.weight, weight)
    assert (loaded.classes, loaded.weights_hash, loaded.size) == (("a", "b"), "hash", 64)


def test_other_files_are_no_heads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        SegmentationHead.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="text is not a head"):
        SegmentationHead.load(tmp_path / "text")
    wrong = SegmentationHead(torch.zeros(3, 5), torch.zeros(3), ("a",), "hash", 64).save(tmp_path / "wrong")
    with pytest.raises(UserError, match=r"\(3, 5\) weights for 1 classes"):
        SegmentationHead.load(wrong)


def test_patches_have_the_class_of_most_of_their_pixels() -> None:
    truth = np.zeros((4, 6), np.uint8)
    truth[:2, :2], truth[2:, 4:], truth[2, 2:4], truth[3, 2] = 3, 255, 7, 7
    np.testing.assert_array_equal(patch_classes(truth, (2, 3)), [[3, 0, 0], [0, 7, UNLABELED]])


def test_the_class_of_an_image_is_its_label_or_the_only_one_in_its_mask() -> None:
    scenes = Scenes(count=3, size=32, classes=3).open()
    assert [image_class(scenes, i, None) for i in range(3)] == [1, 2, 3]
    mask = class_mask(scenes, 2)
    assert mask is not None
    assert set(np.unique(mask)) == {0, 3}
    scenes.labels = None
    assert image_class(scenes, 0, np.array([[0, 4], [255, 4]])) == 4
    assert image_class(scenes, 0, np.array([[0, 4], [255, 5]])) == UNLABELED


def test_iou_by_class_from_pairs() -> None:
    truth, predicted = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 0, 2])
    confusion = np.bincount(3 * truth + predicted, minlength=9).reshape(3, 3)
    np.testing.assert_allclose(class_iou(confusion), [1 / 4, 2 / 4, np.nan])  # class 2 is not in the truth


def test_neighbors_vote_for_the_class_of_a_patch() -> None:
    memory, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    logits = patch_votes(memory, labels, torch.eye(3).reshape(1, 1, 3, 3), 4, 3)
    np.testing.assert_array_equal(class_map(logits, 1, 3), [[0, 1, 2]])


def test_better_pseudo_labels_give_better_segmentations(tmp_path: Path) -> None:
    """Random weights see colors and textures, which is enough to tell true masks from whole images."""
    torch.manual_seed(0)
    network = ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build().eval()
    train, val = (Scenes(count=30, size=64, classes=2, clutter=0, part=part) for part in ("train", "val"))
    result = dino_ssl.evaluate(network, WeakSegmentation(size=64), train, val, references=False, out=tmp_path)
    values, details = result["values"], result["details"]
    names = ["whole image", "attention", "TokenCut", "true masks", "k-NN"]
    assert list(values) == [f"mIoU {name}" for name in names]
    assert values["mIoU whole image"] < values["mIoU TokenCut"]
    assert values["mIoU whole image"] < values["mIoU true masks"]
    assert details["classes"]["whole image"]["background"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        Path(file).name for file in details["heads"].values()
    )
    again = dino_ssl.evaluate(network, WeakSegmentation(size=64, k=0), train, val, references=False)
    assert again["values"]["mIoU TokenCut"] == values["mIoU TokenCut"]
    assert again["details"]["heads"] == {}  # neither an output folder nor that of a run


def test_datasets_must_fit(tmp_path: Path) -> None:
    network = ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build()
    Scenes(count=4, size=32, classes=2).write(tmp_path / "folder")
    with pytest.raises(UserError, match="images with masks; FolderDataset has none"):
        dino_ssl.evaluate(network, WeakSegmentation(), str(tmp_path / "folder"))
    with pytest.raises(UserError, match="same classes in both datasets; got star, flower and star, flower, gear"):
        dino_ssl.evaluate(
            network, WeakSegmentation(), Scenes(count=4, classes=2), Scenes(count=4, classes=3, part="val")
        )
