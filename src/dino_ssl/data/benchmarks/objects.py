"""Benchmarks of unsupervised object discovery: images with boxes (PASCAL VOC, COCO 20k) or with masks (saliency).

Boxes are float64 [n, 4]: left, top, right, bottom in pixels, right and bottom excluded.
"""

import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dino_ssl.data.benchmarks import read_split
from dino_ssl.data.benchmarks.voc import LAYOUT as VOC_MASKS
from dino_ssl.data.benchmarks.voc import Masked, open_voc
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode
from dino_ssl.data.folder import walk
from dino_ssl.data.image_header import probe
from dino_ssl.data.masks import BACKGROUND, VOID, read_gray
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

LAYOUT = """\
Expected one of these layouts:
  PASCAL VOC 2007 or 2012 with boxes: JPEGImages/, Annotations/ and ImageSets/Main/{split}.txt
  COCO 20k: annotations/instances_train2014.json, train2014/, and the list coco_20k_filenames.txt of LOST
  saliency: a folder of images and one of masks with the same names; their names as in ECSSD (images,
    ground_truth_mask), DUTS (DUTS-TE-Image, DUTS-TE-Mask), DUT-OMRON (DUT-OMRON-image, pixelwiseGT-new-PNG), or
    img, gt
  PASCAL VOC 2012 with masks (split train or val): JPEGImages/, SegmentationClass/, ImageSets/Segmentation/"""
SALIENCY = (
    ("images", "ground_truth_mask"),
    ("DUTS-TE-Image", "DUTS-TE-Mask"),
    ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
    ("img", "gt"),
)
"""Folders of images and of their masks."""
COCO_LIST, COCO_ANNOTATIONS = "coco_20k_filenames.txt", "annotations/instances_train2014.json"


@runtime_checkable
class Boxed(Protocol):
    """Dataset with true boxes."""

    def boxes(self, index: int) -> np.ndarray:
        """Return the boxes of image `index`, float64 [n, 4]."""
        ...


class BenchmarkImages(ImageDataset):
    """Image files of a benchmark, all of which must be readable; `benchmark` is its name if it is a published set."""

    benchmark = ""

    def __init__(self, files: Sequence[Path], names: Sequence[str], progress: Progress | None) -> None:
        sizes = []
        for done, file in enumerate(files, 1):
            sizes.append(probe(file))
            if progress is not None:
                progress(done, len(files))
        super().__init__(names=names, sizes=sizes)
        self.files = list(files)

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 RGB [height, width, 3]."""
        return decode(self.files[index])


class BoxedImages(BenchmarkImages):
    """Images with true boxes."""

    def __init__(
        self, files: Sequence[Path], names: Sequence[str], boxes: Sequence[np.ndarray], progress: Progress | None
    ) -> None:
        super().__init__(files, names, progress)
        self._boxes = list(boxes)

    def boxes(self, index: int) -> np.ndarray:
        """Return the boxes of image `index`, float64 [n, 4]."""
        return self._boxes[index]


class SalientImages(BenchmarkImages):
    """Images with a mask of what is salient, a PNG each."""

    def __init__(self, files: Sequence[Path], masks: Sequence[Path], progress: Progress | None) -> None:
        super().__init__(files, [file.name for file in files], progress)
        self.masks = list(masks)

    def mask(self, index: int) -> np.ndarray:
        """Return 1 on salient pixels, uint8 [height, width], which any gray level but black marks."""
        mask = (read_gray(self.masks[index]) > 0).astype(np.uint8)
        width, height = self.sizes[index]
        if mask.shape != (height, width):
            raise BadImage(self.masks[index], f"is {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}")
        return mask


def open_objects(path: str | Path, *, split: str = "trainval", progress: Progress | None = None) -> ImageDataset:
    """Open a benchmark of object discovery or saliency by its layout; it is `Boxed`, `Masked` or both.

    Raises UserError, with the layouts, if there is none, or if files are missing.
    """
    root, layout = Path(path).expanduser().absolute(), LAYOUT.format(split=split)  # its name is that of the benchmark
    for folder in (root, root / "VOC2007", root / "VOC2012", root / "VOCdevkit/VOC2007", root / "VOCdevkit/VOC2012"):
        if (folder / "Annotations").is_dir() and (folder / "ImageSets/Main").is_dir():
            return _open_voc_boxes(folder, split, layout, progress)
    if (root / COCO_ANNOTATIONS).is_file():
        return _open_coco20k(root, layout, progress)
    for images, masks in SALIENCY:
        if (root / images).is_dir() and (root / masks).is_dir():
            return _open_saliency(root / images, root / masks, progress)
    if any((folder / "SegmentationClass").is_dir() for folder in (root, root / "VOC2012", root / "VOCdevkit/VOC2012")):
        return open_voc(root, split="val" if split == "trainval" else split, progress=progress)
    raise UserError(f"{root} is no benchmark of object discovery.\n{layout}\n{VOC_MASKS.format(split='val')}")


def boxes_of(dataset: ImageDataset, index: int) -> np.ndarray:
    """Return the true boxes of an image, [n, 4]: its own, or the one around each object of its mask."""
    if isinstance(dataset, Boxed):
        return dataset.boxes(index)
    assert isinstance(dataset, Masked)
    mask, boxes = dataset.mask(index), []
    for number in np.setdiff1d(mask, (BACKGROUND, VOID)):
        rows, columns = np.nonzero(mask == number)
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _open_voc_boxes(folder: Path, split: str, layout: str, progress: Progress | None) -> BoxedImages:
    names = read_split(folder / "ImageSets/Main", split, layout)
    files = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
    annotations = [folder / "Annotations" / f"{name}.xml" for name in names]
    _require([*files, *annotations], layout)
    dataset = BoxedImages(files, names, [read_voc_boxes(path) for path in annotations], progress)
    if split == "trainval":
        dataset.benchmark = {"VOC2007": "VOC07", "VOC2012": "VOC12"}.get(folder.name, "")
    return dataset


def read_voc_boxes(path: Path) -> np.ndarray:
    """Return the boxes of all objects in an annotation of PASCAL VOC, [n, 4]; its pixels count from 1, to the last."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
        boxes = [
            [float(o.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")] for o in objects
        ]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is not an annotation of PASCAL VOC: {error}.") from error
    return np.array(boxes, dtype=np.float64).reshape(-1, 4) - (1, 1, 0, 0)


def _open_coco20k(root: Path, layout: str, progress: Progress | None) -> BoxedImages:
    lists = [path for path in (root / COCO_LIST, root / "annotations" / COCO_LIST) if path.is_file()]
    if not lists:
        raise UserError(f"{root} has no {COCO_LIST}, the list of the images of COCO 20k.\n{layout}")
    names = [Path(line).name for line in lists[0].read_text().split()]
    folders = [root / folder for folder in ("train2014", "images/train2014") if (root / folder).is_dir()]
    files = [(folders[0] if folders else root / "train2014") / name for name in names]
    _require(files, layout)
    try:
        annotations: Any = json.loads((root / COCO_ANNOTATIONS).read_text(encoding="utf-8"))
        numbers = {image["file_name"]: image["id"] for image in annotations["images"]}
        boxes = defaultdict[int, list[list[float]]](list)
        for annotation in annotations["annotations"]:
            if not annotation["iscrowd"]:
                left, top, width, height = annotation["bbox"]
                boxes[annotation["image_id"]].append([left, top, left + width, top + height])
        rounded = [np.rint(np.array(boxes[numbers[name]], np.float64).reshape(-1, 4)) for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / COCO_ANNOTATIONS} does not describe these images: {error!r}.\n{layout}") from error
    dataset = BoxedImages(files, names, rounded, progress)
    dataset.benchmark = "COCO20k"
    return dataset


def _open_saliency(images: Path, masks: Path, progress: Progress | None) -> SalientImages:
    files = [Path(file) for file in walk(images)]
    if not files:
        raise UserError(f"There are no images in {images}.")
    paths = [masks / f"{file.stem}.png" for file in files]
    _require(paths, "Each image needs a mask with its name and the suffix .png.")
    dataset = SalientImages(files, paths, progress)
    root = images.parent.name.upper()
    dataset.benchmark = next((name for name in ("ECSSD", "DUTS", "DUT-OMRON") if name in root), "")
    return dataset


def _require(files: Sequence[Path], layout: str) -> None:
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"{len(missing)} files are missing, such as {', '.join(missing[:3])}.\n{layout}")
