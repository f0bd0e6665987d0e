"""Revisited Oxford and Paris (Radenovic et al., 2018): landmark retrieval in the official layout.

A query is a box in an image. The database images of each query are easy positives, hard positives, junk (the landmark
is hardly visible; ignored) or negatives.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_ssl.data.benchmarks.plain_pickle import read_plain_pickle
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
        digest = hashlib.sha256(json.dumps([self.database, self.queries, self.boxes.tolist()]).encode())
        for lists in self.truth:
            digest.update(json.dumps([part.tolist() for part in lists]).encode())
        return digest.hexdigest()[:16]


class Landmarks(NamedTuple):
    """Retrieval benchmark; `boxed` are the queries cropped to their boxes."""

    name: str
    database: ImageDataset
    queries: ImageDataset
    boxed: ImageDataset
    ground_truth: GroundTruth


def open_revisited(path: str | Path, progress: Progress | None = None) -> Landmarks:
    """Open the benchmark in a folder of the official layout, or of a gnd file.

    If the folder has several gnd files, the one whose images all exist is used.
    """
    path = Path(path).expanduser()
    files = _gnd_files(path)
    folder = path if path.is_dir() else path.parent
    jpg = folder / "jpg" if (folder / "jpg").is_dir() else folder
    dataset = Folder(path=str(jpg)).open(progress)
    index = {_stem_of(name): i for i, name in enumerate(dataset.names)}
    truths = {file: read_ground_truth(file) for file in files}
    missing = {f: [n for n in (*t.database, *t.queries) if n not in index] for f, t in truths.items()}
    complete = [file for file in files if not missing[file]]
    if len(complete) > 1:
        raise UserError(f"{jpg} has the images of several benchmarks. Pass one of: {', '.join(map(str, complete))}.")
    if not complete:
        raise UserError(_describe_missing(jpg, dataset, missing))
    file, truth = complete[0], truths[complete[0]]
    database, queries = (dataset.subset([index[name] for name in names]) for names in (truth.database, truth.queries))
    boxed = _crop_queries(queries, truth.boxes, file)
    return Landmarks(file.stem.removeprefix("gnd_"), database, queries, boxed, truth)


def _gnd_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"There is no {path}. Expected a folder of this layout, or `scenes`:\n{LAYOUT}")
    if files := sorted(file for suffix in ("pkl", "json") for file in path.glob(f"gnd_*.{suffix}")):
        return files
    below = sorted({file.parent.name for file in path.glob("*/gnd_*")})
    hint = f"\nPass one of its folders: {', '.join(below)}." if below else ""
    raise UserError(f"{path} has no gnd_*.pkl or gnd_*.json. Expected:\n{LAYOUT}{hint}")


def _describe_missing(jpg: Path, dataset: ImageDataset, missing: dict[Path, list[str]]) -> str:
    reasons = {_stem_of(name): reason for name, reason in dataset.skipped}
    lines = ["Every gnd file lists images that are missing or broken; a score on fewer images is not comparable."]
    for file, names in missing.items():
        examples = ", ".join(f"{name} ({reasons[name]})" if name in reasons else name for name in names[:3])
        lines.append(f"  {file.name}: {len(names)} images are missing or broken in {jpg}: {examples}, ...")
    return "\n".join([*lines, "Expected:", LAYOUT])


def read_ground_truth(file: Path) -> GroundTruth:
    """Read and check a gnd file, .json or .pkl; a pickle cannot run code."""
    if file.suffix == ".json":
        try:
            data = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as JSON: {error}.") from error
    else:
        data = read_plain_pickle(file)
    try:
        database, queries = ([_image_stem(name) for name in data[key]] for key in ("imlist", "qimlist"))
        entries = list(data["gnd"])
        boxes = np.array([entry["bbx"] for entry in entries], dtype=np.float64).reshape(len(entries), 4)
        truth = [Truth(*(_indices(entry[kind]) for kind in Truth._fields)) for entry in entries]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{file} is not a ground truth of a revisited benchmark ({type(error).__name__}: {error}). Expected "
            "imlist, qimlist, and gnd with bbx, easy, hard and junk of each query. The original benchmarks have ok "
            "instead of easy and hard."
        ) from error
    if not queries or len(queries) != len(truth):
        raise UserError(f"{file}: expected one entry of gnd for each query, got {len(truth)} for {len(queries)}.")
    for query, lists in zip(queries, truth, strict=True):
        indices = np.concatenate(lists)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(database):
            got = f"{query} lists images {indices.min()} to {indices.max()}"
            raise UserError(f"{file}: {got}; imlist has {len(database)}.")
        if len(np.unique(indices)) != len(indices):
            raise UserError(f"{file}: an image is listed twice for {query}; expected it in one list only.")
    return GroundTruth(database, queries, boxes, truth)


def _stem_of(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _image_stem(name: Any) -> str:
    stem, suffix = os.path.splitext(os.path.basename(str(name)))
    return stem if suffix.lower() in (".jpg", ".jpeg", ".png") else stem + suffix


def _indices(values: Any) -> np.ndarray:
    indices = np.asarray(values).reshape(-1)
    if len(indices) and not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"expected integers, got {indices[0]!r}")
    return indices.astype(np.int64)


def _crop_queries(queries: ImageDataset, boxes: np.ndarray, file: Path) -> ImageDataset:
    boxed = CroppedImages(queries, boxes)
    area, inside = (np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, boxed.boxes))
    if (bad := np.flatnonzero((inside < 1) | (inside < area / 2))).size:
        first = int(bad[0])
        width, height = queries.sizes[first]
        raise UserError(
            f"{file}: the box {boxes[first].tolist()} is outside of {queries.names[first]}, which has {width}x{height} "
            "pixels. Boxes are in pixels of the original files; expected those files, not resized ones."
        )
    return boxed
