"""The report's pictures: what the network attended to as it learned, and which pictures it holds for alike."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dino_ssl.report import html
from dino_ssl.report.snapshots import read_index, read_neighbours
from dino_ssl.viz.rendering import cutout, heat_map

COLUMNS = 6
"""Epochs shown side by side, and heads."""


def attention_section(folder: Path) -> str:
    """Of the snapshots in this folder, a row for each picture."""
    index = read_index(folder)
    epochs = [entry for entry in index["epochs"] if entry.get("maps")]
    if not epochs:
        return ""
    shown = [
        epochs[i] for i in sorted(set(np.linspace(0, len(epochs) - 1, min(COLUMNS, len(epochs))).round().astype(int)))
    ]
    last = shown[-1]
    over, detail = [], []
    for place, told in index["images"].items():
        picture = _image(folder / f"pictures/{place}.jpg")
        if picture is None or place not in last["maps"]:
            continue
        first = html.cell(picture, told.get("label") or Path(told["name"]).name, alt=told["name"])
        maps = (entry["maps"].get(place) for entry in shown)
        over.append(first + "".join(html.cell(_image(folder / f"{m}.jpg") if m else None) for m in maps))
        detail.append(first + "".join(html.cell(image) for image in _heads(folder, last, place, picture)))
    similar = last.get("kind") == "similarity"
    what = (
        "Similarity of every place to the pooled feature; this network has no attention."
        if similar
        else "Attention of the last block's [CLS] token, mean over heads, as training went on."
    )
    heads = min(last["heads"], COLUMNS) if last["heads"] > 1 else 0
    names = ["", "mask, 60 %", "mean", *(f"head {i}" for i in range(heads))]
    return html.section(
        "What it sees",
        what,
        html.dataset(["", *(f"epoch {entry['epoch']:.4g}" for entry in shown)], over),
        f'<p class="between">At epoch {last["epoch"]:.4g}: the fewest patches that hold 60 % of the mass'
        + (", and the heads one by one.</p>" if heads else ".</p>"),
        html.dataset(names, detail),
    )


def _heads(folder: Path, entry: Mapping, place: str, picture: np.ndarray) -> Iterator[np.ndarray | None]:
    """Mask, mean, and the heads, from the strip of maps that `snapshot` saved: heads, mean, mask, side by
    side.
    """
    shape = (picture.shape[0], picture.shape[1])
    strip = _image(folder / f"{entry['maps'][place]}.png", "L")
    width = entry["grid"][1]
    if strip is None or strip.shape[1] < width * (entry["heads"] + 2):
        yield None
        return
    maps = [strip[:, at : at + width] for at in range(0, strip.shape[1], width)]
    yield cutout(picture, maps[-1] > 127)
    yield heat_map(maps[-2], shape)
    if entry["heads"] > 1:
        yield from (heat_map(values, shape) for values in maps[: min(entry["heads"], COLUMNS)])


def neighbours_section(folder: Path) -> str:
    """The nearest pictures of a few, as the last snapshot found them."""
    found = read_neighbours(folder)
    rows, most = [], 0
    for query in found.get("queries", []):
        near = query.get("neighbours", [])
        most = max(most, len(near))
        cells = [html.cell(_thumb(folder, query), query.get("label") or Path(query["name"]).name, alt=query["name"])]
        for one in near:
            same = "same" if query.get("label") and one.get("label") == query["label"] else ""
            under = f"{one['similarity']:.2f}  {one.get('label') or ''}".strip()
            cells.append(html.cell(_thumb(folder, one), under, alt=one["name"], mark=same))
        rows.append("".join(cells))
    text = f"Among {found.get('images', 0):,} pictures, by the cosine of their features."
    heads = ["picture", "nearest", *([""] * (most - 1))]
    return html.section("Nearest neighbours", text, html.dataset(heads, rows))


def _thumb(folder: Path, described: Mapping) -> np.ndarray | None:
    return _image(folder / described["file"]) if described.get("file") else None


def _image(path: Path, mode: str = "RGB") -> np.ndarray | None:
    """A picture that this project saved; None where it is missing or cut short."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, ValueError):
        return None
