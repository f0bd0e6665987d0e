"""Python calls: evaluate, embed and attention."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_ssl import __version__
from dino_ssl.config import to_dict
from dino_ssl.data.dataset import Skipped
from dino_ssl.data.loader import read_or_none
from dino_ssl.data.sources import DatasetSource, open_dataset
from dino_ssl.errors import UserError, check_value
from dino_ssl.evals import find_evaluation
from dino_ssl.evals.attention_maps import attention_size
from dino_ssl.evals.base import EvalContext, Evaluation, reference_scores
from dino_ssl.evals.features import extract
from dino_ssl.evals.resumable import extract_resumable
from dino_ssl.files import write_json
from dino_ssl.formatting import Summarized
from dino_ssl.loading import Checkpoint, load_image, open_checkpoint
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import Weights
from dino_ssl.progress import Progress, StartProgress, no_progress
from dino_ssl.run import read_run
from dino_ssl.runtime import Precision, machine, start
from dino_ssl.terminal import logger
from dino_ssl.training_evals import run_datasets, split_dataset
from dino_ssl.viz.attention import AttentionMaps, Point, Query, attention_maps

FORMAT = 1
"""Version of a result's JSON."""


def evaluate(
    checkpoint: str | Path | Backbone | Checkpoint,
    evaluation: Evaluation | str,
    *sources: DatasetSource,
    references: bool = True,
    precision: Precision = "float32",
    batch_size: int = 64,
    workers: int = 0,
    cache: bool = True,
    out: str | Path | None = None,
    progress: StartProgress = no_progress,
    device: str | torch.device | None = None,
    weights: Weights = "last",
    trust: bool = False,
) -> dict[str, Any]:
    """Run an evaluation: `evaluate("runs/x", KNN(k=(5,)), "train", "val")`, or by name: `"knn"`, `"module:Class"`.

    Args:
        checkpoint: A run's folder, a file, a released network, timm:NAME, or a backbone.
        evaluation: Settings, or the name of an evaluation with its default settings.
        sources: Data of the evaluation, in the order of its `sources`. If none is required, the default is
            the training and validation set of the run, which give the scores that the run printed.
        references: Evaluate random weights, and raw pixels if the evaluation is defined for them.
        precision: Of forward passes. The published protocols use float32.
        batch_size: Images per forward pass.
        workers: Worker processes that decode images.
        cache: Cache features next to the checkpoint.
        out: Folder for files that the evaluation writes (masks).
        progress: Shows progress.
        device: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
        weights: Those of a run's folder that are used.
        trust: Import a backbone class from outside the package that the checkpoint names, which runs its code.

    Returns:
        {"evaluation": name, "values": {"20-NN": percent, ...}, "references": {"raw_pixels": {...}, "random_weights":
        {...}}, "details", "protocol", "data", "checkpoint", "precision", "versions", "size" in pixels}.
    """
    settings: Evaluation = find_evaluation(evaluation)() if isinstance(evaluation, str) else evaluation
    with start(precision, device) as rt:
        loaded = open_checkpoint(checkpoint, rt.device, weights=weights, trust=trust)
        context = EvalContext(
            device=rt.device,
            workers=workers,
            batch_size=batch_size,
            size=loaded.backbone.transform.size,
            autocast=rt.autocast,
            progress=progress,
            cache=loaded.folder / "evals/features" if cache and loaded.folder is not None else None,
            out=None if out is None else Path(out),
        )
        if not sources and not any(source.required for source in settings.sources):
            sources = sources_of_run(loaded, settings, trust=trust)
        prepared = settings.prepare(sources, context)
        scores = prepared(loaded.backbone)
        compared = reference_scores(prepared, loaded.fresh) if references else {}
        return {
            "format": FORMAT,
            "evaluation": prepared.name,
            "size": prepared.size,
            "values": dict(scores),
            "references": {name: dict(values) for name, values in compared.items()},
            "details": scores.details,
            "protocol": to_dict(settings),
            "data": {name: dict(part) for name, part in prepared.data.items()},
            "checkpoint": {
                "source": loaded.source,
                "weights": loaded.weights,
                "hash": loaded.hash,
                "size": loaded.backbone.transform.size,
            },
            "precision": precision,
            "versions": versions(),
        }


def sources_of_run(checkpoint: Checkpoint, evaluation: Evaluation, *, trust: bool) -> tuple[DatasetSource, ...]:
    """Return the sources from a run's online evaluation: training and validation set. Raises UserError for no run."""
    if checkpoint.folder is None or not (checkpoint.folder / "run.json").is_file():
        sources = "".join(f"\n{source.name}: {source.help}" for source in evaluation.sources)
        raise UserError(
            f"{evaluation.name} expected images; got none, and {checkpoint.source} is not the folder of a run.{sources}"
        )
    run = read_run(checkpoint.folder, trust=trust)
    train, val = split_dataset(run, run.method.filter_dataset(run.data.open()))
    return evaluation.run_sources(run_datasets(run, train, val))


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    known = {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")}
    return {"dino": __version__, **known, "python": platform.python_version()}


def save_evaluation(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result to FOLDER/NAME-DIGEST.json; the digest covers dataset, protocol, weights and precision."""
    key = json.dumps(
        [result["data"], result["protocol"], result["checkpoint"]["hash"], result["precision"]], sort_keys=True
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return write_json(folder / f"{result['evaluation']}-{digest}.json", dict(result))


@dataclass(frozen=True, repr=False)
class Embedding(Summarized):
    """Features of a dataset, one row per readable image."""

    names: list[str]
    features: np.ndarray
    """[N, D] float32, not normalized."""
    labels: list[str | None]
    """Class names; None for an unlabeled image."""
    skipped: list[Skipped]
    """Images that could not be read."""
    precision: Precision
    """Precision of the forward pass."""

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        count, width = self.features.shape
        classes = len({label for label in self.labels if label is not None})
        return {"images": count, "dimensions": width, "classes": classes, "skipped": len(self.skipped)}


def embed(
    checkpoint: str | Path | Backbone | Checkpoint,
    dataset: DatasetSource,
    *,
    size: int | None = None,
    precision: Precision | None = None,
    batch_size: int = 64,
    workers: int = 0,
    partial: str | Path | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    weights: Weights = "last",
    trust: bool = False,
) -> Embedding:
    """Compute the feature of every image, after a resize and a center crop.

    Args:
        checkpoint: A run folder, a file, a released network, timm:NAME, or a backbone.
        dataset: A folder, a list of images, or any map-style torch dataset.
        size: Side of the center crop in pixels. Default: the size at which the run evaluates its network.
        precision: Of the forward pass. Default: bfloat16 if the device supports it, otherwise float32.
        batch_size: Images per forward pass.
        workers: Worker processes that decode images.
        partial: Folder that keeps the features while they are computed: after an interruption, the same call resumes.
            `features` is then memory-mapped from it; remove the folder afterwards. Default: features stay in memory.
        progress: Called with (done, total).
        device: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
        weights: Those of a run's folder that are used.
        trust: Import a backbone class from outside the package that the checkpoint names, which runs its code.
    """
    check_value("size", size, least=1)
    check_value("batch_size", batch_size, least=1)
    check_value("workers", workers, least=0)
    with start(precision or machine(device).inference_precision, device) as rt:
        loaded = open_checkpoint(checkpoint, rt.device, weights=weights, trust=trust)
        opened = open_dataset(dataset, progress)
        context = EvalContext(
            device=rt.device,
            workers=workers,
            batch_size=batch_size,
            size=size or loaded.backbone.transform.size,
            autocast=rt.autocast,
            progress=no_progress if progress is None else lambda label: nullcontext(progress),
        )
        if partial is None:
            table = extract(loaded.backbone, opened, context)
        else:
            table = extract_resumable(loaded.backbone, opened, context, Path(partial))
        rows = table.indices.tolist()
        labels = np.full(len(opened), -1) if opened.labels is None else opened.labels
        return Embedding(
            names=[opened.names[int(row)] for row in rows],
            features=table.features.numpy(),
            labels=[opened.classes[labels[row]] if labels[row] >= 0 else None for row in rows],
            skipped=[*opened.skipped, *table.skipped],
            precision=rt.precision,
        )


def attention(
    checkpoint: str | Path | Backbone | Checkpoint,
    image: str | Path | Image.Image | np.ndarray | Tensor | DatasetSource,
    *,
    point: Query | Sequence[Point] = "cls",
    layer: int = -1,
    heads: Sequence[int] | None = None,
    mass: float = 0.6,
    size: int | None = None,
    device: str | torch.device | None = None,
    weights: Weights = "last",
    trust: bool = False,
) -> AttentionMaps | list[Any]:
    """Return the attention maps of an image: of every head, their mean, and masks.

    Args:
        checkpoint: A run folder, a file, a released network, timm:NAME, or a backbone.
        image: A file, a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]; or a folder, a list of these,
            or any map-style torch dataset, for which a list with the result of each image is returned: None for one
            that cannot be read, which is logged.
        point: "cls" for the [CLS] token, (x, y) in pixels of the image for a patch token, or a list of points, for
            which a list is returned.
        layer: Block; 0 is the first, -1 the last.
        heads: Heads to return and to average, from 0. Default: all.
        mass: Share of the attention that the masks hold, in (0, 1].
        size: Short side of the network's input in pixels. Default: chosen from the training size.
        device: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
        weights: Those of a run's folder that are used.
        trust: Import a backbone class from outside the package that the checkpoint names, which runs its code.

    Returns:
        AttentionMaps. For a network without attention, the similarity of each cell to the pooled feature (`kind`).
    """
    loaded = open_checkpoint(checkpoint, device, weights=weights, trust=trust)
    size = size or attention_size(loaded.backbone.transform.size)
    source: Any = load_image(image, loaded.backbone.transform.bit_depth)
    if not isinstance(source, np.ndarray):
        dataset = open_dataset(source).with_bit_depth(loaded.backbone.transform.bit_depth)
        maps, skipped = [], []
        options: Any = dict(point=point, layer=layer, heads=heads, mass=mass, size=size)
        for index in range(len(dataset)):
            pixels = read_or_none(dataset, index, skipped)
            maps.append(None if pixels is None else attention(loaded, pixels, **options))
        for item in skipped:
            logger.warning("skipped: %s: %s", *item)
        return maps
    is_single = isinstance(point, str) or (len(point) == 2 and not isinstance(point[0], Sequence))
    queries: Any = [point] if is_single else point
    maps = attention_maps(loaded.backbone, source, queries, layer=layer, heads=heads, mass=mass, size=size)
    return maps[0] if is_single else maps
