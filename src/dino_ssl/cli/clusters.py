"""dino clusters: group the images of an index by their features."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl.cli.embed import write_csv
from dino_ssl.cli.images import check_output_file, run_command
from dino_ssl.cli.options import Flag
from dino_ssl.cli.search import OpenIndexOptions, index_tiles
from dino_ssl.errors import check_range
from dino_ssl.files import atomic_write
from dino_ssl.formatting import plural
from dino_ssl.search.clusters import Clusters
from dino_ssl.search.gallery import Group, write_gallery
from dino_ssl.search.index import Index
from dino_ssl.search.select import representatives
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino clusters photos.idx --html clusters.html         a page with representative images of every cluster
  dino clusters photos.idx -k 30 --csv clusters.csv     30 clusters; columns name, cluster, distance
  dino clusters photos.idx --density --min-size 20      HDBSCAN: images of no cluster are noise"""

MAX_LISTED = 30
"""Clusters that are printed."""


@dataclass(frozen=True, kw_only=True)
class ClustersOptions(OpenIndexOptions):
    """Group the images of an index: k-means by cosine, or HDBSCAN, which finds groups of any shape and noise.

    Clusters are numbered by descending size. If the images have classes (folders), the agreement is printed.
    """

    k: Annotated[int | None, tyro.conf.arg(aliases=["-k"])] = None
    """Number of clusters. Default: of 2, 3, 4, 6, 8, 11, ... 128, the one with the highest mean silhouette."""
    density: Flag = False
    """HDBSCAN on 32 principal components."""
    min_size: int = 5
    """Images of the smallest cluster of HDBSCAN."""
    seed: int = 0
    """Of the sample and the initial centers."""
    html: str | None = None
    """File of a page with representative images of every cluster."""
    csv: str | None = None
    """File of a table: name, cluster (a number, or noise), distance to the center (one minus the cosine)."""
    per_cluster: int = 12
    """Images of each cluster on the page."""

    def __post_init__(self) -> None:
        check_range(self, "per_cluster", least=1)


def clusters(argv: Sequence[str]) -> int:
    """Run `dino clusters`."""
    return run_command(_clusters, ClustersOptions, argv, "dino clusters", EXAMPLES)


def _clusters(options: ClustersOptions, terminal: Terminal) -> dict[str, Any]:
    for path in (options.html, options.csv):
        check_output_file(path)
    index = options.open()
    settings: Any = {name: getattr(options, name) for name in ("k", "density", "min_size", "seed")}
    with terminal.progress("clusters") as progress:
        found = index.clusters(progress=progress, **settings)
    groups = list(_described(index, found))
    rows = [[name, f"{size:,}", f"{size / len(index):.1%}", label] for name, size, label in groups[:MAX_LISTED]]
    columns = ["cluster", "images", "share"] + ["largest class"] * any(label for *_, label in groups)
    terminal.table(found.method, columns, [row[: len(columns)] for row in rows])
    if not found.sizes:
        terminal.print("No group is dense enough: set a smaller --min-size, or omit --density.", style="yellow")
    if len(groups) > MAX_LISTED:
        terminal.print(f"... {len(groups)} in all; --json lists them")
    if options.k is None and not options.density and found.scores:
        terminal.print(
            "Silhouettes: "
            + ", ".join(f"{k}: {score:.2f}" for k, score in found.scores.items())
            + ". -k N chooses another number.",
            style="dim",
        )
    if found.agreement:
        terminal.print(
            "Agreement with the classes of {images:,} images: adjusted mutual information {ami:.3f}, purity "
            "{purity:.1%}".format(**found.agreement)
        )
    if options.csv:
        columns = {"name": list(index.items.names), "cluster": found.names, "distance": found.distances}
        terminal.print(f"Written to {atomic_write(Path(options.csv), lambda part: write_csv(part, columns))}")
    if options.html:
        lead = (
            f"{plural(len(index), 'image')}, {found.method}. The first image of each cluster is nearest to its center."
        )
        page = write_gallery(options.html, "Clusters", lead, _pages(index, found, groups, options.per_cluster))
        terminal.print(f"Written to {page}")
    listed = [{"cluster": name, "images": size, "largest_class": label or None} for name, size, label in groups]
    return {
        "index": options.index,
        "method": found.method,
        "clusters": listed,
        "silhouettes": found.scores,
        "agreement": found.agreement,
        "files": [path for path in (options.html, options.csv) if path],
    }


def _described(index: Index, found: Clusters) -> Iterator[tuple[str, int, str]]:
    """Yield the name of each cluster, its number of images, and its most frequent class with its share."""
    labels = index.items.labels
    for name, rows in found.groups:
        label, count = Counter(labels[rows].tolist()).most_common(1)[0]
        yield name, len(rows), f"{label} {count / len(rows):.0%}" if label is not None else ""


def _pages(index: Index, found: Clusters, described: Sequence[tuple[str, int, str]], count: int) -> Iterator[Group]:
    for (name, rows), (_, size, label) in zip(found.groups, described, strict=True):
        note = ", ".join(filter(None, (plural(size, "image"), label)))
        shown = representatives(index.features, rows, count)
        notes = [f"{found.distances[row]:.3g}" for row in shown]
        yield Group("Noise" if name == "noise" else f"Cluster {name}", index_tiles(index, shown.tolist(), notes), note)
