"""dino map: a page with the images of an index as points of a map."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dino_ssl.cli.images import check_output_file, run_command
from dino_ssl.cli.search import OpenIndexOptions
from dino_ssl.data.dataset import BadImage
from dino_ssl.files import atomic_write, claim_output
from dino_ssl.formatting import format_bytes, plural
from dino_ssl.search.index import Index
from dino_ssl.search.map import MAX_POINTS
from dino_ssl.search.map_page import MAX_THUMBNAILS, THUMBNAIL_SIDE, thumbnail_name, write_map
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino map photos.idx -o map.html                       zoom, thumbnails, lasso; works without a network
  dino map photos.idx --thumbnails map-images           thumbnails of all images, in a folder next to the page
  dino clusters photos.idx -k 30 && dino map photos.idx      colored by these clusters"""


@dataclass(frozen=True, kw_only=True)
class MapOptions(OpenIndexOptions):
    """Write a map of the images of an index, on which near points have similar features (t-SNE).

    Colors are those of the classes, or of the clusters that `dino clusters` has found last.
    """

    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "map.html"
    """File of the page."""
    perplexity: float = 30.0
    """Effective number of neighbors of a point, at most a third of the number of points."""
    max_points: int = MAX_POINTS
    """Of more images, so many evenly spaced ones are drawn."""
    thumbnails: str | None = None
    """Folder for the thumbnails of all images. Default: in the page; of more than 5000 images, of 5000 of them."""


def map(argv: Sequence[str]) -> int:
    """Run `dino map`."""
    return run_command(_map, MapOptions, argv, "dino map", EXAMPLES)


def _map(options: MapOptions, terminal: Terminal) -> dict[str, Any]:
    path, folder = Path(options.out), options.thumbnails and Path(options.thumbnails)
    check_output_file(options.out)
    if folder:
        claim_output(folder)
    index = options.open()
    with terminal.progress("t-SNE") as progress:
        layout = index.map(perplexity=options.perplexity, max_points=options.max_points, progress=progress)
    with terminal.progress("clusters") as progress:
        clusters = index.last_clusters() or index.clusters(progress=progress)
    names, labels = index.items.names, index.items.labels[layout.rows].tolist()
    groups = [clusters.names[row] for row in layout.rows]
    colorings = ({"label": labels} if any(labels) else {}) | {"cluster": groups}
    with terminal.progress("thumbnails") as progress:
        if folder:
            _write_thumbnails(index, layout.rows, folder, progress)
        embedded = () if folder else _thumbnails(index, layout.rows, progress)
        write_map(
            path,
            index.folder.name,
            layout,
            [str(names[row]) for row in layout.rows.tolist()],
            colorings,
            embedded,
            os.path.relpath(folder, path.parent) if folder else "",
        )
    count = len(layout.rows)
    if count < len(index):
        terminal.print(f"{count:,} of {len(index):,} images, evenly spaced (--max-points)", style="dim")
    if count > MAX_THUMBNAILS and not folder:
        terminal.print(f"Thumbnails of {MAX_THUMBNAILS:,} images; --thumbnails DIR writes all", style="dim")
    terminal.print(f"{plural(count, 'image')}, {layout.method}: {path} ({format_bytes(path.stat().st_size)})")
    return {"index": options.index, "file": str(path), "points": count, "method": layout.method}


def _thumbnails(index: Index, rows: np.ndarray, progress: Any) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the thumbnail of evenly spaced images on the map."""
    shown = min(len(rows), MAX_THUMBNAILS)
    for done, number in enumerate((np.arange(shown) * len(rows) // shown).tolist(), 1):
        with suppress(BadImage):
            yield number, index.thumbnail(int(rows[number]), THUMBNAIL_SIDE)
        progress(done, shown)


def _write_thumbnails(index: Index, rows: np.ndarray, folder: Path, progress: Any) -> None:
    for done, row in enumerate(rows.tolist(), 1):
        with suppress(BadImage):
            content = index.thumbnail(row)
            atomic_write(folder / thumbnail_name(row), lambda part, content=content: part.write_bytes(content))
        progress(done, len(rows))
