"""PASCAL VOC 2012, the segmentation set: images, and masks as indexed PNG (0 background, 1 .. 20 classes, 255 void)."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dino_ssl.data.benchmarks import read_split
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode
from dino_ssl.data.image_header import probe
from dino_ssl.data.masks import read_mask
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

LAYOUT = """\
Expected the layout of PASCAL VOC 2012:
  FOLDER/JPEGImages/2007_000033.jpg
  FOLDER/SegmentationClass/2007_000033.png
  FOLDER/ImageSets/Segmentation/{split}.txt
FOLDER is VOC2012, or the VOCdevkit above it, of http://host.robots.ox.ac.uk/pascal/VOC/voc2012"""

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Names of the classes 1 .. 20."""


@runtime_checkable
class Masked(Protocol):
    """Dataset with masks: `mask(i)` is uint8 [height, width], 0 background, 255 void, others objects."""

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of image `index`. Raises BadImage if it cannot be read."""
        ...


class VOC(ImageDataset):
    """Images of a split with their masks; an object is all pixels of a class in an image."""

    def __init__(self, folder: Path, names: list[str], sizes: list[tuple[int, int]]) -> None:
        super().__init__(names=names, sizes=sizes)
        self.folder = folder

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 RGB [height, width, 3]."""
        return decode(self.folder / "JPEGImages" / f"{self.names[index]}.jpg")

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of image `index`, uint8 [height, width]. Raises BadImage if it cannot be read."""
        path = self.folder / "SegmentationClass" / f"{self.names[index]}.png"
        mask = read_mask(path)
        width, height = self.sizes[index]
        if mask.shape != (height, width):
            raise BadImage(path, f"is {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}")
        return mask


def open_voc(path: str | Path, *, split: str = "val", progress: Progress | None = None) -> VOC:
    """Open the images of ImageSets/Segmentation/SPLIT.txt. Raises UserError if a file is missing."""
    root, layout = Path(path).expanduser(), LAYOUT.format(split=split)
    folders = [folder for folder in (root, root / "VOC2012", root / "VOCdevkit/VOC2012") if _is_voc(folder)]
    if not folders:
        raise UserError(f"{root} has no JPEGImages, SegmentationClass and ImageSets/Segmentation.\n{layout}")
    names = read_split(folders[0] / "ImageSets/Segmentation", split, layout)
    files = [file for name in names for file in (f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png")]
    if missing := [file for file in files if not (folders[0] / file).is_file()]:
        raise UserError(f"{folders[0]}: {len(missing)} files are missing, such as {', '.join(missing[:3])}.\n{layout}")
    sizes = []
    for done, name in enumerate(names, 1):
        sizes.append(probe(folders[0] / f"JPEGImages/{name}.jpg"))  # an unreadable image is an error: all are scored
        if progress is not None:
            progress(done, len(names))
    return VOC(folders[0], names, sizes)


def _is_voc(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"))
