"""PASCAL VOC 2012, the segmentation set.

    VOC2012/
      JPEGImages/2007_000033.jpg             images
      SegmentationClass/2007_000033.png      indexed PNG: 0 background, 1 .. 20 classes, 255 void
      SegmentationObject/2007_000033.png     the same with 1, 2, ... for the objects of an image
      ImageSets/Segmentation/val.txt         names, one per line

The archives unpack to VOCdevkit/VOC2012; each of these three folders is accepted.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode, probe
from dino_ssl.data.masks import read_mask
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.progress import Progress

Kind = Literal["class", "instance"]
FOLDERS: dict[Kind, str] = {"class": "SegmentationClass", "instance": "SegmentationObject"}
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LAYOUT = """\
Expected the layout of PASCAL VOC 2012:
  FOLDER/JPEGImages/2007_000033.jpg
  FOLDER/{masks}/2007_000033.png
  FOLDER/ImageSets/Segmentation/{split}.txt
FOLDER is VOC2012, or the VOCdevkit above it, of http://host.robots.ox.ac.uk/pascal/VOC/voc2012"""


@runtime_checkable
class Masked(Protocol):
    """Dataset with masks: `mask(i)` is uint8 [height, width], 0 background, 255 void, others objects."""

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of image `index`. Raises BadImage if it cannot be read."""
        ...


class VOC(ImageDataset):
    """Images of a split with their masks."""

    def __init__(self, folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], kind: Kind) -> None:
        super().__init__(names=names, sizes=sizes)
        self.folder = folder
        self.kind: Kind = kind

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 RGB [height, width, 3]."""
        return decode(self.folder / "JPEGImages" / f"{self.names[index]}.jpg")

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of image `index`, uint8 [height, width]. Raises BadImage if it cannot be read."""
        path = self.folder / FOLDERS[self.kind] / f"{self.names[index]}.png"
        mask = read_mask(path)
        width, height = self.sizes[index]
        if mask.shape != (height, width):
            raise BadImage(path, f"is {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}")
        return mask

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the images and the kind of masks, but not the pixels of the masks."""
        return hashlib.sha256(f"{super().fingerprint} {self.kind}".encode()).hexdigest()[:16]


def open_voc(path: str | Path, *, split: str = "val", kind: Kind = "class", progress: Progress | None = None) -> VOC:
    """Open the images of ImageSets/Segmentation/SPLIT.txt. Raises UserError if a file is missing."""
    layout = LAYOUT.format(masks=FOLDERS[kind], split=split)
    folder = _find_root(Path(path).expanduser(), kind, layout)
    lists = sorted(file.stem for file in (folder / "ImageSets/Segmentation").glob("*.txt"))
    if split not in lists:
        raise UserError(
            f"{folder} has no ImageSets/Segmentation/{split}.txt{did_you_mean(split, lists)}\n"
            f"Lists: {', '.join(lists) or 'none'}.\n{layout}"
        )
    names = (folder / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    files = [file for name in names for file in (f"JPEGImages/{name}.jpg", f"{FOLDERS[kind]}/{name}.png")]
    if missing := [file for file in files if not (folder / file).is_file()]:
        examples = "".join(f"\n  {file}" for file in missing[:5])
        raise UserError(f"{folder}: {len(missing)} files are missing, among them:{examples}\n{layout}")
    if not names:
        raise UserError(f"{folder}: the list {split}.txt is empty.\n{layout}")
    sizes = []
    for done, name in enumerate(names, 1):
        sizes.append(probe(folder / f"JPEGImages/{name}.jpg"))  # every image is scored: an unreadable one is an error
        if progress is not None:
            progress(done, len(names))
    return VOC(folder, names, sizes, kind)


def _find_root(path: Path, kind: Kind, layout: str) -> Path:
    if not path.is_dir():
        raise UserError(f"There is no folder {path}.\n{layout}")
    for folder in (path, path / "VOC2012", path / "VOCdevkit/VOC2012"):
        if (folder / "JPEGImages").is_dir() and (folder / "ImageSets/Segmentation").is_dir():
            break
    else:
        raise UserError(f"{path} has no JPEGImages and ImageSets/Segmentation.\n{layout}")
    if not (folder / FOLDERS[kind]).is_dir():
        others = [f"{name}: `objects` {k}" for k, name in FOLDERS.items() if (folder / name).is_dir()]
        hint = f"\nIt has {others[0]}." if others else ""
        raise UserError(f"{folder} has no {FOLDERS[kind]}.{hint}\n{layout}")
    return folder
