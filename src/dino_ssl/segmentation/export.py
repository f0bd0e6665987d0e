"""Files of masks for other tools: class maps, COCO, labelme, YOLO. All are made from label maps of objects.

Coordinates are those of the image as viewed, after its EXIF orientation.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from dino_ssl.data.masks import VOID, read_mask, write_mask
from dino_ssl.errors import import_extra
from dino_ssl.files import atomic_write, write_json

OBJECT = "object"
"""Name of objects without a class."""
LABELME_VERSION = "5.5.0"


class FoundObject(NamedTuple):
    """An object in a label map."""

    number: int
    """Its label."""
    score: float
    class_name: str | None


@dataclass(frozen=True)
class Annotated:
    """The mask file of an image, with what its objects are."""

    name: str
    """The image as listed in its dataset: a path below the folder."""
    stem: str
    """Path of its files below the folder of a format, without suffix."""
    source: Path | None
    """The image file; None if there is none."""
    labels: Path
    """The indexed PNG with the numbers of the objects."""
    found: Sequence[FoundObject]

    def read(self) -> np.ndarray:
        """Return the label map, uint8 [H, W]."""
        return read_mask(self.labels)


def class_index(found: FoundObject, classes: Sequence[str]) -> int:
    """Return the index of an object's class; 0 for objects without classes."""
    return 0 if found.class_name is None or not classes else classes.index(found.class_name)


def write_class_map(path: Path, item: Annotated, classes: Sequence[str]) -> Path:
    """Write the objects of an image as an indexed PNG of classes: 0 the background, i + 1 the class classes[i]."""
    table = np.zeros(256, np.uint8)
    for found in item.found:
        table[found.number] = min(class_index(found, classes) + 1, VOID - 1)
    return write_mask(path, table[item.read()])


def write_labelme(path: Path, item: Annotated, classes: Sequence[str]) -> Path:
    """Write the objects as polygons in the JSON of labelme; the regions of an object have one group_id."""
    labels = item.read()
    height, width = labels.shape
    source = item.name if item.source is None else os.path.relpath(item.source.absolute(), path.parent.absolute())
    shapes = [
        {
            "label": found.class_name or OBJECT,
            "points": polygon.tolist(),
            "group_id": found.number,
            "shape_type": "polygon",
            "flags": {},
        }
        for found in item.found
        for polygon in polygons(labels == found.number)
    ]
    data = {"version": LABELME_VERSION, "flags": {}, "shapes": shapes, "imagePath": source, "imageData": None}
    return write_json(path, {**data, "imageHeight": height, "imageWidth": width})


def polygons(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the outline of each region of a bool mask, float [n, 2] x, y, to half a pixel; holes are omitted."""
    outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for outline in outlines:
        points = cv2.approxPolyDP(outline, 0.5, True)[:, 0]
        if len(points) >= 3:
            yield points + 0.5  # centers of the pixels


def write_yolo(path: Path, item: Annotated, classes: Sequence[str]) -> Path:
    """Write one line per object: class, and the box's center x, y, width and height as fractions of the image."""
    labels = item.read()
    height, width = labels.shape
    lines = []
    for found in item.found:
        left, top, w, h = cv2.boundingRect((labels == found.number).view(np.uint8))
        center = (left + w / 2) / width, (top + h / 2) / height
        values = " ".join(f"{value:.6f}" for value in (*center, w / width, h / height))
        lines.append(f"{class_index(found, classes)} {values}")
    return atomic_write(path, lambda part: part.write_text("".join(f"{line}\n" for line in lines)))


def write_coco(path: Path, items: Iterable[Annotated], classes: Sequence[str]) -> Path:
    """Write a COCO file: images, annotations (RLE, area, box, score), categories. Needs pycocotools."""
    coco_mask = require_pycocotools()

    def annotations(number: int, item: Annotated, labels: np.ndarray) -> Iterator[dict[str, Any]]:
        for found in item.found:
            code = coco_mask.encode(np.asfortranarray(labels == found.number, dtype=np.uint8))
            area, box = int(coco_mask.area(code)), coco_mask.toBbox(code).tolist()
            yield {
                "id": 256 * number + found.number,
                "image_id": number,
                "category_id": class_index(found, classes) + 1,
                "iscrowd": 0,
                "segmentation": {**code, "counts": code["counts"].decode()},
                "area": area,
                "bbox": box,
                "score": found.score,
            }

    def write(part: Path) -> None:
        images: list[str] = []
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write('{"info": {"description": "Objects found without labels, by dino segment"},\n"annotations": [')
            separator = "\n"
            for number, item in enumerate(items, 1):
                labels = item.read()
                height, width = labels.shape
                images.append(_json({"id": number, "file_name": item.name, "width": width, "height": height}))
                for annotation in annotations(number, item, labels):
                    file.write(f"{separator}{_json(annotation)}")
                    separator = ",\n"
            categories = [_json({"id": i, "name": name}) for i, name in enumerate(classes or (OBJECT,), 1)]
            file.write('],\n"images": [\n' + ",\n".join(images))
            file.write('],\n"categories": [\n' + ",\n".join(categories) + "]}\n")

    return atomic_write(path, write)


def require_pycocotools() -> Any:
    """Return `pycocotools.mask`. Raises UserError if it is not installed."""
    return import_extra("pycocotools.mask", "segmentation")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
