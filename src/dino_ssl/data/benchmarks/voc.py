"""PASCAL VOC 2012's segmentation set, and what else has a mask for every picture.

    VOC2012/
      JPEGImages/2007_000033.jpg             the pictures
      SegmentationClass/2007_000033.png      indexed PNG: 0 background, 1 .. 20 the classes, 255 void
      SegmentationObject/2007_000033.png     the same, 1, 2, ... the objects of a picture
      ImageSets/Segmentation/val.txt         the names, one a line

Downloads unpack to VOCdevkit/VOC2012: any of these three folders may be given.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode, probe
from dino_ssl.data.masks import read_mask
from dino_ssl.errors import UserError, did_you_mean

Kind = Literal["class", "instance"]
FOLDERS: dict[Kind, str] = {"class": "SegmentationClass", "instance": "SegmentationObject"}
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

TREE = """\
Expected the layout of PASCAL VOC 2012:
  FOLDER/JPEGImages/2007_000033.jpg
  FOLDER/{masks}/2007_000033.png
  FOLDER/ImageSets/Segmentation/{split}.txt
FOLDER is VOC2012 (or the VOCdevkit that holds it) of http://host.robots.ox.ac.uk/pascal/VOC/voc2012"""


@runtime_checkable
class Masked(Protocol):
    """Pictures with a mask each: `mask(i)` is uint8 [height, width], 0 the ground, 255 void, else an object."""

    def mask(self, index: int) -> np.ndarray: ...


class VOC(ImageDataset):
    """The listed pictures with their masks."""

    def __init__(self, folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], kind: Kind) -> None:
        super().__init__(names=names, sizes=sizes)
        self.folder = folder
        self.kind: Kind = kind

    def read(self, index: int) -> np.ndarray:
        return decode(self.folder / "JPEGImages" / f"{self.names[index]}.jpg")

    def mask(self, index: int) -> np.ndarray:
        """uint8 [height, width] of picture `index`; raises BadImage where it cannot be read."""
        mask = read_mask(self.folder / FOLDERS[self.kind] / f"{self.names[index]}.png")
        if mask.shape[::-1] != tuple(self.sizes[index]):
            width, height = self.sizes[index]
            what = f"is {mask.shape[1]}x{mask.shape[0]}, and its picture is {width}x{height}"
            raise BadImage(self.folder / FOLDERS[self.kind] / f"{self.names[index]}.png", what)
        return mask

    @property
    def fingerprint(self) -> str:
        """The kind of masks goes in as well; their pixels do not."""
        return hashlib.sha256(f"{super().fingerprint} {self.kind}".encode()).hexdigest()[:16]


def open_voc(
    path: str | Path, *, split: str = "val", kind: Kind = "class", progress: Callable[[int, int], None] | None = None
) -> VOC:
    """The pictures of ImageSets/Segmentation/SPLIT.txt; every file is looked for, and every picture's size read."""
    folder = _home(Path(path).expanduser(), kind, split)
    names = (folder / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    missing = [
        file
        for name in names
        for file in (f"JPEGImages/{name}.jpg", f"{FOLDERS[kind]}/{name}.png")
        if not (folder / file).is_file()
    ]
    if missing or not names:
        shown = "".join(f"\n  {file}" for file in missing[:5])
        what = f"{len(missing)} files are not there, among them:{shown}" if missing else "the list is empty."
        raise UserError(f"{folder} does not hold what its {split}.txt names: {what}\n{_tree(kind, split)}")
    sizes = []
    for done, name in enumerate(names, 1):
        try:
            sizes.append(probe(folder / f"JPEGImages/{name}.jpg"))
        except BadImage as bad:
            raise UserError(f"A picture of the benchmark cannot be read: {bad}\nCopy it again.") from bad
        if progress is not None:
            progress(done, len(names))
    return VOC(folder, names, sizes, kind)


def _home(path: Path, kind: Kind, split: str) -> Path:
    """The folder that holds JPEGImages, of the three that a person may name."""
    if not path.is_dir():
        raise UserError(f"There is no folder {path}.\n{_tree(kind, split)}")
    found = [folder for folder in (path, path / "VOC2012", path / "VOCdevkit/VOC2012") if _holds(folder)]
    if not found:
        raise UserError(f"{path} has no JPEGImages beside ImageSets/Segmentation.\n{_tree(kind, split)}")
    folder = found[0]
    if not (folder / FOLDERS[kind]).is_dir():
        other = {"class": "instance", "instance": "class"}[kind]
        hint = f"\nIt has {FOLDERS[other]}: objects={other!r} (--objects {other})."  # type: ignore[index]
        has_other = (folder / FOLDERS[other]).is_dir()  # type: ignore[index]
        raise UserError(f"{folder} has no {FOLDERS[kind]}.{hint if has_other else ''}\n{_tree(kind, split)}")
    lists = sorted(file.stem for file in (folder / "ImageSets/Segmentation").glob("*.txt"))
    if split not in lists:
        raise UserError(
            f"{folder} has no ImageSets/Segmentation/{split}.txt{did_you_mean(split, lists)}\n"
            f"Lists there: {', '.join(lists) or 'none'}.\n{_tree(kind, split)}"
        )
    return folder


def _holds(folder: Path) -> bool:
    return (folder / "JPEGImages").is_dir() and (folder / "ImageSets/Segmentation").is_dir()


def _tree(kind: Kind, split: str) -> str:
    return TREE.format(masks=FOLDERS[kind], split=split)
