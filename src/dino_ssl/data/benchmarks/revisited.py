"""The revisited Oxford and Paris benchmarks (Radenovic et al., 2018): the official files, and one that is drawn.

A query is a box in a picture. For each, the database pictures are easy positives, hard positives, junk (the
landmark is hardly to be seen: neither right nor wrong), or negatives.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_ssl.data.benchmarks.plain_pickle import read_plain_pickle
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Image, Scenes
from dino_ssl.data.transforms.native_size import CroppedImages
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

LAYOUT = """\
  roxford5k/
    gnd_roxford5k.pkl      imlist, qimlist, and for each query bbx, easy, hard, junk (.json with the same fields, too)
    jpg/
      all_souls_000000.jpg ..."""


class Truth(NamedTuple):
    """One query's positives and junk, as numbers of database pictures."""

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


class GroundTruth(NamedTuple):
    """What a gnd file says."""

    database: list[str]
    queries: list[str]
    boxes: np.ndarray  # [Q, 4]: left, top, right, bottom in pixels
    truth: list[Truth]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all of it."""
        digest = hashlib.sha256(json.dumps([self.database, self.queries, self.boxes.tolist()]).encode())
        for lists in self.truth:
            digest.update(json.dumps([part.tolist() for part in lists]).encode())
        return digest.hexdigest()[:16]


class Landmarks(NamedTuple):
    """A benchmark of instance search: pictures, queries, and what is right."""

    name: str
    database: ImageDataset
    queries: ImageDataset
    """Whole; `boxed` are the same cut to their boxes."""
    boxed: ImageDataset
    ground_truth: GroundTruth


def open_revisited(path: str | Path, progress: Progress | None = None) -> Landmarks:
    """The benchmark of a folder that is laid out like the official ones, or of its gnd file.

    In a folder with several gnd files, the one whose pictures are all there.
    """
    place = Path(path).expanduser()
    files = _gnd_files(place)
    folder = place if place.is_dir() else place.parent
    jpg = folder / "jpg" if (folder / "jpg").is_dir() else folder
    dataset = Folder(path=str(jpg)).open(progress)
    number = {os.path.splitext(os.path.basename(name))[0]: i for i, name in enumerate(dataset.names)}
    read = {file: read_ground_truth(file) for file in files}
    missing = {f: [n for n in (*t.database, *t.queries) if n not in number] for f, t in read.items()}
    whole = [file for file in files if not missing[file]]
    if len(whole) != 1:
        raise UserError(_which(jpg, dataset, missing, whole))
    truth = read[whole[0]]
    database, queries = (dataset.subset([number[n] for n in names]) for names in (truth.database, truth.queries))
    return Landmarks(
        whole[0].stem.removeprefix("gnd_"), database, queries, _boxed(queries, truth.boxes, whole[0]), truth
    )


def _gnd_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"There is no {place}: expected a folder like this, or `scenes`:\n{LAYOUT}")
    found = sorted(file for suffix in ("pkl", "json") for file in place.glob(f"gnd_*.{suffix}"))
    if not found:
        inner = sorted({file.parent.name for file in place.glob("*/gnd_*")})
        hint = f"\nGive one of its folders: {', '.join(inner)}." if inner else ""
        raise UserError(f"{place} has no gnd_*.pkl or gnd_*.json. Expected:\n{LAYOUT}{hint}")
    return found


def _which(jpg: Path, dataset: ImageDataset, missing: dict[Path, list[str]], whole: list[Path]) -> str:
    if whole:
        return f"The pictures of several benchmarks are there. Give one of the files: {', '.join(map(str, whole))}."
    broken = {os.path.splitext(os.path.basename(name))[0]: reason for name, reason in dataset.skipped}
    lines = []
    for file, names in missing.items():
        shown = ", ".join(f"{name} ({broken[name]})" if name in broken else name for name in names[:3])
        lines.append(f"  {file.name}: {len(names)} of its pictures are missing or broken in {jpg}: {shown}, ...")
    listed = "\n".join(lines)
    return f"No benchmark is whole; a figure on fewer pictures would be another figure.\n{listed}\nExpected:\n{LAYOUT}"


def read_ground_truth(file: Path) -> GroundTruth:
    """A gnd file, .json or .pkl, checked; a pickle cannot run anything."""
    if file.suffix == ".json":
        try:
            data = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as JSON: {error}.") from error
    else:
        data = read_plain_pickle(file)
    try:
        database, queries = ([_stem(name) for name in data[key]] for key in ("imlist", "qimlist"))
        entries = list(data["gnd"])
        boxes = np.array([entry["bbx"] for entry in entries], dtype=np.float64).reshape(len(entries), 4)
        truth = [Truth(*(_numbers(entry[kind]) for kind in Truth._fields)) for entry in entries]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{file} is no ground truth of a revisited benchmark ({type(error).__name__}: {error}). Expected imlist, "
            "qimlist, and gnd with bbx, easy, hard and junk for every query; that of the benchmarks before they were "
            "revisited has ok instead of easy and hard."
        ) from error
    _check(file, database, queries, truth)
    return GroundTruth(database, queries, boxes, truth)


def _stem(name: Any) -> str:
    base = os.path.basename(str(name))
    stem, suffix = os.path.splitext(base)
    return stem if suffix.lower() in (".jpg", ".jpeg", ".png") else base


def _numbers(values: Any) -> np.ndarray:
    numbers = np.asarray(values).reshape(-1)
    if len(numbers) and not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"expected whole numbers, got {numbers[0]!r}")
    return numbers.astype(np.int64)


def _check(file: Path, database: list[str], queries: list[str], truth: list[Truth]) -> None:
    if not queries or len(queries) != len(truth):
        raise UserError(f"{file}: expected one entry of gnd for each query, got {len(truth)} for {len(queries)}.")
    for query, lists in zip(queries, truth, strict=True):
        numbers = np.concatenate(lists)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(database):
            raise UserError(
                f"{file}: {query} names pictures {numbers.min()} to {numbers.max()}; imlist has {len(database)}."
            )
        if len(np.unique(numbers)) != len(numbers):
            raise UserError(f"{file}: a picture is named twice in the lists of {query}; each is in one of them.")


def _boxed(queries: ImageDataset, boxes: np.ndarray, file: Path) -> ImageDataset:
    inside = CroppedImages(queries, boxes)
    area, kept = (np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, inside.boxes))
    if (bad := np.flatnonzero((kept < 1) | (kept < area / 2))).size:
        first = int(bad[0])
        width, height = queries.sizes[first]
        raise UserError(
            f"{file}: the box {boxes[first].tolist()} of {queries.names[first]} lies outside of the picture of "
            f"{width}x{height}. Boxes are in pixels of the benchmark's own files: take those, not smaller ones."
        )
    return inside


class DrawnInstances(ImageDataset):
    """Views of things of `Scenes`: (thing, view) for every picture."""

    def __init__(self, scenes: Scenes, items: list[tuple[int, int]]) -> None:
        names = [f"{scenes.name(i).removesuffix('.png')}-view{view}.png" for i, view in items]
        super().__init__(names=names, sizes=np.full((len(items), 2), scenes.size))
        self.scenes, self.items = scenes, items

    @property
    def content_key(self) -> str:
        drawn = self.scenes.open().content_key
        return hashlib.sha256(f"{drawn} {self.items}".encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256((super().fingerprint + self.scenes.open().fingerprint).encode()).hexdigest()[:16]

    def read(self, index: int) -> Image:
        return self.scenes.instance(*self.items[index])


VIEWS = 4  # of each thing in the drawn database
TURNED = math.radians(30)  # a positive turned by more than this against its query is hard
HIDDEN = 0.94  # a thing of which less than this part is to be seen, because something stands before it, is junk


def drawn(scenes: Scenes, progress: Progress | None = None) -> Landmarks:
    """Queries are things 0 .. count - 1, in a box; the database holds four other views of each, and as many things
    that nobody asks for."""
    things = range(scenes.count)
    items = [(thing, view) for thing in things for view in range(1, 1 + VIEWS)]
    database = DrawnInstances(scenes, items + [(scenes.count + thing, 0) for thing in things])
    queries = DrawnInstances(scenes, [(thing, 0) for thing in things])
    boxes, truth = [], []
    for thing in things:
        boxes.append(_box(scenes.draw(thing)[1] == 1))
        kinds = [_kind(scenes, thing, view) for view in range(1, 1 + VIEWS)]
        numbers = thing * VIEWS + np.arange(VIEWS)
        truth.append(Truth(*(numbers[[kind == k for kind in kinds]] for k in Truth._fields)))
        if progress is not None:
            progress(thing + 1, scenes.count)
    ground = GroundTruth(
        list(database.names), list(queries.names), np.array(boxes, dtype=np.float64).reshape(-1, 4), truth
    )
    return Landmarks("scenes", database, queries, CroppedImages(queries, ground.boxes), ground)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Around what the mask shows; the whole picture where it shows nothing."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _kind(scenes: Scenes, thing: int, view: int) -> str:
    """easy, hard or junk: by how far the thing is turned against view 0, and how much of it is to be seen."""
    before, now = (scenes.scene(thing, v).things[0][1] for v in (0, view))
    if (scenes.draw(thing, view)[1] == 1).mean() < HIDDEN * now.size**2:
        return "junk"
    turn = abs((now.turn - before.turn + math.pi) % (2 * math.pi) - math.pi)
    return "hard" if turn > TURNED else "easy"
