"""Revisited Oxford and Paris (Radenovic et al., 2018): landmark retrieval in the official layout.

A query is a box in an image. The database images of each query are easy positives, hard positives, junk (the landmark
is hardly visible; ignored) or negatives.
"""

import hashlib
import io
import json
import os
import pickle
import re
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.transforms.native_size import CroppedImages
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

LAYOUT = """\
  roxford5k/
    gnd_roxford5k.pkl      imlist, qimlist, and bbx, easy, hard, junk of each query (or .json with the same fields)
    jpg/
      all_souls_000000.jpg ..."""


class Truth(NamedTuple):
    """Positives and junk of one query, as indices of database images."""

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


class GroundTruth(NamedTuple):
    """Content of a gnd file; `boxes` are [Q, 4]: left, top, right, bottom in pixels."""

    database: list[str]
    queries: list[str]
    boxes: np.ndarray
    truth: list[Truth]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the content."""
        truth = [[part.tolist() for part in lists] for lists in self.truth]
        content = json.dumps([self.database, self.queries, self.boxes.tolist(), truth])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Landmarks(NamedTuple):
    """Retrieval benchmark; `boxed` are the queries cropped to their boxes."""

    name: str
    database: ImageDataset
    queries: ImageDataset
    boxed: ImageDataset
    ground_truth: GroundTruth


def open_revisited(path: str | Path, progress: Progress | None = None) -> Landmarks:
    """Open the benchmark in a folder of the official layout, or of a gnd file.

    If the folder has several gnd files, the first one whose images all exist is used.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted([*path.glob("gnd_*.pkl"), *path.glob("gnd_*.json")])
    if not files:
        raise UserError(f"{path} has no gnd_*.pkl or gnd_*.json. Expected:\n{LAYOUT}")
    jpg = folder / "jpg" if (folder / "jpg").is_dir() else folder
    dataset = Folder(path=str(jpg)).open(progress)
    rows = {_stem(name): i for i, name in enumerate(dataset.names)}
    problems = []
    for file in files:
        truth = read_ground_truth(file)
        if missing := [name for name in (*truth.database, *truth.queries) if name not in rows]:
            problems.append(f"\n  {file.name}: {len(missing)} images, such as {', '.join(missing[:3])}")
            continue
        database, queries = (dataset.subset([rows[name] for name in names]) for names in truth[:2])
        boxed = _crop_queries(queries, truth.boxes, file)
        return Landmarks(file.stem.removeprefix("gnd_"), database, queries, boxed, truth)
    skipped = "".join(f"\n  {name}: {reason}" for name, reason in dataset.skipped[:3])
    raise UserError(
        f"Images that a gnd file lists are missing or broken in {jpg}; a score on fewer images is not comparable."
        f"{''.join(problems)}{skipped}\nExpected:\n{LAYOUT}"
    )


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers: a pickle could otherwise import and call any function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and could run any program")


def read_plain(file: Path) -> Any:
    """Return the content of a JSON file or of a pickle of plain data. Raises UserError for any other file."""
    try:
        data = file.read_bytes()
        if file.suffix == ".json":
            return json.loads(data)
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()  # latin1: strings of Python 2
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file} was not opened: {error or type(error).__name__}. Get the original file.") from error


def read_ground_truth(file: Path) -> GroundTruth:
    """Read and check a gnd file, .json or .pkl."""
    data = read_plain(file)
    try:
        database, queries = ([_stem(name) for name in data[key]] for key in ("imlist", "qimlist"))
        boxes = np.array([entry["bbx"] for entry in data["gnd"]], dtype=np.float64).reshape(-1, 4)
        kinds = [[[index(i) for i in entry[kind]] for kind in Truth._fields] for entry in data["gnd"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not a ground truth of a revisited benchmark ({type(error).__name__}: {error}). Expected "
            "imlist, qimlist, and gnd with bbx, easy, hard and junk (not ok, as the original benchmarks) of each query."
        ) from error
    truth = [Truth(*(np.array(indices, dtype=np.int64) for indices in lists)) for lists in kinds]
    if not queries or not len(queries) == len(truth) == len(boxes):
        raise UserError(f"{file}: expected one entry of gnd for each query, got {len(truth)} for {len(queries)}.")
    for query, lists in zip(queries, truth, strict=True):
        indices = np.concatenate(lists)
        if len(np.unique(indices)) != len(indices) or not np.isin(indices, np.arange(len(database))).all():
            raise UserError(
                f"{file}: expected different images of {len(database)} for {query}; got {indices.tolist()}."
            )
    return GroundTruth(database, queries, boxes, truth)


def _stem(name: Any) -> str:
    """Return the name of an image without folder and suffix, as in the lists of a gnd file."""
    return re.sub(r"\.(jpe?g|png)$", "", os.path.basename(str(name)), flags=re.IGNORECASE)


def _crop_queries(queries: ImageDataset, boxes: np.ndarray, file: Path) -> ImageDataset:
    boxed = CroppedImages(queries, boxes)
    area, inside = (np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, boxed.boxes))
    if outside := np.flatnonzero((inside < 1) | (inside < area / 2)).tolist():
        box = f"the box {boxes[outside[0]].tolist()} is outside of {queries.names[outside[0]]}"
        raise UserError(f"{file}: {box}. Boxes are in pixels of the original files; expected those, not resized ones.")
    return boxed
