"""What the command line does, as Python calls: train, evaluate, embed, attention. `dino.load` is the fifth.

run = dino.train("photos", minutes=30)
backbone = dino.load(run.folder)
features = dino.embed(backbone, "photos").features
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino import dist
from dino.analysis.attention import Attention, Query, attend, saliency
from dino.config import edit
from dino.data.folder import Folder
from dino.data.pictures import Pictures, Skipped
from dino.data.scenes import Scenes
from dino.errors import UserError
from dino.evals.evaluator import extract
from dino.evals.knn import KS, accuracy_of, raw_pixels, untrained
from dino.files import write_json
from dino.models import Timm
from dino.models.backbone import Attentive, Backbone
from dino.presets import resolve
from dino.runtime import machine, start
from dino.session.begin import find, resumed, settle, show_plan
from dino.session.sources import Checkpoint, Source, open_checkpoint, open_pictures, read_picture
from dino.session.training import Outcome, run_session
from dino.terminal import Done, Terminal
from dino.training import Run

Labelling = Callable[[str], Any]
"""Given what is about to happen, a context that gives a `Done`."""


# -- train -------------------------------------------------------------------------------------------------


def train(
    pictures: Source,
    *,
    preset: str | Run | None = None,
    out: str | Path | None = None,
    minutes: float | None = None,
    resume: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> Outcome:
    """Trains a backbone on pictures; the plan chooses what is not given, as `dino train` does.

    preset: a recipe's name or a Run. changes: fields of `dino.Run`, nested ones as dicts:
    `optim=dict(epochs=300), views=dict(local=4)`. resume goes on with the run that lies in `out`.
    """
    terminal = Terminal(quiet=quiet)
    data = pictures.path if isinstance(pictures, Folder) else pictures
    named = Path(data).resolve().name if isinstance(data, str | Path) else "pictures"
    folder = Path(out or f"runs/{named}")
    found = find(folder)
    if found is not None and not resume:
        raise UserError(f"{folder} holds a run. Pass resume=True to go on with it, or another out=.")
    if found is None and resume:
        raise UserError(f"There is nothing to resume in {folder}: expected run.json and checkpoints/last.pt.")
    opened = open_pictures(pictures)
    data_settings = _data_settings(pictures)

    def change(run: Run) -> Run:
        return edit(run, out=str(folder), **data_settings, **changes)

    with start() as rt:
        if found is not None:
            run = resumed(found, change)
        else:
            base = resolve(preset) if isinstance(preset, str) else preset
            planned = settle(opened, machine(), preset=base, change=change, minutes=minutes, world=rt.world)
            planned = dist.on_main(lambda: planned)
            show_plan(terminal, planned)
            run = planned.run
        with start(run.precision) as rt:
            return run_session(run, rt, opened, terminal, resume=found is not None)


def _data_settings(source: Source) -> dict[str, Any]:
    if isinstance(source, Pictures):
        return {}
    if isinstance(source, Folder | Scenes):
        return {"data": source}
    return {"data": Scenes() if source == "scenes" else Folder(path=str(source))}


# -- evaluate ----------------------------------------------------------------------------------------------


def evaluate(
    checkpoint: str | Path | Backbone | Checkpoint,
    train: Source,
    val: Source | None = None,
    *,
    k: Sequence[int] = KS,
    temperature: float = 0.07,
    size: int | None = None,
    held_back: float = 0.2,
    floors: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    progress: Labelling | None = None,
) -> dict[str, Any]:
    """Weighted k-NN accuracy of frozen features (Appendix F.1), and beside it raw pixels and random weights.

    Without `val` a share of every class of `train` is held back and asked about. Gives
    {"knn": {"20-NN": percent}, "floors": {"raw_pixels": {...}, "random_weights": {...}}, "protocol": ...,
    "data": ..., "checkpoint": ...}.
    """
    label = progress or (lambda _: nullcontext(None))
    with start("float32") as rt:
        found = open_checkpoint(checkpoint, rt.device)
        with label("looking at the pictures") as done:
            memory = open_pictures(train, done)
            queries = open_pictures(val, done, part="val") if val is not None else None
        if memory.labels is None:
            raise UserError(
                f"k-NN accuracy needs labels, and {train} has none: put the pictures of each class in "
                "a folder of its own (photos/cat/1.jpg, photos/dog/2.jpg, ...)."
            )
        if queries is None:
            memory, queries = memory.split(held_back, 0)
        else:
            queries = relabelled(queries, memory)
        size = size or found.size
        options: dict[str, Any] = dict(size=size, device=rt.device, batch_size=batch_size, workers=workers)

        def score(backbone: Backbone | None, what: str) -> dict[str, float]:
            sides = []
            for pictures, which in ((memory, "training"), (queries, "validation")):
                with label(f"{what}, {which} pictures") as done:
                    if backbone is None:
                        sides.append(raw_pixels(pictures, device=rt.device, progress=done))
                    else:
                        sides.append(extract(backbone, pictures, progress=done, **options))
            return accuracy_of(*sides, k=k, temperature=temperature, device=rt.device)

        result: dict[str, Any] = {"knn": score(found.backbone, "features"), "floors": {}}
        if floors:
            result["floors"]["raw_pixels"] = score(None, "raw pixels")
        if floors and found.network is not None:
            network = edit(found.network, pretrained=False) if isinstance(found.network, Timm) else found.network
            fresh = untrained(lambda: network.build(drop_path=0.0)).to(rt.device)
            result["floors"]["random_weights"] = score(fresh, "random weights")
        return result | {
            "protocol": {"name": "weighted k-NN", "k": list(k), "temperature": temperature, "size": size,
                         "held_back": None if val is not None else held_back},
            "data": {"train": _described(memory), "val": _described(queries)},
            "checkpoint": {"source": found.source, "hash": found.hash},
        }  # fmt: skip


def relabelled(pictures: Pictures, like: Pictures) -> Pictures:
    """The pictures with the class numbers of `like`, matched by the classes' names."""
    if pictures.labels is None:
        raise UserError("k-NN accuracy needs labels, and the validation pictures have none: give class folders.")
    if pictures.classes == like.classes:
        return pictures
    unknown = [name for name in pictures.classes if name not in like.classes]
    if unknown:
        raise UserError(
            f"The validation pictures have classes that the others lack: {', '.join(unknown[:8])}.\n"
            f"Training classes: {', '.join(like.classes[:12])}."
        )
    numbers = np.array([like.classes.index(name) for name in pictures.classes], dtype=np.int64)
    same = pictures.subset(np.arange(len(pictures)))
    same.labels = np.where(pictures.labels >= 0, numbers[np.maximum(pictures.labels, 0)], -1)
    same.classes = like.classes
    return same


def _described(pictures: Pictures) -> dict[str, Any]:
    return {
        "pictures": len(pictures),
        "classes": len(pictures.classes),
        "skipped": len(pictures.skipped),
        "fingerprint": pictures.fingerprint,
    }


def save_evaluation(result: Mapping[str, Any], name: str, folder: Path) -> Path:
    """Writes a result to FOLDER/NAME-DATA.json; another data set, another file."""
    data = hashlib.sha256("".join(str(part["fingerprint"]) for part in result["data"].values()).encode())
    return write_json(folder / f"{name}-{data.hexdigest()[:8]}.json", dict(result))


# -- embed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    """Features of pictures, row by row."""

    names: list[str]
    features: np.ndarray
    """[N, D] float32, not normalised."""
    labels: list[str | None]
    """Each picture's class by name; None without one."""
    skipped: list[Skipped]
    """What could not be read."""


def embed(
    checkpoint: str | Path | Backbone | Checkpoint,
    pictures: Source,
    *,
    size: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: Done | None = None,
) -> Embedding:
    """The backbone's feature of every picture: resized, center-cropped, one forward pass each."""
    with start("float32") as rt:
        found = open_checkpoint(checkpoint, rt.device)
        opened = open_pictures(pictures, progress)
        extracted = extract(
            found.backbone,
            opened,
            size=size or found.size,
            device=rt.device,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
        rows = extracted.indices.tolist()
        labels = np.full(len(opened), -1) if opened.labels is None else opened.labels
        return Embedding(
            names=[opened.names[row] for row in rows],
            features=extracted.features.numpy(),
            labels=[opened.classes[labels[row]] if labels[row] >= 0 else None for row in rows],
            skipped=[*opened.skipped, *extracted.skipped],
        )


# -- attention ---------------------------------------------------------------------------------------------


def attention(
    checkpoint: str | Path | Backbone | Checkpoint,
    picture: str | Path | np.ndarray,
    *,
    layer: int = -1,
    point: Query = "cls",
    mass: float = 0.6,
    size: int | None = None,
) -> Attention:
    """What the backbone looks at in one picture (a file, or uint8 [H, W, 3] RGB): every head, mean, masks.

    A network without attention gives the similarity of each place to its pooled feature (kind says so).
    """
    found = open_checkpoint(checkpoint)
    image = picture if isinstance(picture, np.ndarray) else read_picture(picture)
    size = size or attention_size(found)
    if isinstance(found.backbone, Attentive):
        return attend(found.backbone, image, layer=layer, query=point, mass=mass, size=size)
    if point != "cls" or layer != -1:
        raise UserError(f"{found.source} has no attention: layers and points need a Vision Transformer.")
    return saliency(found.backbone, image, mass=mass, size=size)


def attention_size(found: Checkpoint) -> int:
    """The paper's 480 for networks trained at 224 or more; twice the training size for smaller ones."""
    return min(480, 2 * found.size) if found.size < 224 else 480
