"""dino tsne: pictures, or their classes, as points in the plane."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError, check_range
from dino_ssl.terminal import Terminal, command_output, is_rank0

if TYPE_CHECKING:
    import numpy as np

    from dino_ssl.api.calls import Embedding
    from dino_ssl.data.dataset import ImageDataset

EXAMPLES = """\
  dino tsne runs/photos photos/ -o tsne.png             pictures, coloured by class folder
  dino tsne runs/photos unsorted/ --thumbnails          the pictures themselves in their places
  dino tsne dino_vits16 imagenet/val --of classes       a point for each class (Fig. 11)
  dino tsne runs/photos photos/ --perplexity 40 --max-points 4000"""

MANY = 50
"""From so many classes on, classes are drawn where nothing is said: fewer are no picture."""
ITERATIONS = {"classes": 5000, "images": 1000}


@dataclass(frozen=True, kw_only=True)
class TsneOptions:
    """Draw pictures, or the mean of each class, as points whose neighbours are those of the features (t-SNE).

    The points are also written beside the picture, as NAME.csv: name, label, x, y.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    folder: tyro.conf.Positional[str]
    """Folder of pictures, with or without class folders; `scenes` draws pictures."""
    of: Literal["classes", "images"] | None = None
    """What a point is: the mean feature of a class (Appendix H), or a picture. Without it classes where there are 50
    or more, else pictures."""
    thumbnails: Flag = False
    """Draw the pictures themselves instead of dots."""
    perplexity: float = 20.0
    """How many neighbours count; the paper's 20."""
    components: int = 30
    """Principal components of the features that t-SNE starts from; the paper's 30."""
    iterations: int | None = None
    """Steps of the descent; 5000 for classes as in the paper, 1000 for pictures."""
    learning_rate: float | None = None
    """Of the descent: a fifth of the number of points, at most the paper's 200, without it."""
    max_points: int = 2000
    """Pictures that are drawn, evenly spaced; time and memory grow with its square. At most 5000."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "tsne.png"
    """The picture: .png, .pdf or .svg."""
    size: int | None = None
    """Side in pixels of what the network sees; what it was trained on without it."""
    batch_size: int = 64
    """Pictures per forward pass."""
    workers: int = 0
    """Processes that decode."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def tsne(argv: Sequence[str]) -> int:
    options = parse(TsneOptions, argv, "dino tsne", EXAMPLES)
    path = Path(options.out)
    with command_output(options.json) as (terminal, give):
        from dino_ssl.api.calls import embed, open_checkpoint
        from dino_ssl.viz.scatter import check_ending

        check_ending(path)
        _check(options)
        dataset, of = _pictures(options, terminal)
        found = open_checkpoint(options.checkpoint)
        with terminal.progress("features") as done:
            embedding = embed(
                found, dataset, size=options.size, batch_size=options.batch_size, workers=options.workers,
                progress=done,
            )  # fmt: skip
        if is_rank0():
            give(
                {"checkpoint": options.checkpoint, "hash": found.hash}
                | _draw(options, embedding, dataset, of, terminal)
            )
    return 0


def _check(options: TsneOptions) -> None:
    from dino_ssl.viz.tsne import MAX_POINTS

    check_range(options, "max_points", least=4, most=MAX_POINTS)
    check_range(options, "components", least=1)


def _pictures(options: TsneOptions, terminal: Terminal) -> "tuple[ImageDataset, str]":
    """The pictures whose features are needed, and what a point is."""
    import numpy as np

    from dino_ssl.data.sources import CLASS_FOLDERS, open_dataset

    with terminal.progress("looking at the pictures") as done:
        dataset = open_dataset(options.folder, done)
    classes = len(dataset.classes)
    of = options.of or ("classes" if classes >= MANY else "images")
    if options.of is None:
        terminal.print(
            f"{classes} classes: a point is a {'class' if of == 'classes' else 'picture'} (--of)", style="dim"
        )
    if of == "classes" and classes < 4:
        raise UserError(
            f"{options.folder} has {classes or 'no'} classes, and t-SNE of classes needs at least 4: "
            f"take --of pictures.\n{CLASS_FOLDERS}"
        )
    if of == "classes" and options.thumbnails:
        raise UserError("--thumbnails draws pictures, and a class is none: take --of pictures.")
    if of == "images" and len(dataset) > options.max_points:
        terminal.print(f"{options.max_points} of {len(dataset)} pictures, evenly spaced (--max-points)", style="dim")
        dataset = dataset.subset(np.linspace(0, len(dataset) - 1, options.max_points).round().astype(np.int64))
    return dataset, of


def _draw(
    options: TsneOptions, embedding: "Embedding", dataset: "ImageDataset", of: str, terminal: Terminal
) -> dict[str, Any]:
    import torch

    from dino_ssl.viz import scatter
    from dino_ssl.viz.pca import components
    from dino_ssl.viz.tsne import class_means, same_label, tsne

    path = Path(options.out)
    features = torch.from_numpy(embedding.features)
    names, labels = embedding.names, embedding.labels
    if of == "classes":
        features, names = class_means(features, labels)
        labels = list(names)
    reduced = components(features, options.components).of(features)
    iterations = options.iterations or ITERATIONS[of]
    with terminal.progress("t-SNE") as done:
        found = tsne(
            reduced, perplexity=options.perplexity, learning_rate=options.learning_rate, iterations=iterations,
            progress=done,
        )  # fmt: skip
    points = found.points.numpy()
    title = f"{len(points)} {of}, {options.checkpoint}: t-SNE of {features.shape[1]} numbers each"
    if of == "classes":
        scatter.named(path, points, names, title)
    elif options.thumbnails:
        rows = {name: index for index, name in enumerate(dataset.names)}
        scatter.thumbnails(path, points, lambda index: dataset.read(rows[names[index]]), title)
    else:
        scatter.scatter(path, points, labels, title)
    table = _table(path.with_suffix(".csv"), names, labels, points)
    terminal.print(f"{len(points)} {of}: {path}, and as numbers {table}")
    result: dict[str, Any] = {
        "file": str(path), "table": str(table), "of": of, "points": len(points), "iterations": iterations,
        "perplexity": found.perplexity, "kl": round(found.divergence[-1], 4),
        "skipped": [{"name": item.name, "reason": item.reason} for item in embedding.skipped],
    }  # fmt: skip
    if found.perplexity < options.perplexity:
        terminal.print(
            f"  perplexity {found.perplexity:g}: {len(points)} points have no more neighbours", style="yellow"
        )
    if of == "images" and len(set(labels) - {None}) > 1:
        result["same class nearest"] = same_label(found.points, labels)
        terminal.print(f"  nearest point of the same class: {result['same class nearest']:.1f} %")
    return result


def _table(path: Path, names: Sequence[str], labels: Sequence[str | None], points: "np.ndarray") -> Path:
    from dino_ssl.cli.embed import encodable
    from dino_ssl.files import atomic_write

    def write(aside: Path) -> None:
        with open(aside, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["name", "label", "x", "y"])
            for name, label, (x, y) in zip(names, labels, points.tolist(), strict=True):
                rows.writerow([encodable(name), label or "", f"{x:.5g}", f"{y:.5g}"])

    return atomic_write(path, write)
