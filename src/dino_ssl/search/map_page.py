"""The page of a map: one file with points, names, thumbnails and script, which loads nothing from a network."""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from dino_ssl import html
from dino_ssl.formatting import plural
from dino_ssl.search.map import Layout

MAX_THUMBNAILS, THUMBNAIL_SIDE = 5000, 64
"""Thumbnails in a page, of about 2 kB each, and their longer side in pixels."""
MAX_GROUPS = 500
"""Groups with a color of their own: the largest ones."""
NO_GROUP = 65535


def write_map(
    path: str | Path,
    title: str,
    layout: Layout,
    names: Sequence[str],
    colorings: Mapping[str, Sequence[str | None]],
    thumbnails: Iterable[tuple[int, bytes]] = (),
    folder: str = "",
) -> Path:
    """Write the page atomically and return its path.

    Args:
        path: Of the page.
        title: Heading.
        layout: Positions of the M images.
        names: Of the M images.
        colorings: The group of each of the M images or None, by the title of the grouping, e.g. "label".
        thumbnails: JPEGs of some of the images, with their numbers 0 to M - 1; one is in memory at a time.
        folder: Path, relative to that of the page, of a folder with the JPEGs of all images, named by `thumbnail_name`.
    """
    script = _static("map.js") + _static("map_page.js")
    body = _body(title, layout, names, colorings, thumbnails, folder)
    return html.write_page(Path(path), f"{title} · dino", body, script)


def thumbnail_name(row: int) -> str:
    """Return the file name of a thumbnail in `folder`."""
    return f"{row:07d}.jpg"


def _body(
    title: str,
    layout: Layout,
    names: Sequence[str],
    colorings: Mapping[str, Sequence[str | None]],
    thumbnails: Iterable[tuple[int, bytes]],
    folder: str,
) -> Iterator[str]:
    note = f"{plural(len(names), 'image')} by {layout.method}: near points have similar features."
    yield f"<style>{_static('map.css')}</style>"
    yield _static("map.html").format(title=html.text(title), note=html.text(note))
    unit = layout.points - layout.points.min(0)
    unit = unit / max(float(unit.max()), 1e-12)
    y, x = 1 - unit[:, 1], unit[:, 0]
    data: dict[str, Any] = {"x": _base64(65535 * x), "y": _base64(65535 * y), "names": list(names)}
    data["colorings"] = [_coloring(title, groups) for title, groups in colorings.items()]
    data |= {"rows": layout.rows.tolist(), "folder": quote(folder)}
    yield f'<script type="application/json" id="data">{_json(data)[:-1]},"thumbnails":{{'
    for position, (number, jpeg) in enumerate(thumbnails):
        url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"
        yield f'{"," if position else ""}"{number}":"{url}"'
    yield "}}</script>"


def _static(name: str) -> str:
    return Path(__file__).with_name("static").joinpath(name).read_text(encoding="utf-8")


def _coloring(title: str, groups: Sequence[str | None]) -> dict[str, Any]:
    """Return the names of the groups, the largest ones if there are many, and the number of each image's group."""
    counts = Counter(group for group in groups if group is not None)
    names = sorted((name for name, _ in counts.most_common(MAX_GROUPS)), key=_natural)
    number = {name: position for position, name in enumerate(names)}
    values = np.array([NO_GROUP if group is None else number.get(group, NO_GROUP) for group in groups])
    none = "other" if len(counts) > MAX_GROUPS else f"no {title}"
    return {"title": title, "names": names, "none": none, "values": _base64(values)}


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() and name.isascii() else (2**31, name)


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.round(values).astype("<u2").tobytes()).decode("ascii")


def _json(data: Any) -> str:
    """Return JSON that can stand in a script element: no text of it ends the element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
