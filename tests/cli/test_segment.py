"""dino segment: masks of a folder, in files that other tools read; resumable; bad input ends in one sentence."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dino_ssl
from dino_ssl.data.masks import read_mask
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.evals import weak_segmentation
from dino_ssl.models.vit import ViT
from dino_ssl.models.weights import save_backbone
from dino_ssl.segmentation import folder as segment_folder
from dino_ssl.segmentation.masks import Segmenter, SegmentSettings

NETWORK = ViT(width=48, depth=2, heads=3, patch=8, image_size=32)
ALL = ("--formats", "classes", "coco", "labelme", "yolo", "sheet", "--soft", "npy")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    torch.manual_seed(0)
    save_backbone(NETWORK, NETWORK.build(drop_path=0.0).state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two class folders with images of the same stem, of different shapes."""
    for name, index, size in (("cat/1.png", 0, (40, 60)), ("cat/2.png", 1, (40, 60)), ("dog/1.png", 2, (48, 32))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(Scenes(size=64).read(index), size[::-1]))
    return tmp_path / "photos"


def files_below(path: Path) -> dict[str, tuple[int, bytes]]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


# -- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_all_formats_describe_the_same_masks(dino, checkpoint: Path, images: Path) -> None:
    result = dino("segment", checkpoint, images, "-o", "out", "--method", "maskcut", *ALL, "--json").json
    out = Path("out")
    assert (result["images"], result["segmented"], result["unchanged"], result["skipped"]) == (3, 3, 0, [])
    names = ["cat/1", "cat/2", "dog/1"]
    labels = {name: read_mask(out / f"labels/{name}.png") for name in names}
    assert [labels[name].shape for name in names] == [(40, 60), (40, 60), (48, 32)]
    assert result["objects"] == sum(int(mask.max()) for mask in labels.values())

    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    for name, number in zip(names, (1, 1, 2), strict=True):
        np.testing.assert_array_equal(read_mask(out / f"classes/{name}.png"), number * (labels[name] > 0))
        soft = np.load(out / f"soft/{name}.npy")
        assert soft.shape == (labels[name].max(), *labels[name].shape)

    from pycocotools.coco import COCO

    coco = COCO(str(out / "coco.json"))
    for image in coco.loadImgs(coco.getImgIds()):
        name = image["file_name"].removeprefix(f"{images}/").removesuffix(".png")
        assert (image["height"], image["width"]) == labels[name].shape
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = labels[name] == annotation["id"] % 256
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            assert 0 <= annotation["score"] <= 1
            left, top, width, height = annotation["bbox"]
            rows, columns = np.nonzero(mask)
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert coco.loadCats(annotation["category_id"])[0]["name"] == name.split("/")[0]

    for name in names:
        data = json.loads((out / f"labelme/{name}.json").read_text())
        assert data.keys() == {*("version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth")}
        assert (out / f"labelme/{name}.json").parent.joinpath(data["imagePath"]).resolve() == images / f"{name}.png"
        drawn = np.zeros_like(labels[name])
        for shape in data["shapes"]:
            assert shape.keys() == {"label", "points", "group_id", "shape_type", "flags"}
            assert shape["shape_type"] == "polygon"
            assert len(shape["points"]) >= 3
            assert shape["label"] == name.split("/")[0]
            points = np.floor(np.array(shape["points"])).astype(np.int32)
            cv2.fillPoly(drawn, [points], shape["group_id"])
        assert (drawn == labels[name]).mean() > 0.95  # holes, and regions of one or two pixels, are no polygons

        lines = [line.split() for line in (out / f"yolo/{name}.txt").read_text().splitlines()]
        assert len(lines) == labels[name].max()
        for number, (kind, *values) in enumerate(lines, 1):
            height, width = labels[name].shape
            x, y, w, h = np.array(values, float) * [width, height, width, height]
            rows, columns = np.nonzero(labels[name] == number)
            assert kind == ("0" if name.startswith("cat") else "1")
            np.testing.assert_allclose(
                [x - w / 2, y - h / 2, x + w / 2, y + h / 2],
                [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1],
                atol=1e-3,
            )
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size[0] > 100


def test_clusters_name_the_objects(dino, checkpoint: Path, images: Path) -> None:
    Path("c.csv").write_text("name,cluster\ncat/1.png,7\ndog/1.png,3\n")
    dino("segment", checkpoint, images, "-o", "out", "--classes", "c.csv", "--formats", "yolo")
    assert Path("out/classes.txt").read_text() == "cluster 3\ncluster 7\n"
    assert Path("out/yolo/cat/1.txt").read_text().startswith("1 ")
    assert "columns name and cluster" in dino("segment", checkpoint, images, "--classes", checkpoint).err
    labels = os.stat("out/labels/cat/1.png").st_mtime_ns
    Path("c.csv").write_text("name,cluster\ncat/1.png,3\ndog/1.png,7\n")  # the same clusters, of other images
    dino("segment", checkpoint, images, "-o", "out", "--classes", "c.csv", "--formats", "yolo")
    assert Path("out/yolo/cat/1.txt").read_text().startswith("0 ")
    assert os.stat("out/labels/cat/1.png").st_mtime_ns == labels
    Path("other.csv").write_text("name,cluster\nbird.png,7\n")
    assert "names none of the 3 images" in dino("segment", checkpoint, images, "--classes", "other.csv").err


def test_masks_match_the_image_as_viewed(dino, checkpoint: Path, tmp_path: Path) -> None:
    pixels = cv2.resize(Scenes(size=64).read(3), (60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "in/upright.png")
    dino("segment", checkpoint, tmp_path / "in", "-o", "out")
    turned, upright = (read_mask(Path(f"out/labels/{name}.png")) for name in ("turned", "upright"))
    assert turned.shape == (60, 40)
    np.testing.assert_array_equal(turned, upright)


# -- resuming -------------------------------------------------------------------------------------------------------


def test_only_new_and_changed_images_are_segmented(dino, checkpoint: Path, images: Path) -> None:
    first = dino("segment", checkpoint, images, "-o", "out", "--formats", "yolo", "--json").json
    before = files_below(Path("out"))
    again = dino("segment", checkpoint, images, "-o", "out", "--formats", "yolo", "--json").json
    assert (first["segmented"], again["segmented"], again["unchanged"]) == (3, 0, 3)
    assert files_below(Path("out")) == before

    status = os.stat(images / "cat/1.png")
    shutil.copy(images / "cat/2.png", images / "cat/1.png")
    os.utime(images / "cat/1.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # found by its content
    shutil.copy(images / "dog/1.png", images / "dog/3.png")
    changed = dino("segment", checkpoint, images, "-o", "out", "--formats", "yolo", "--json").json
    assert (changed["segmented"], changed["unchanged"]) == (2, 2)
    after = files_below(Path("out"))
    same = {name for name in before if after[name] == before[name]}
    assert {"labels/cat/2.png", "labels/dog/1.png", "yolo/dog/1.txt", "settings.json"} <= same
    assert after["labels/cat/1.png"][1] == after["labels/cat/2.png"][1]
    assert after["yolo/cat/1.txt"][1] == after["yolo/cat/2.txt"][1]
    assert after["labels/dog/3.png"][1] == after["labels/dog/1.png"][1]

    (images / "dog/1.png").unlink()
    Path("out/labels/cat/2.png").unlink()
    again = dino("segment", checkpoint, images, "-o", "out", "--formats", "yolo", "--json").json
    assert (again["images"], again["segmented"]) == (3, 1)


def test_a_mask_is_that_of_the_image_that_has_its_name_now(dino, checkpoint: Path, images: Path) -> None:
    """Other folders with the same names, other spellings of a folder, and images that differ by their suffix only."""
    for folder in (images / "cat", images / "dog", images / "cat"):
        dino("segment", checkpoint, folder, "-o", "out", "--formats", "sheet")
        shape = cv2.imread(str(folder / "1.png")).shape[:2]
        assert read_mask(Path("out/labels/1.png")).shape == shape
    again = dino("segment", checkpoint, images / "dog/../cat", "-o", "out", "--json").json
    assert (again["segmented"], again["unchanged"]) == (0, 2)

    Image.open(images / "dog/1.png").save(images / "cat/1.bmp")
    dino("segment", checkpoint, images / "cat", "-o", "out")
    (images / "cat/1.bmp").rename("1.bmp")  # 1.png, which was 1-2.png, gets its name
    assert dino("segment", checkpoint, images / "cat", "-o", "out", "--json").json["segmented"] == 1
    Path("1.bmp").rename(images / "cat/1.bmp")
    assert dino("segment", checkpoint, images / "cat", "-o", "out", "--json").json["segmented"] == 1
    assert read_mask(Path("out/labels/1.png")).shape == (48, 32)


def test_an_interrupted_command_resumes(dino, checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = segment_folder._write_masks, []

    def interrupt(out: Path, item, *arguments) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(item.name)
        write(out, item, *arguments)

    monkeypatch.setattr(segment_folder, "_write_masks", interrupt)
    assert dino("segment", checkpoint, images, "-o", "out").code == 130
    monkeypatch.setattr(segment_folder, "_write_masks", write)
    assert dino("segment", checkpoint, images, "-o", "out", "--json").json["segmented"] == 1
    dino("segment", checkpoint, images, "-o", "whole")
    for name in ("cat/1", "cat/2", "dog/1"):
        assert Path(f"out/labels/{name}.png").read_bytes() == Path(f"whole/labels/{name}.png").read_bytes()


def test_other_settings_and_weights_are_refused_for_the_same_folder(dino, checkpoint: Path, images: Path) -> None:
    dino("segment", checkpoint, images, "-o", "out")
    other = dino("segment", checkpoint, images, "-o", "out", "--method", "lost", "--tau", "0.3")
    assert other.code == 2
    assert "method tokencut instead of lost, tau None instead of 0.3" in other.err
    assert "different --out" in other.err
    torch.manual_seed(1)
    save_backbone(NETWORK, NETWORK.build().state_dict(), Path("other.safetensors"))
    assert "the weights of" in dino("segment", "other.safetensors", images, "-o", "out").err


# -- bad input --------------------------------------------------------------------------------------------------------


def test_unusual_images(dino, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    scene = Scenes(size=64).read(0)
    for name, image in (
        ("tiny.png", scene[:3, :2]),
        ("one color.png", np.full((30, 40, 3), 200, np.uint8)),
        ("line.png", np.repeat(scene[:1], 79, 1)[:, :5000]),
        ("x\x1b[31m.png", scene),
    ):
        cv2.imwrite(str(folder / name), image)
    (folder / "broken.png").write_bytes((folder / "tiny.png").read_bytes()[:60])
    run = dino("segment", checkpoint, folder, "-o", "out")
    assert run.code == 0, run.err
    assert "empty mask: " in run.out
    assert "one color.png: the image has one color" in run.out
    assert "line.png: 5000 x 1 pixels: longer than 16 times" in run.out
    assert "broken.png" in run.out
    assert "\x1b[31m" not in run.out
    assert not read_mask(Path("out/labels/one color.png")).any()
    assert read_mask(Path("out/labels/tiny.png")).shape == (3, 2)
    assert sorted(path.name for path in Path("out/labels").iterdir()) == ["one color.png", "tiny.png", "x\\x1b[31m.png"]
    again = dino("segment", checkpoint, folder, "-o", "out", "--json").json
    assert (again["segmented"], again["unchanged"]) == (0, 3)
    assert [item["name"] for item in again["empty"]] == [f"{folder}/one color.png"]


def test_wrong_values_name_the_flag(dino, checkpoint: Path, images: Path) -> None:
    assert "--tau must be" in dino("segment", checkpoint, images, "--tau", "2").err
    head = dino("segment", checkpoint, images, "--method", "attention", "--attention-head", "5")
    assert "--attention-head must be in 0 .. 2" in head.err
    assert "not a head of" in dino("segment", checkpoint, images, "--head", checkpoint).err
    assert dino("segment", checkpoint).code == 2


# -- Python and heads -----------------------------------------------------------------------------------------------


def test_python_returns_what_the_command_writes(dino, checkpoint: Path, images: Path) -> None:
    dino("segment", checkpoint, images, "-o", "out", "--method", "attention", "--mass", "0.5")
    result = dino_ssl.segment(checkpoint, images / "cat/1.png", method="attention", mass=0.5)
    assert isinstance(result, dino_ssl.segmentation.masks.Segmentation)
    np.testing.assert_array_equal(result.labels, read_mask(Path("out/labels/cat/1.png")))
    assert result.masks.shape == (1, 40, 60)
    assert result.boxes.shape == (1, 4)
    everything = dino_ssl.segment(checkpoint, images, method="attention", mass=0.5)
    assert isinstance(everything, list)
    assert [each.masks.shape[1:] for each in everything if each] == [(40, 60), (40, 60), (48, 32)]
    assert repr(result).startswith("Segmentation(objects: 1, image: 60 x 40")


def test_without_refinement_masks_have_the_edges_of_patches(checkpoint: Path, images: Path) -> None:
    result = dino_ssl.segment(checkpoint, images / "dog/1.png", refine=False, size=32)
    cells = result.masks[0].reshape(6, 8, 4, 8)
    assert ((cells.mean((1, 3)) == 0) | (cells.mean((1, 3)) == 1)).all()


def test_a_head_writes_class_masks(dino, checkpoint: Path, images: Path) -> None:
    evaluation = weak_segmentation.WeakSegmentation(max_images=12, k=0)
    scenes = Scenes(count=12, size=32, classes=3)
    details = dino_ssl.evaluate(checkpoint, evaluation, scenes, scenes, out="heads", references=False)["details"]
    head = details["heads"]["true masks"]
    result = dino("segment", checkpoint, images, "--head", head, "-o", "out", "--formats", "coco", "classes", "--json")
    assert result.code == 0, result.err
    assert Path("out/classes.txt").read_text() == "star\nflower\ngear\n"
    labels = read_mask(Path("out/labels/cat/1.png"))
    assert labels.max() <= 3
    np.testing.assert_array_equal(labels, read_mask(Path("out/classes/cat/1.png")))
    network = dino_ssl.load(checkpoint)
    (found,) = Segmenter(network, SegmentSettings(head=head, refine=False))([Scenes(size=32).read(0)])
    assert all(name in ("star", "flower", "gear") for name in found.classes)
    assert all(found.numbers == [("star", "flower", "gear").index(str(name)) + 1 for name in found.classes])
    torch.manual_seed(1)
    other = NETWORK.build().eval()
    with pytest.raises(dino_ssl.UserError, match="trained on the features of other weights"):
        dino_ssl.segment(other, images / "cat/1.png", head=head)
