"""A gallery: one self-contained HTML page of titled groups of thumbnails, which loads nothing and needs no script."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote_from_bytes

from dino_ssl import html


class Tile(NamedTuple):
    """One image of a gallery."""

    name: str
    """Path below the folder of the images; also the alternative text."""
    image: bytes | None
    """Thumbnail, a JPEG; None if the image cannot be read any more."""
    note: str = ""
    """Below the name, such as a similarity and a size."""
    badge: str = ""
    """A word that marks the image, such as `keep`."""
    path: Path | None = None
    """The file that a click on the thumbnail opens."""


class Group(NamedTuple):
    """Images under one title; they are read while the page is written."""

    title: str
    tiles: Iterable[Tile]
    note: str = ""
    """Next to the title."""


def write_gallery(path: str | Path, title: str, lead: str, groups: Iterable[Group]) -> Path:
    """Write the page atomically and return its path. One thumbnail is in memory at a time.

    Args:
        path: Of the page. Links to the image files are relative to its folder.
        title: Heading of the page.
        lead: A sentence or two below it.
        groups: Sections, in order; a generator may make them one by one.
    """
    return html.write_page(Path(path), f"{title} · dino", _body(Path(path).parent, title, lead, groups))


def _body(folder: Path, title: str, lead: str, groups: Iterable[Group]) -> Iterator[str]:
    yield f'<div class="eyebrow">dino</div><h1>{html.text(title)}</h1><p class="lead">{html.text(lead)}</p>\n'
    yield '<div class="groups">'
    for group in groups:
        note = f"<span>{html.text(group.note)}</span>" if group.note else ""
        yield f'<section class="card gallery"><h2>{html.text(group.title)}{note}</h2><div class="tiles">\n'
        yield from (_figure(tile, folder) for tile in group.tiles)
        yield "</div></section>\n"
    yield "</div>"


def _figure(tile: Tile, folder: Path) -> str:
    parent, _, name = tile.name.rpartition("/")
    image = html.jpeg(tile.image, tile.name) if tile.image is not None else "<i>not readable any more</i>"
    if tile.image is not None and tile.path is not None:
        link = quote_from_bytes(os.path.relpath(os.fsencode(tile.path), os.fsencode(folder)))
        image = f'<a href="./{link}">{image}</a>'
    badge = f"<em>{html.text(tile.badge)}</em>" if tile.badge else ""
    lines = [f"<b>{html.text(name)}</b>", f"<span>{html.text(parent)}</span>", f"<small>{html.text(tile.note)}</small>"]
    return (
        f'<figure{" class=marked" * bool(badge)}><div class="frame">{image}{badge}</div>'
        f'<figcaption title="{html.text(tile.name)}">{"".join(lines)}</figcaption></figure>\n'
    )
