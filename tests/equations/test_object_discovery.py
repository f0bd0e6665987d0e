"""CorLoc and saliency follow the published protocol; the benchmarks are read by their own layouts."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dino_ssl
from dino_ssl.data.benchmarks.objects import boxes_of, open_objects, read_voc_boxes
from dino_ssl.data.masks import write_mask
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.object_discovery import (
    ObjectDiscovery,
    box_iou,
    center_box,
    padded_view,
    resized_view,
    saliency,
)
from dino_ssl.models.vit import VisionTransformer, ViT

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
OBJECT = "<object><name>dog</name><difficult>{}</difficult>{}</object>"


@pytest.fixture(scope="module")
def network() -> VisionTransformer:
    torch.manual_seed(0)
    return ViT(width=48, depth=2, heads=3, patch=8, image_size=32).build(drop_path=0.0).eval()


def write_images(folder: Path, names: list[str], size: tuple[int, int] = (40, 50)) -> None:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / name), cv2.resize(Scenes(size=32).read(i), size[::-1]))


def voc(root: Path) -> Path:
    write_images(root / "JPEGImages", ["000001.jpg", "000002.jpg"])
    for name, boxes in (("000001", [(1, 1, 50, 40)]), ("000002", [(11, 6, 20, 15), (1, 1, 5, 5)])):
        objects = "".join(OBJECT.format(i % 2, BOX.format(*box)) for i, box in enumerate(boxes))
        (root / "Annotations").mkdir(exist_ok=True)
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/trainval.txt").write_text("000001\n000002\n")
    return root


def test_voc_boxes_count_pixels_from_one_and_include_difficult_objects(tmp_path: Path) -> None:
    dataset = open_objects(voc(tmp_path / "VOC2007"))
    np.testing.assert_array_equal(boxes_of(dataset, 0), [[0, 0, 50, 40]])  # the whole image
    np.testing.assert_array_equal(boxes_of(dataset, 1), [[10, 5, 20, 15], [0, 0, 5, 5]])
    (tmp_path / "bad.xml").write_text("<annotation><object></object></annotation>")
    with pytest.raises(UserError, match=r"bad\.xml is not an annotation"):
        read_voc_boxes(tmp_path / "bad.xml")


def test_the_published_scores_are_those_of_the_set(
    tmp_path: Path, network: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(voc(tmp_path / "VOC2007"))
    result = dino_ssl.evaluate(network, ObjectDiscovery(), ".")
    assert result["references"]["published"] == {"CorLoc LOST": 61.9, "CorLoc TokenCut": 68.8}
    assert result["values"].keys() == {"CorLoc LOST", "CorLoc TokenCut"}
    assert result["references"]["center_box"]["CorLoc LOST"] == 50.0  # half of the first image's box
    unpublished = dino_ssl.evaluate(network, ObjectDiscovery(), voc(tmp_path / "mine"))
    assert "published" not in unpublished["references"]


def test_coco20k_is_read_from_the_list_without_crowds(tmp_path: Path) -> None:
    write_images(tmp_path / "train2014", ["a_7.jpg", "a_8.jpg"])
    annotations = [
        {"image_id": 7, "iscrowd": 0, "bbox": [1.4, 2, 10.2, 5]},
        {"image_id": 7, "iscrowd": 1, "bbox": [0, 0, 50, 40]},
        {"image_id": 8, "iscrowd": 0, "bbox": [0, 0, 4, 4]},
    ]
    images = [{"id": 7, "file_name": "a_7.jpg"}, {"id": 8, "file_name": "a_8.jpg"}]
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/instances_train2014.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    with pytest.raises(UserError, match=r"coco_20k_filenames\.txt"):
        open_objects(tmp_path)
    (tmp_path / "coco_20k_filenames.txt").write_text("train2014/a_7.jpg\n")
    dataset = open_objects(tmp_path)
    assert len(dataset) == 1
    np.testing.assert_array_equal(boxes_of(dataset, 0), [[1, 2, 12, 7]])


@pytest.mark.parametrize("folders", [("images", "ground_truth_mask"), ("DUTS-TE-Image", "DUTS-TE-Mask")])
def test_saliency_sets_are_recognized(tmp_path: Path, folders: tuple[str, str], network: VisionTransformer) -> None:
    root = tmp_path / "ECSSD"
    write_images(root / folders[0], ["0001.jpg"])
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 10:30] = 255
    (root / folders[1]).mkdir()
    cv2.imwrite(str(root / folders[1] / "0001.png"), np.dstack([mask] * 3))  # gray levels in three channels
    result = dino_ssl.evaluate(network, ObjectDiscovery(methods=("tokencut",)), root)
    assert result["values"].keys() == {"IoU TokenCut", "accuracy TokenCut", "max F TokenCut"}
    assert result["references"]["published"]["max F TokenCut"] == 80.3
    (root / folders[1] / "0001.png").unlink()
    with pytest.raises(UserError, match="needs a mask"):
        open_objects(root)


def test_other_folders_are_refused_with_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)no benchmark.*ECSSD"):
        open_objects(tmp_path)
    with pytest.raises(UserError, match="Expected images with boxes or masks"):
        dino_ssl.evaluate(
            ViT(width=48, depth=1, heads=3, patch=8).build(), ObjectDiscovery(), [np.zeros((9, 9, 3), "u1")]
        )


def test_boxes_of_masks_surround_each_object(tmp_path: Path) -> None:
    write_images(tmp_path / "JPEGImages", ["a.jpg"])
    mask = np.zeros((40, 50), np.uint8)
    mask[3:9, 5:20], mask[30:, 40:], mask[20, 20] = 4, 7, 255
    write_mask(tmp_path / "SegmentationClass/a.png", mask)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    np.testing.assert_array_equal(boxes_of(open_objects(tmp_path), 0), [[5, 3, 20, 9], [40, 30, 50, 40]])


def test_an_image_of_two_patches_is_an_object(tmp_path: Path, network: VisionTransformer) -> None:
    write_images(tmp_path / "JPEGImages", ["a.jpg"], (network.patch, 2 * network.patch))
    write_mask(tmp_path / "SegmentationClass/a.png", np.ones((network.patch, 2 * network.patch), np.uint8))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    result = dino_ssl.evaluate(network, ObjectDiscovery(), tmp_path)
    assert result["values"]["CorLoc TokenCut"] == 100


def test_padding_is_zero_after_the_normalization_and_boxes_end_with_the_image(network: VisionTransformer) -> None:
    image = Scenes(size=32).read(0)[:30, :21]
    view = padded_view(network, image)
    assert view.input.shape == (1, 3, 32, 24)
    pixels = network.transform.normalize(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    torch.testing.assert_close(view.input[0, :, :30, :21], pixels)
    assert not view.input[0, :, 30:].any()
    assert not view.input[0, :, :, 21:].any()
    mask = np.zeros((4, 3), bool)
    mask[2:, 1:] = True
    assert view.to_box(mask) == (8, 16, 21, 30)
    np.testing.assert_array_equal(np.argwhere(view.to_mask(mask))[[0, -1]], [[16, 8], [29, 20]])


def test_saliency_resizes_to_the_nearest_size_of_whole_patches(network: VisionTransformer) -> None:
    view = resized_view(network, Scenes(size=32).read(0)[:30, :21], None)
    assert view.input.shape == (1, 3, 32, 24)
    mask = np.zeros((4, 3), bool)
    mask[3, 2] = True
    expected = [[y * 4 // 30 == 3 and x * 3 // 21 == 2 for x in range(21)] for y in range(30)]
    np.testing.assert_array_equal(view.to_mask(mask), expected)


def test_overlap_and_saliency_scores() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], float)
    np.testing.assert_allclose(box_iou((0, 0, 10, 10), boxes), [1, 1 / 3, 0])
    mask, truth = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    mask[0], truth[0, :2], truth[1, 0] = True, True, True
    precision, recall = 2 / 5, 2 / 3
    assert saliency(mask, truth) == pytest.approx(
        (2 / 6, 16 / 20, 1.3 * precision * recall / (0.3 * precision + recall))
    )
    assert saliency(~truth & truth, truth)[2] == 0


def test_the_center_box_has_half_of_the_area() -> None:
    mask, box = center_box(100, 200)
    assert mask.mean() == pytest.approx(0.5, abs=0.01)
    assert box == (29, 15, 171, 85)


def test_void_pixels_are_not_scored(network: VisionTransformer) -> None:
    scores = []
    for void in (0, 255):
        dataset = Scenes(count=2, size=32, part="val").open()
        masks = [dataset.mask(i) for i in range(2)]
        for mask in masks:
            mask[mask == 0] = void
        dataset.mask = masks.__getitem__  # type: ignore[method-assign]
        scores.append(dino_ssl.evaluate(network, ObjectDiscovery(methods=("attention",)), dataset, references=False))
    assert scores[1]["values"]["accuracy attention"] != scores[0]["values"]["accuracy attention"]
    found = scores[1]["values"]
    assert found["IoU attention"] == pytest.approx(found["accuracy attention"])  # only pixels of objects are left
