"""Synthetic retrieval benchmark in the form of the revisited ones: views of the objects of `Scenes`."""

import math

import numpy as np

from dino_ssl.data.benchmarks.revisited import GroundTruth, Landmarks, Truth
from dino_ssl.data.synthetic.scenes import Scenes, SyntheticDataset
from dino_ssl.data.transforms.native_size import CroppedImages
from dino_ssl.progress import Progress

VIEWS = 4  # database images of each query's object
MAX_EASY_TURN = math.radians(30)  # positives that are rotated further relative to the query are hard
MIN_VISIBLE = 0.94  # objects of which a smaller share is visible, because of occlusion, are junk


def synthetic_landmarks(scenes: Scenes, progress: Progress | None = None) -> Landmarks:
    """Return a benchmark with boxed queries of objects 0 .. count - 1.

    The database holds four other views of each, and as many other objects as distractors.
    """
    objects, views = range(scenes.count), range(1, 1 + VIEWS)
    distractors = [(scenes.count + i, 0) for i in objects]
    database = SyntheticDataset(scenes, [(i, view) for i in objects for view in views] + distractors)
    queries = scenes.open()
    boxes, truth = [], []
    for i in objects:
        rows, columns = np.nonzero(scenes.mask(i))
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        difficulties = np.array([_difficulty(scenes, i, view) for view in views])
        truth.append(Truth(*(i * VIEWS + np.flatnonzero(difficulties == name) for name in Truth._fields)))
        if progress is not None:
            progress(i + 1, scenes.count)
    box_array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    ground_truth = GroundTruth(list(database.names), list(queries.names), box_array, truth)
    return Landmarks("scenes", database, queries, CroppedImages(queries, box_array), ground_truth)


def _difficulty(scenes: Scenes, i: int, view: int) -> str:
    """Return easy, hard or junk by the object's rotation relative to view 0 and its visible share."""
    before, now = (scenes.scene(i, v).object.pose for v in (0, view))
    if scenes.draw(i, view)[1].mean() < MIN_VISIBLE * now.size**2:
        return "junk"
    turn = abs((now.turn - before.turn + math.pi) % (2 * math.pi) - math.pi)
    return "hard" if turn > MAX_EASY_TURN else "easy"
