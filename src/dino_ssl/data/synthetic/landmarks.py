"""Synthetic retrieval benchmark in the form of the revisited ones: views of the objects of `Scenes`."""

import hashlib
import math

import numpy as np

from dino_ssl.data.benchmarks.revisited import GroundTruth, Landmarks, Truth
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.synthetic.scenes import Image, Scenes
from dino_ssl.data.transforms.native_size import CroppedImages
from dino_ssl.progress import Progress

VIEWS = 4  # database images of each query's object
MAX_EASY_TURN = math.radians(30)  # positives that are rotated further relative to the query are hard
MIN_VISIBLE = 0.94  # objects of which a smaller share is visible, because of occlusion, are junk


class SyntheticInstances(ImageDataset):
    """Images (object, view) of `Scenes`."""

    def __init__(self, scenes: Scenes, items: list[tuple[int, int]]) -> None:
        names = [f"{scenes.name(i).removesuffix('.png')}-view{view}.png" for i, view in items]
        super().__init__(names=names, sizes=np.full((len(items), 2), scenes.size))
        self.scenes, self.items = scenes, items

    @property
    def content_key(self) -> str:
        """Key over the scenes and the items."""
        return hashlib.sha256(f"{self.scenes.open().content_key} {self.items}".encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, sizes and the scenes."""
        return hashlib.sha256((super().fingerprint + self.scenes.open().fingerprint).encode()).hexdigest()[:16]

    def read(self, index: int) -> Image:
        """Return image `index`, uint8 RGB [s, s, 3]."""
        return self.scenes.draw(*self.items[index])[0]


def synthetic_landmarks(scenes: Scenes, progress: Progress | None = None) -> Landmarks:
    """Return a benchmark with boxed queries of objects 0 .. count - 1.

    The database holds four other views of each, and as many other objects as distractors.
    """
    objects = range(scenes.count)
    items = [(i, view) for i in objects for view in range(1, 1 + VIEWS)]
    database = SyntheticInstances(scenes, items + [(scenes.count + i, 0) for i in objects])
    queries = SyntheticInstances(scenes, [(i, 0) for i in objects])
    boxes, truth = [], []
    for i in objects:
        boxes.append(_bounding_box(scenes.mask(i) == 1))
        kinds = [_difficulty(scenes, i, view) for view in range(1, 1 + VIEWS)]
        indices = i * VIEWS + np.arange(VIEWS)
        truth.append(Truth(*(indices[[kind == k for kind in kinds]] for k in Truth._fields)))
        if progress is not None:
            progress(i + 1, scenes.count)
    box_array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    ground_truth = GroundTruth(list(database.names), list(queries.names), box_array, truth)
    return Landmarks("scenes", database, queries, CroppedImages(queries, box_array), ground_truth)


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a mask; the complete image if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _difficulty(scenes: Scenes, i: int, view: int) -> str:
    """Return easy, hard or junk by the object's rotation relative to view 0 and its visible share."""
    before, now = (scenes.scene(i, v).objects[0][1] for v in (0, view))
    if (scenes.draw(i, view)[1] == 1).mean() < MIN_VISIBLE * now.size**2:
        return "junk"
    turn = abs((now.turn - before.turn + math.pi) % (2 * math.pi) - math.pi)
    return "hard" if turn > MAX_EASY_TURN else "easy"
