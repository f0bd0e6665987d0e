"""Python calls: evaluate, embed and attention."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, overload

import numpy as np

from dino_ssl import __version__
from dino_ssl.api.checkpoints import Checkpoint, open_checkpoint, read_image
from dino_ssl.config import to_dict
from dino_ssl.data.dataset import Skipped
from dino_ssl.data.sources import DatasetSource, open_dataset
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals import find_evaluation
from dino_ssl.evals.attention_maps import attention_size
from dino_ssl.evals.base import EvalContext, Evaluation, reference_scores
from dino_ssl.evals.features import extract
from dino_ssl.files import write_json
from dino_ssl.models.backbone import Attentive, Backbone
from dino_ssl.progress import Progress, StartProgress, no_progress
from dino_ssl.runtime import start
from dino_ssl.viz.attention import AttentionMaps, Point, Query, attention_maps, similarity_map

# -- evaluate ----------------------------------------------------------------------------------------------


def evaluate(
    checkpoint: str | Path | Backbone | Checkpoint,
    evaluation: Evaluation | str,
    *sources: DatasetSource,
    references: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    cache: bool = True,
    out: str | Path | None = None,
    progress: StartProgress = no_progress,
) -> dict[str, Any]:
    """Run an evaluation: `evaluate("runs/x", KNN(k=(5,)), "train", "val")`, or by name: `"knn"`, `"module:Class"`.

    Args:
        checkpoint: A run's folder, a file, a released network, timm:NAME, or a backbone.
        evaluation: Settings, or the name of an evaluation with its default settings.
        sources: Data of the evaluation, in the order of its `sources`.
        references: Evaluate random weights, and raw pixels if the evaluation is defined for them.
        batch_size: Images per forward pass.
        workers: Worker processes that decode images.
        cache: Cache features next to the checkpoint.
        out: Folder for files that the evaluation writes (masks).
        progress: Shows progress.

    Returns:
        {"evaluation": name, "values": {"20-NN": percent, ...}, "references": {"raw_pixels": {...}, "random_weights":
        {...}}, "details", "protocol", "data", "checkpoint", "versions"}.
    """
    if isinstance(evaluation, str):
        evaluation = find_evaluation(evaluation)()
    with start("float32") as rt:
        found = open_checkpoint(checkpoint, rt.device)
        context = EvalContext(
            device=rt.device,
            workers=workers,
            batch_size=batch_size,
            size=found.size,
            progress=progress,
            cache=found.folder / "evals/features" if cache and found.folder is not None else None,
            out=None if out is None else Path(out),
        )
        prepared = evaluation.prepare(sources, context)
        scores = prepared(found.backbone)
        compared = reference_scores(prepared, found.fresh) if references else {}
        return {
            "evaluation": prepared.name,
            "values": dict(scores),
            "references": {name: dict(values) for name, values in compared.items()},
            "details": scores.details,
            "protocol": to_dict(evaluation),
            "data": {name: dict(part) for name, part in prepared.data.items()},
            "checkpoint": {"source": found.source, "hash": found.hash, "size": found.size},
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    known = {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")}
    return {"dino": __version__, **known, "python": platform.python_version()}


def save_evaluation(result: Mapping[str, Any], folder: Path) -> Path:
    """Writes a result to FOLDER/NAME-DIGEST.json; another data set, protocol or network, another file."""
    measured = json.dumps([result["data"], result["protocol"], result["checkpoint"]["hash"]], sort_keys=True)
    digest = hashlib.sha256(measured.encode()).hexdigest()[:8]
    return write_json(folder / f"{result['evaluation']}-{digest}.json", dict(result))


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
    dataset: DatasetSource,
    *,
    size: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
) -> Embedding:
    """The backbone's feature of every picture: resized, center-cropped, one forward pass each."""
    given = SimpleNamespace(size=size, batch_size=batch_size, workers=workers)
    check_range(given, "size", "batch_size", least=1)
    check_range(given, "workers", least=0)
    with start("float32") as rt:
        found = open_checkpoint(checkpoint, rt.device)
        opened = open_dataset(dataset, progress)
        context = EvalContext(
            device=rt.device,
            workers=workers,
            batch_size=batch_size,
            size=size or found.size,
            progress=no_progress if progress is None else lambda label: nullcontext(progress),
        )
        extracted = extract(found.backbone, opened, context)
        rows = extracted.indices.tolist()
        labels = np.full(len(opened), -1) if opened.labels is None else opened.labels
        return Embedding(
            names=[opened.names[int(row)] for row in rows],
            features=extracted.features.numpy(),
            labels=[opened.classes[labels[row]] if labels[row] >= 0 else None for row in rows],
            skipped=[*opened.skipped, *extracted.skipped],
        )


# -- attention ---------------------------------------------------------------------------------------------


@overload
def attention(
    checkpoint: str | Path | Backbone | Checkpoint,
    picture: str | Path | np.ndarray,
    *,
    point: Query = "cls",
    layer: int = -1,
    heads: Sequence[int] | None = None,
    mass: float = 0.6,
    size: int | None = None,
) -> AttentionMaps: ...
@overload
def attention(
    checkpoint: str | Path | Backbone | Checkpoint,
    picture: str | Path | np.ndarray,
    *,
    point: list[Point],
    layer: int = -1,
    heads: Sequence[int] | None = None,
    mass: float = 0.6,
    size: int | None = None,
) -> list[AttentionMaps]: ...


def attention(
    checkpoint: str | Path | Backbone | Checkpoint,
    picture: str | Path | np.ndarray,
    *,
    point: Query | list[Point] = "cls",
    layer: int = -1,
    heads: Sequence[int] | None = None,
    mass: float = 0.6,
    size: int | None = None,
) -> AttentionMaps | list[AttentionMaps]:
    """What the backbone looks at in one picture (a file, or uint8 [H, W, 3] RGB): the heads, their mean, masks.

    point: (x, y) in pixels of the picture instead of the [CLS] token; a list of points gives a list. A network
    without attention gives the similarity of each place to its pooled feature (kind says so).
    """
    found = open_checkpoint(checkpoint)
    image = picture if isinstance(picture, np.ndarray) else read_image(picture)
    size = size or attention_size(found.size)
    if isinstance(found.backbone, Attentive):
        queries = point if isinstance(point, list) else [point]
        maps = attention_maps(found.backbone, image, queries, layer=layer, heads=heads, mass=mass, size=size)
        return maps if isinstance(point, list) else maps[0]
    if point != "cls" or layer != -1 or heads:
        raise UserError(f"{found.source} has no attention: layers, heads and points need a Vision Transformer.")
    return similarity_map(found.backbone, image, mass=mass, size=size)
