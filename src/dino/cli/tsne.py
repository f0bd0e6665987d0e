"""dino tsne: pictures, or their classes, as points in the plane."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dino.cli.options import Switch, parse
from dino.errors import UserError, must_lie
from dino.terminal import Terminal, is_main, speaking

if TYPE_CHECKING:
    import numpy as np

    from dino.api import Embedding
    from dino.data.pictures import Pictures

EXAMPLES = """\
  dino tsne runs/photos photos/ -o tsne.png             pictures, coloured by class folder
  dino tsne runs/photos unsorted/ --thumbnails          the pictures themselves in their places
  dino tsne dino_vits16 imagenet/val --of classes       a point for each class (Fig. 11)
  dino tsne runs/photos photos/ --perplexity 40 --max-points 4000"""

MANY = 50
"""From so many classes on, classes are drawn where nothing is said: fewer are no picture."""
ITERATIONS = {"classes": 5000, "pictures": 1000}


@dataclass(frozen=True, kw_only=True)
class TsneOptions:
    """Draw pictures, or the mean of each class, as points whose neighbours are those of the features (t-SNE).

    The points are also written beside the picture, as NAME.csv: name, label, x, y.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    folder: tyro.conf.Positional[str]
    """Folder of pictures, with or without class folders; `scenes` draws pictures."""
    of: Literal["classes", "pictures"] | None = None
    """What a point is: the mean feature of a class (Appendix H), or a picture. Without it classes where there are 50
    or more, else pictures."""
    thumbnails: Switch = False
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
    json: Switch = False
    """One JSON object on standard output, messages on standard error."""


def tsne(argv: Sequence[str]) -> int:
    options = parse(TsneOptions, argv, "dino tsne", EXAMPLES)
    path = Path(options.out)
    with speaking(options.json) as (terminal, give):
        from dino.analysis.scatter import check_ending
        from dino.api import embed, open_checkpoint

        check_ending(path)
        _check(options)
        pictures, of = _pictures(options, terminal)
        found = open_checkpoint(options.checkpoint)
        with terminal.progress("features") as done:
            embedding = embed(
                found, pictures, size=options.size, batch_size=options.batch_size, workers=options.workers,
                progress=done,
            )  # fmt: skip
        if is_main():
            give(
                {"checkpoint": options.checkpoint, "hash": found.hash}
                | _draw(options, embedding, pictures, of, terminal)
            )
    return 0


def _check(options: TsneOptions) -> None:
    from dino.analysis.tsne import MAX_POINTS

    must_lie(options, "max_points", of="--", least=4, most=MAX_POINTS)
    must_lie(options, "components", of="--", least=1)


def _pictures(options: TsneOptions, terminal: Terminal) -> "tuple[Pictures, str]":
    """The pictures whose features are needed, and what a point is."""
    import numpy as np

    from dino.data.sources import CLASS_FOLDERS, open_pictures

    with terminal.progress("looking at the pictures") as done:
        pictures = open_pictures(options.folder, done)
    classes = len(pictures.classes)
    of = options.of or ("classes" if classes >= MANY else "pictures")
    if options.of is None:
        terminal.say(f"{classes} classes: a point is a {'class' if of == 'classes' else 'picture'} (--of)", style="dim")
    if of == "classes" and classes < 4:
        raise UserError(
            f"{options.folder} has {classes or 'no'} classes, and t-SNE of classes needs at least 4: "
            f"take --of pictures.\n{CLASS_FOLDERS}"
        )
    if of == "classes" and options.thumbnails:
        raise UserError("--thumbnails draws pictures, and a class is none: take --of pictures.")
    if of == "pictures" and len(pictures) > options.max_points:
        terminal.say(f"{options.max_points} of {len(pictures)} pictures, evenly spaced (--max-points)", style="dim")
        pictures = pictures.subset(np.linspace(0, len(pictures) - 1, options.max_points).round().astype(np.int64))
    return pictures, of


def _draw(
    options: TsneOptions, embedding: "Embedding", pictures: "Pictures", of: str, terminal: Terminal
) -> dict[str, Any]:
    import torch

    from dino.analysis import scatter
    from dino.analysis.pca import components
    from dino.analysis.tsne import class_means, same_label, tsne

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
        rows = {name: index for index, name in enumerate(pictures.names)}
        scatter.thumbnails(path, points, lambda index: pictures.read(rows[names[index]]), title)
    else:
        scatter.scatter(path, points, labels, title)
    table = _table(path.with_suffix(".csv"), names, labels, points)
    terminal.say(f"{len(points)} {of}: {path}, and as numbers {table}")
    result: dict[str, Any] = {
        "file": str(path), "table": str(table), "of": of, "points": len(points), "iterations": iterations,
        "perplexity": found.perplexity, "kl": round(found.divergence[-1], 4),
        "skipped": [{"name": item.name, "reason": item.reason} for item in embedding.skipped],
    }  # fmt: skip
    if found.perplexity < options.perplexity:
        terminal.say(f"  perplexity {found.perplexity:g}: {len(points)} points have no more neighbours", style="yellow")
    if of == "pictures" and len(set(labels) - {None}) > 1:
        result["same class nearest"] = same_label(found.points, labels)
        terminal.say(f"  nearest point of the same class: {result['same class nearest']:.1f} %")
    return result


def _table(path: Path, names: Sequence[str], labels: Sequence[str | None], points: "np.ndarray") -> Path:
    from dino.cli.embed import encodable
    from dino.files import write_whole

    def write(aside: Path) -> None:
        with open(aside, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["name", "label", "x", "y"])
            for name, label, (x, y) in zip(names, labels, points.tolist(), strict=True):
                rows.writerow([encodable(name), label or "", f"{x:.5g}", f"{y:.5g}"])

    return write_whole(path, write)
