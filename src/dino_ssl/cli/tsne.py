"""dino tsne: plot images or classes in two dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dino_ssl.cli.embed import write_rows
from dino_ssl.cli.images import BatchSize, Checkpoint, DatasetName, InputSize, Json, Trust, Workers, report_skipped
from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import atomic_write
from dino_ssl.terminal import Terminal, command_output, is_rank0

if TYPE_CHECKING:
    from dino_ssl.api.calls import Embedding
    from dino_ssl.data.dataset import ImageDataset

EXAMPLES = """\
  dino tsne runs/photos photos/ -o tsne.png             images, colored by class folder
  dino tsne runs/photos unsorted/ --thumbnails          thumbnails instead of dots
  dino tsne dino_vits16 imagenet/val --of classes       one point per class (Fig. 11)
  dino tsne runs/photos photos/ --perplexity 40 --max-points 4000"""

MANY_CLASSES = 50
"""Default of `of`: classes if there are at least this many, otherwise images."""
ITERATIONS = {"classes": 5000, "images": 1000}


@dataclass(frozen=True, kw_only=True)
class TsneOptions:
    """Draw images, or class means, as points whose neighbors are those of the features (t-SNE).

    The points are also written as NAME.csv: name, label, x, y.
    """

    checkpoint: Checkpoint
    dataset: DatasetName
    of: Literal["classes", "images"] | None = None
    """A point per class (its mean feature, Appendix H) or per image. Default: classes for 50 or more classes."""
    thumbnails: Flag = False
    """Draw thumbnails of the images instead of dots."""
    perplexity: float = 20.0
    """Effective number of neighbors; 20 in the paper."""
    components: int = 30
    """Number of principal components that are the input of t-SNE; 30 in the paper."""
    iterations: int | None = None
    """Gradient steps. Default: 5000 for classes as in the paper, 1000 for images."""
    learning_rate: float | None = None
    """Default: a fifth of the number of points, at most the paper's 200."""
    max_points: int = 2000
    """Maximum number of images, evenly spaced, at most 5000; time and memory grow with its square."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "tsne.png"
    """Output figure: .png, .pdf or .svg."""
    size: InputSize = None
    batch_size: BatchSize = 64
    workers: Workers = 0
    trust: Trust = False
    json: Json = False


def tsne(argv: Sequence[str]) -> int:
    """Run `dino tsne`."""
    options = parse(TsneOptions, argv, "dino tsne", EXAMPLES)
    with command_output(options.json) as (terminal, write_result):
        from dino_ssl.api.calls import embed, open_checkpoint
        from dino_ssl.viz.saving import check_figure_path
        from dino_ssl.viz.tsne import MAX_POINTS

        check_figure_path(Path(options.out))
        check_range(options, "max_points", least=4, most=MAX_POINTS)
        check_range(options, "components", least=1)
        dataset, of = _open(options, terminal)
        checkpoint = open_checkpoint(options.checkpoint, trust=options.trust)
        with terminal.progress("features") as progress:
            embedding = embed(
                checkpoint, dataset, size=options.size, batch_size=options.batch_size, workers=options.workers,
                progress=progress,
            )  # fmt: skip
        if is_rank0():
            result = _draw(options, embedding, dataset, of, terminal)
            write_result({"checkpoint": options.checkpoint, "hash": checkpoint.hash, **result})
    return 0


def _open(options: TsneOptions, terminal: Terminal) -> "tuple[ImageDataset, str]":
    """Return the images to embed, and what a point is."""
    import numpy as np

    from dino_ssl.data.sources import CLASS_FOLDERS, open_dataset

    with terminal.progress(f"reading {options.dataset}") as progress:
        dataset = open_dataset(options.dataset, progress)
    num_classes = len(dataset.classes)
    of = options.of or ("classes" if num_classes >= MANY_CLASSES else "images")
    if options.of is None:
        terminal.print(f"{num_classes} classes: one point per {'class' if of == 'classes' else 'image'}", style="dim")
    if of == "classes" and num_classes < 4:
        raise UserError(
            f"t-SNE of classes needs at least 4 classes, and {options.dataset} has {num_classes}: use --of images.\n"
            f"{CLASS_FOLDERS}"
        )
    if of == "classes" and options.thumbnails:
        raise UserError("--thumbnails needs one point per image: use --of images.")
    if of == "images" and len(dataset) > options.max_points:
        terminal.print(f"{options.max_points} of {len(dataset)} images, evenly spaced (--max-points)", style="dim")
        dataset = dataset.subset(np.linspace(0, len(dataset) - 1, options.max_points).round().astype(np.int64))
    return dataset, of


def _draw(
    options: TsneOptions, embedding: "Embedding", dataset: "ImageDataset", of: str, terminal: Terminal
) -> dict[str, Any]:
    import torch

    from dino_ssl.viz import scatter
    from dino_ssl.viz.pca import principal_components
    from dino_ssl.viz.tsne import class_means, nearest_label_accuracy
    from dino_ssl.viz.tsne import tsne as run_tsne

    path = Path(options.out)
    features = torch.from_numpy(embedding.features)
    names, labels = embedding.names, embedding.labels
    if of == "classes":
        features, names = class_means(features, labels)
        labels = list(names)
    iterations = options.iterations or ITERATIONS[of]
    with terminal.progress("t-SNE") as progress:
        embedded = run_tsne(
            principal_components(features, options.components).project(features), perplexity=options.perplexity,
            learning_rate=options.learning_rate, iterations=iterations, progress=progress,
        )  # fmt: skip
    points = embedded.points.numpy()
    title = f"{len(points)} {of}, {options.checkpoint}: t-SNE of {features.shape[1]}-dimensional features"
    if of == "classes":
        scatter.named_scatter(path, points, names, title)
    elif options.thumbnails:
        rows = {name: index for index, name in enumerate(dataset.names)}
        scatter.thumbnail_scatter(path, points, lambda index: dataset.read(rows[names[index]]), title)
    else:
        scatter.scatter(path, points, labels, title)
    coordinates = ((f"{x:.5g}", f"{y:.5g}") for x, y in points.tolist())
    table = [(name, label, *xy) for name, label, xy in zip(names, labels, coordinates, strict=True)]
    csv = atomic_write(path.with_suffix(".csv"), lambda part: write_rows(part, ["name", "label", "x", "y"], table))
    terminal.print(f"{len(points)} {of}: {path}, coordinates in {csv}")
    if embedded.perplexity < options.perplexity:
        terminal.print(f"  perplexity {embedded.perplexity:g}: the maximum for {len(points)} points", style="yellow")
    result: dict[str, Any] = {
        "file": str(path), "table": str(csv), "of": of, "points": len(points), "iterations": iterations,
        "perplexity": embedded.perplexity, "kl": round(embedded.divergence[-1], 4),
        "skipped": report_skipped(embedding.skipped, terminal),
    }  # fmt: skip
    if of == "images" and len(set(labels) - {None}) > 1:
        result["nearest_label_accuracy"] = nearest_label_accuracy(embedded.points, labels)
        terminal.print(f"  nearest point has the same class: {result['nearest_label_accuracy']:.1f} %")
    return result
