"""dino classify: predict the class of images from a few labeled ones."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dino_ssl.api.classify import Method
from dino_ssl.api.classify import classify as classify_images
from dino_ssl.cli.embed import read_features, write_csv
from dino_ssl.cli.images import DatasetOptions, dataset_named, partial_features, report_skipped, run_command
from dino_ssl.data.folder import printable
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import below_references
from dino_ssl.files import atomic_write, check_writable
from dino_ssl.terminal import Terminal, is_rank0

EXAMPLES = """\
  dino classify runs/photos photos/ --labels labeled/ -o labels.csv     labeled/cat/1.jpg, labeled/dog/2.jpg, ...
  dino classify dino_vits16 photos/ --labels labeled/ --method linear   logistic regression
  dino embed runs/photos labeled/ -o labeled.parquet                    keep the features of the labeled images, and
  dino classify runs/photos new/ --labels labeled.parquet -o new.csv    classify other images with them"""


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(DatasetOptions):
    """Predict the class of every image from a few labeled images.

    The output is a CSV file with the columns name, label, confidence (0 to 1) and runner_up. The accuracy that is
    printed is measured on the labeled images, each classified by others. After an interruption, the same command
    resumes. DATASET and --labels may also be .parquet files of `dino embed`.
    """

    labels: str
    """A few labeled images: a folder of class folders, or their features."""
    method: Method = "knn"
    """Weighted k-NN, or logistic regression."""
    k: int | None = None
    """Neighbors that vote. Default: a tenth of the median number of labeled images of a class, 2 to 20."""
    threshold: float = 0.8
    """Confidence below which images are counted as uncertain."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "labels.csv"
    """Output file."""


def classify(argv: Sequence[str]) -> int:
    """Run `dino classify`."""
    return run_command(_classify, ClassifyOptions, argv, "dino classify", EXAMPLES)


def _classify(options: ClassifyOptions, terminal: Terminal) -> dict[str, Any]:
    path = Path(options.out)
    if path.suffix.lower() != ".csv":
        raise UserError(f"`out` must end in .csv; got {options.out!r}.")
    check_range(options, "threshold", least=0, most=1)
    check_writable(path.parent)
    checkpoint = options.open_checkpoint()
    dataset, labels = (
        read_features(Path(name), checkpoint) if name.endswith(".parquet") else dataset_named(name)
        for name in (options.dataset, options.labels)
    )
    names = ("method", "k", "size", "precision", "batch_size", "workers", "device")
    settings: Any = {name: getattr(options, name) for name in names}
    with partial_features(path, terminal) as partial:
        result = classify_images(checkpoint, dataset, labels, partial=partial, progress=terminal.progress, **settings)
        if is_rank0():
            columns = {"name": result.names, "label": result.labels, "confidence": result.confidences}
            atomic_write(path, lambda part: write_csv(part, {**columns, "runner_up": result.runners_up}))
    counts, unlabeled = Counter(result.labels), ~in_folder(result.names, options.dataset, options.labels)
    uncertain = int((unlabeled & (result.confidences < options.threshold)).sum())
    rows = [[name, f"{labeled:,}", f"{counts[name]:,}"] for name, labeled in result.labeled.items()]
    terminal.table(f"{result.classifier}, {len(result.names):,} images", ["class", "labeled", "predicted"], rows)
    terminal.print(
        f"{uncertain:,} of {unlabeled.sum():,} unlabeled images have a confidence below {options.threshold:g}"
    )
    if result.tested:
        how = "leave-one-out" if options.method == "knn" else "cross-validation"
        largest = 100 * max(result.labeled.values()) / result.tested
        pixels = "".join(f"; raw pixels: {values['accuracy']:.1f} %" for values in result.references.values())
        terminal.print(
            f"Accuracy on {result.tested:,} labeled images, by {how}: {result.accuracy:.1f} % "
            f"(always the largest class: {largest:.1f} %{pixels})"
        )
        if below := below_references({"accuracy": result.accuracy}, result.references):
            terminal.print(below, style="yellow")
    else:
        terminal.print("The accuracy is not known: no class has two labeled images.", style="yellow")
    terminal.print(f"Written to {path}")
    return {
        "file": str(path),
        "images": len(result.names),
        "predicted": {name: counts[name] for name in result.labeled},
        "uncertain": uncertain,
        **{name: getattr(result, name) for name in ("classifier", "labeled", "tested", "references")},
        "accuracy": result.accuracy if result.tested else None,
        "checkpoint": options.checkpoint,
        "skipped": report_skipped(result.skipped, terminal),
    }


def in_folder(names: Sequence[str], root: str, folder: str) -> np.ndarray:
    """Return which images of the dataset `root` are in a folder, bool [M]: labeled ones may be part of it."""
    below = printable(os.path.realpath(folder), Path(os.path.realpath(root)))
    return np.array([below == "." or name.startswith(f"{below}/") for name in names], bool)
