"""Long computations of the page, and their results in the form that the page reads."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dino_ssl.formatting import plural
from dino_ssl.progress import StartProgress
from dino_ssl.search.deduplicate import TIER_NAMES
from dino_ssl.search.index import Index

REPRESENTATIVES = 9
"""Images of a cluster on its card: those next to its center."""


class Result(NamedTuple):
    """The result of a computation."""

    page: dict[str, Any]
    """What is sent as JSON: a description, and the groups if there are any."""
    arrays: dict[str, np.ndarray]
    """What is sent as bytes, by name: uint32 rows, float32 positions or uint16 groups of the points of a map."""


def duplicates(index: Index, settings: Mapping[str, Any], start: StartProgress) -> Result:
    """Return the groups of duplicates; settings: which image to `keep`."""
    found: Any = index.duplicates(keep=settings.get("keep", "largest"), progress=start)
    groups = [
        {
            "tier": ", ".join(dict.fromkeys(TIER_NAMES[copy.tier] for copy in group.copies)).capitalize(),
            "similarity": group.lowest,
            "rows": group.rows,
            "keep": group.keep,
        }
        for group in found.groups
    ]
    sentences = [found.sentence, found.calibration.sentence if found.calibration else ""]
    return Result({"groups": groups, "description": " ".join(sentences).strip()}, {})


def clusters(index: Index, settings: Mapping[str, Any], start: StartProgress) -> Result:
    """Return the clusters; settings: their number `k`."""
    with start("clusters") as progress:
        found = index.clusters(settings.get("k"), progress=progress)
    rows = {name: members.astype("<u4") for name, members in found.groups}
    groups = [
        {"name": name, "size": len(members), "rows": members[:REPRESENTATIVES].tolist()}
        for name, members in rows.items()
    ]
    described, agreement = f"{found.method}.", found.agreement
    if agreement:
        described += f" Agreement with the labels: AMI {agreement['ami']:.2f}, purity {agreement['purity']:.2f}."
    return Result({"groups": groups, "description": described}, rows)


def map_of(index: Index, settings: Mapping[str, Any], start: StartProgress) -> Result:
    """Return the positions of images in the plane, and their labels and clusters as groups."""
    with start("map") as progress:
        rows, points, method = index.map(progress=progress)
    arrays = {"rows": rows.astype("<u4"), "x": points[:, 0].astype("<f4"), "y": points[:, 1].astype("<f4")}
    groupings = []
    labels, known = index.items.labels[rows], index.last_clusters()
    if classes := sorted({label for label in labels if label is not None}):
        codes = {name: number for number, name in enumerate(classes)}
        arrays["label"] = np.array([codes.get(label, len(classes)) for label in labels], "<u2")
        groupings.append({"name": "label", "groups": classes})
    if known is not None:
        assignment = known.assignment[rows]
        arrays["cluster"] = np.where(assignment < 0, len(known.sizes), assignment).astype("<u2")
        groupings.append({"name": "cluster", "groups": [f"cluster {number}" for number in range(len(known.sizes))]})
    count = f"{len(rows):,} of {plural(len(index), 'image')}" if len(rows) < len(index) else plural(len(rows), "image")
    return Result({"groupings": groupings, "description": f"{count}, {method}."}, arrays)


COMPUTATIONS: dict[str, Callable[[Index, Mapping[str, Any], StartProgress], Result]] = {
    "duplicates": duplicates,
    "clusters": clusters,
    "map": map_of,
}
"""By the name in the page's requests: from (index, settings, progress) to the result."""
