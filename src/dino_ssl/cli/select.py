"""dino select: choose the images of an index to label first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow
import pyarrow.csv
import tyro

from dino_ssl.cli.embed import write_csv
from dino_ssl.cli.images import check_output_file, run_command
from dino_ssl.cli.search import OpenIndexOptions, index_tiles
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write
from dino_ssl.formatting import FORMULA, plural
from dino_ssl.search.gallery import Group, write_gallery
from dino_ssl.search.select import Method
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino select photos.idx -n 200 --csv first.csv         images that cover the collection
  dino select photos.idx -n 100 --labeled first.csv --csv second.csv    a second round
  dino select photos.idx -n 50 --method outliers --html outliers.html"""

MEANING = {
    "coverage": "distance to the nearest image selected before",
    "typical": "mean distance to the neighbors in its cluster",
    "outliers": "mean distance to the 5 nearest images",
}
MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class SelectOptions(OpenIndexOptions):
    """Choose images to label first, or to look at.

    coverage: each image is the one farthest from all before it. typical: the densest image of each of as many clusters.
    outliers: the images farthest from their nearest neighbors.
    """

    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 100
    """Number of images."""
    method: Method = "coverage"
    """Cover the collection, take typical images, or outliers."""
    labeled: tuple[str, ...] = ()
    """Files with images that are labeled already: a name per line, or .csv with a column `name`."""
    seed: int = 0
    """Of the clusters of `typical`."""
    list: str | None = None
    """File with a name per line."""
    csv: str | None = None
    """File of a table: name, distance, and the class if there are any."""
    html: str | None = None
    """File of a page with thumbnails."""


def select(argv: Sequence[str]) -> int:
    """Run `dino select`."""
    return run_command(_select, SelectOptions, argv, "dino select", EXAMPLES)


def _select(options: SelectOptions, terminal: Terminal) -> dict[str, Any]:
    for path in (options.list, options.csv, options.html):
        check_output_file(path)
    index = options.open()
    labeled = [name for file in options.labeled for name in read_names(Path(file))]
    with terminal.progress("selecting") as progress:
        selected = index.select(
            options.count, method=options.method, labeled=labeled, seed=options.seed, progress=progress
        )
    meaning, images = MEANING[options.method], plural(len(selected), "image")
    rows = [[str(rank), f"{item.distance:.3g}", item.name] for rank, item in enumerate(selected[:MAX_LISTED], 1)]
    after = f", after {len(labeled):,} labeled ones" if labeled else ""
    terminal.table(f"{images} of {len(index):,}, {options.method}{after}", ["rank", "distance", "image"], rows)
    if len(selected) > MAX_LISTED and not (options.list or options.csv or options.html):
        terminal.print("... --list, --csv, --html and --json give the others")
    terminal.print(f"distance: {meaning} (one minus the cosine)", style="dim")
    names, distances = [item.name for item in selected], [item.distance for item in selected]
    labels = [index.items.labels[item.row] for item in selected]
    if options.list:
        text = "".join(f"{name}\n" for name in names)
        terminal.print(f"Written to {atomic_write(Path(options.list), lambda part: part.write_text(text, 'utf-8'))}")
    if options.csv:
        columns = {"name": names, "distance": distances} | ({"label": labels} if any(labels) else {})
        terminal.print(f"Written to {atomic_write(Path(options.csv), lambda part: write_csv(part, columns))}")
    if options.html:
        tiles = index_tiles(index, [item.row for item in selected], [f"{value:.3g}" for value in distances])
        lead = f"{images} of {len(index):,}, {options.method}. Below each: its {meaning}."
        terminal.print(f"Written to {write_gallery(options.html, 'Selection', lead, [Group('Images', tiles)])}")
    items = [{**item._asdict(), "label": label} for item, label in zip(selected, labels, strict=True)]
    return {"index": options.index, "method": options.method, "labeled": len(labeled), "images": items}


def read_names(path: Path) -> Sequence[str]:
    """Return the names in a text file, one per line, or in the column `name` of a CSV file."""
    try:
        if path.suffix.lower() != ".csv":
            return [name for line in path.read_text("utf-8").splitlines() if (name := line.strip())]
        options = pyarrow.csv.ConvertOptions(column_types={"name": pyarrow.string()}, include_columns=["name"])
        lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
        with path.open("rb") as file:  # its name need not be UTF-8
            table = pyarrow.csv.read_csv(file, parse_options=lines, convert_options=options)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a list of images: {error}. Expected a name per line, or .csv with a column name."
        ) from error
    return [name[name[:1] == "'" and name[1:2] in FORMULA :] for name in table["name"].to_pylist()]
