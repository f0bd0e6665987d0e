"""dino search: find the images of an index that are most similar to others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from dino_ssl.cli.images import check_output_file, run_command
from dino_ssl.cli.options import Device, Flag, Json, Trust
from dino_ssl.data.dataset import BadImage
from dino_ssl.errors import UserError
from dino_ssl.search.gallery import Group, Tile, write_gallery
from dino_ssl.search.index import Index
from dino_ssl.search.query import crop, query_image, thumbnail
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino search photos.idx query.jpg -k 20
  dino search photos.idx one.jpg two.jpg                   images that are similar to the mean of both
  dino search photos.idx query.jpg --region 40 10 200 160  the part at x 40, y 10, of 200 x 160 pixels
  dino search photos.idx cats/12.jpg --label dog           an image of the index as query, in one class
  dino search photos.idx query.jpg --html hits.html        a page with thumbnails"""


@dataclass(frozen=True, kw_only=True)
class OpenIndexOptions:
    """Options of every command that reads an index."""

    index: tyro.conf.Positional[str]
    """Folder of an index, as `dino index` writes."""
    images: str | None = None
    """Folder of the images, if it was moved."""
    json: Json = False

    def open(self, **options: Any) -> Index:
        """Open the index."""
        return Index(self.index, images=self.images, **options)


@dataclass(frozen=True, kw_only=True)
class SearchOptions(OpenIndexOptions):
    """Print the images of an index that are most similar to a query, by the cosine of their features.

    A query is an image file, or the name of an image of the index. Several are one query: the mean of their features.
    """

    queries: tyro.conf.Positional[tuple[str, ...]]
    """Image files, or names of images of the index."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 20
    """Number of images."""
    region: tuple[int, int, int, int] | None = None
    """X Y WIDTH HEIGHT in pixels of the image as it is viewed: the query is this part."""
    folder: str | None = None
    """Search only below this folder, relative to that of the images."""
    label: str | None = None
    """Search only in this class."""
    exact: Flag = False
    """Compare with every image, although the index has approximate search."""
    html: str | None = None
    """File of a page with thumbnails of the query and the images."""
    checkpoint: str | None = None
    """The network of the index, if it was moved: its weights must be the same."""
    device: Device = None
    trust: Trust = False


def search(argv: Sequence[str]) -> int:
    """Run `dino search`."""
    return run_command(_search, SearchOptions, argv, "dino search", EXAMPLES)


def _search(options: SearchOptions, terminal: Terminal) -> dict[str, Any]:
    if not options.queries:
        raise UserError("No query given. Expected an image: dino search photos.idx query.jpg")
    check_output_file(options.html)
    opened = options.open(checkpoint=options.checkpoint, device=options.device, trust=options.trust)
    names = ("k", "region", "folder", "label", "exact")
    hits = opened.search(list(options.queries), **{name: getattr(options, name) for name in names})
    labels = [opened.items.labels[hit.row] for hit in hits]
    rows = [
        [str(rank), f"{hit.similarity:.4f}", hit.name, label or ""]
        for rank, (hit, label) in enumerate(zip(hits, labels, strict=True), 1)
    ]
    terminal.table(f"{len(hits)} of {len(opened):,} images", ["rank", "similarity", "image", "class"], rows)
    if options.html is not None:
        lead = f"The {len(hits)} most similar of {len(opened):,} images, by the cosine of their features."
        tiles = index_tiles(opened, [hit.row for hit in hits], [f"{hit.similarity:.4f}" for hit in hits])
        groups = [Group("Query", _query_tiles(opened, options)), Group("Images", tiles)]
        terminal.print(f"Written to {write_gallery(options.html, 'Image search', lead, groups)}")
    results = [{**hit._asdict(), "label": label} for hit, label in zip(hits, labels, strict=True)]
    return {"index": options.index, "queries": list(options.queries), "file": options.html, "hits": results}


def _query_tiles(opened: Index, options: SearchOptions) -> Iterator[Tile]:
    for query in options.queries:
        try:
            image = query_image(opened, query)
        except BadImage:  # an item of the index whose file is gone
            yield Tile(query, None)
        else:
            yield Tile(query, thumbnail(image if options.region is None else crop(image, options.region)))


def index_tiles(index: Index, rows: Sequence[int], notes: Sequence[str]) -> Iterator[Tile]:
    """Yield the thumbnails of some images of an index, with a note below each."""
    for row, note in zip(rows, notes, strict=True):
        try:
            image = index.thumbnail(row)
        except BadImage:
            image = None
        yield Tile(index.items.names[row], image, note, path=index.path_of(row))
