"""dino tsne: plot classes in two dimensions, as in Fig. 11."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, check_writable
from dino_ssl.terminal import Terminal, is_rank0
from dino_ssl.viz.pca import principal_components
from dino_ssl.viz.scatter import scatter
from dino_ssl.viz.tsne import class_means
from dino_ssl.viz.tsne import tsne as embed_points

EXAMPLES = """\
  dino tsne dino_vits16 imagenet/val -o tsne.png        one point per class (Fig. 11)
  dino tsne runs/photos photos/ --perplexity 10
  dino index runs/photos photos/ && dino map photos.idx      one point per image, on a page"""

COMPONENTS = 30  # App. H
SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True, kw_only=True)
class TsneOptions(DatasetOptions):
    """Draw classes as points whose neighbors are those of their mean features: t-SNE, as in Appendix H.

    The points are also written as NAME.csv: name, x, y. For a map of images, see `dino map`.
    """

    perplexity: float = 20.0
    """Effective number of neighbors, at most a third of the number of classes; 20 in the paper."""
    iterations: int = 5000
    """Gradient steps; 5000 in the paper."""
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
    with terminal.progress(f"reading {options.dataset}") as progress:
        dataset = open_dataset(dataset_named(options.dataset), progress)
    if len(dataset.classes) < 4:
        raise UserError(
            f"t-SNE of classes needs at least 4; {options.dataset} has {len(dataset.classes)}. {CLASS_FOLDERS} "
            "A map of images: `dino map`."
        )
    checkpoint, embedding = compute_features(options, dataset, terminal)
    if not is_rank0():
        return {}
    means, names = class_means(torch.from_numpy(embedding.features), embedding.labels)
    components = principal_components(means, COMPONENTS).project(means)
    with terminal.progress("t-SNE") as progress:
        embedded, kl = embed_points(
            components, perplexity=options.perplexity, iterations=options.iterations, progress=progress
        )
    points, classes = embedded.numpy(), f"{len(names)} classes"
    title = f"{classes}, {options.checkpoint}: t-SNE of {means.shape[1]}-dimensional features"
    scatter(path, points, names, title)
    columns = {"name": names, "x": points[:, 0], "y": points[:, 1]}
    table = atomic_write(path.with_suffix(".csv"), lambda part: write_csv(part, columns))
    terminal.print(f"{classes}: {path}, coordinates in {table}")
    skipped = report_skipped(embedding.skipped, terminal)
    files = {"checkpoint": options.checkpoint, "hash": checkpoint.hash, "file": str(path), "table": str(table)}
    return {**files, "points": len(points), "iterations": options.iterations, "kl": kl, "skipped": skipped}


def _unused(path: Path, *, is_default: bool) -> Path:
    """Return the path, with -2, -3, ... if the figure or its table exists; raise UserError if the user chose it."""
    if not (path.exists() or path.with_suffix(".csv").exists()):
        return path
    free = path.with_stem(unique_name(path.stem, {file.stem for file in path.parent.iterdir()}))
    if not is_default:
        raise UserError(f"{path} or its table exists. Choose another file: --out {free}")
    return free
