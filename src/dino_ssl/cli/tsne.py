"""dino tsne: plot images or classes in two dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from dino_ssl.cli.embed import write_csv
from dino_ssl.cli.images import (
    DatasetOptions,
    compute_features,
    dataset_named,
    report_skipped,
    run_command,
    unique_name,
)
from dino_ssl.data.sources import CLASS_FOLDERS, open_dataset
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import atomic_write, check_writable
from dino_ssl.terminal import Terminal, is_rank0
from dino_ssl.viz.pca import principal_components
from dino_ssl.viz.scatter import scatter
from dino_ssl.viz.tsne import MAX_POINTS, class_means
from dino_ssl.viz.tsne import tsne as embed_points

EXAMPLES = """\
  dino tsne runs/photos photos/ -o tsne.png             images, colored by class folder
  dino tsne dino_vits16 imagenet/val --of classes       one point per class (Fig. 11)
  dino tsne runs/photos photos/ --perplexity 40 --max-points 4000"""

COMPONENTS = 30  # App. H
SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True, kw_only=True)
class TsneOptions(DatasetOptions):
    """Draw images, or class means, as points whose neighbors are those of the features (t-SNE).

    The points are also written as NAME.csv: name, label, x, y.
    """

    of: Literal["images", "classes"] = "images"
    """A point per image, or per class: its mean feature (Appendix H)."""
    perplexity: float = 20.0
    """Effective number of neighbors, at most a third of the number of points; 20 in the paper."""
    iterations: int | None = None
    """Gradient steps. Default: 5000 for classes as in the paper, 1000 for images."""
    max_points: int = 2000
    """Maximum number of images, evenly spaced, at most 5000; time and memory grow with its square."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "tsne.png"
    """Output figure: .png, .pdf or .svg. Existing files are kept: tsne-2.png is written instead, or `--out` refused."""


def tsne(argv: Sequence[str]) -> int:
    """Run `dino tsne`."""
    return run_command(_tsne, TsneOptions, argv, "dino tsne", EXAMPLES)


def _tsne(options: TsneOptions, terminal: Terminal) -> dict[str, Any]:
    path = Path(options.out)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"`out` must end in one of {', '.join(SUFFIXES)}; got {options.out!r}.")
    path = _unused(path, is_default=options.out == TsneOptions.out)
    check_writable(path.parent)
    check_range(options, "max_points", least=4, most=MAX_POINTS)
    with terminal.progress(f"reading {options.dataset}") as progress:
        dataset = open_dataset(dataset_named(options.dataset), progress)
    of = options.of
    if of == "classes" and len(dataset.classes) < 4:
        raise UserError(
            f"t-SNE needs at least 4 classes; {options.dataset} has {len(dataset.classes)}. {CLASS_FOLDERS}"
        )
    if of == "images" and len(dataset) > options.max_points:
        terminal.print(f"{options.max_points} of {len(dataset)} images, evenly spaced (--max-points)", style="dim")
        dataset = dataset.evenly_spaced(options.max_points)
    checkpoint, embedding = compute_features(options, dataset, terminal)
    if not is_rank0():
        return {}
    features, names, labels = torch.from_numpy(embedding.features), embedding.names, embedding.labels
    if of == "classes":
        features, names = class_means(features, labels)
        labels = list(names)
    components = principal_components(features, COMPONENTS).project(features)
    iterations = options.iterations or (5000 if of == "classes" else 1000)
    with terminal.progress("t-SNE") as progress:
        embedded, kl = embed_points(components, perplexity=options.perplexity, iterations=iterations, progress=progress)
    points = embedded.numpy()
    title = f"{len(points)} {of}, {options.checkpoint}: t-SNE of {features.shape[1]}-dimensional features"
    scatter(path, points, labels, title)
    columns = {"name": names, "label": labels, "x": points[:, 0], "y": points[:, 1]}
    table = atomic_write(path.with_suffix(".csv"), lambda part: write_csv(part, columns))
    terminal.print(f"{len(points)} {of}: {path}, coordinates in {table}")
    skipped = report_skipped(embedding.skipped, terminal)
    files = {"checkpoint": options.checkpoint, "hash": checkpoint.hash, "file": str(path), "table": str(table)}
    return {**files, "of": of, "points": len(points), "iterations": iterations, "kl": kl, "skipped": skipped}


def _unused(path: Path, *, is_default: bool) -> Path:
    """Return the path, with -2, -3, ... if the figure or its table exists; raise UserError if the user chose it."""
    if not (path.exists() or path.with_suffix(".csv").exists()):
        return path
    free = path.with_stem(unique_name(path.stem, {file.stem for file in path.parent.iterdir()}))
    if not is_default:
        raise UserError(f"{path} or its table exists. Choose another file: --out {free}")
    return free
