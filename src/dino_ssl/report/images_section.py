"""Report sections: attention maps during training, and nearest neighbors of the sample images."""

from pathlib import Path
from typing import Any

import numpy as np

from dino_ssl.report import html
from dino_ssl.report.snapshots import epoch_dir, read_index, read_neighbors

MAX_EPOCHS = 6


def attention_section(folder: Path) -> str:
    """Return the attention maps of RUN/snapshots: sample images over epochs, then the panels of the latest snapshot."""
    index = read_index(folder)
    if not index["images"]:
        return ""
    epochs, panels = index["epochs"], index["panels"]
    columns = np.unique(np.linspace(0, len(epochs) - 1, min(MAX_EPOCHS, len(epochs))).round().astype(int))
    epochs = [epochs[i] for i in columns]
    over_epochs, latest = [], []
    for number, image in index["images"].items():
        sample = html.image_cell(folder / f"images/{number}.jpg", _caption(image), alt=image["name"])
        maps = (html.image_cell(folder / epoch_dir(epoch) / f"{number}.jpg") for epoch in epochs)
        details = (html.image_cell(folder / f"latest/{number}-{panel}.jpg") for panel in range(len(panels)))
        over_epochs.append(sample + "".join(maps))
        latest.append(sample + "".join(details))
    text = "Attention of the [CLS] token in the last block, mean over heads."
    if index["kind"] == "similarity":
        text = "Similarity of each patch to the pooled feature, since this network has no attention."
    return html.section(
        "Attention maps",
        text,
        html.image_table(["", *(f"epoch {epoch:.4g}" for epoch in epochs)], over_epochs),
        f'<p class="between">Epoch {index["latest"]:.4g}: the fewest patches that hold 60 % of the map, the mean, and '
        "single heads.</p>",
        html.image_table(["", *panels], latest),
    )


def neighbors_section(folder: Path) -> str:
    """Return the nearest images of each sample image; those of the same class are marked."""
    content = read_neighbors(folder)
    rows = []
    for query in content.get("queries", []):
        cells = [_thumbnail(folder, query, _caption(query))]
        for neighbor in query["neighbors"]:
            kind = "same" if query["label"] and neighbor["label"] == query["label"] else ""
            caption = f"{neighbor['similarity']:.2f}  {neighbor['label'] or ''}".strip()
            cells.append(_thumbnail(folder, neighbor, caption, kind))
        rows.append("".join(cells))
    text = f"Among {content.get('images', 0):,} images, by cosine similarity of their features. Green: the same class."
    return html.section("Nearest neighbors", text, html.image_table(["image", "nearest"], rows))


def _thumbnail(folder: Path, image: dict[str, Any], caption: str, kind: str = "") -> str:
    return html.image_cell(folder / f"thumbs/{image['index']}.jpg", caption, alt=image["name"], kind=kind)


def _caption(image: dict[str, Any]) -> str:
    return image["label"] or Path(image["name"]).name
