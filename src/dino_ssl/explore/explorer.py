"""The content of the page: images and filters, searches, computations and selections of an index."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ssl.errors import UserError, check_value
from dino_ssl.explore.images import Images
from dino_ssl.explore.jobs import Jobs
from dino_ssl.explore.results import COMPUTATIONS
from dino_ssl.explore.selections import REMOVE, Selections, export_folders
from dino_ssl.names import INDEX_INFO
from dino_ssl.search.index import Index

MAX_FOLDERS = 500
"""Entries of the list of folders."""
MAX_RESULTS, MAX_ITEMS = 2000, 1000


class Explorer:
    """The state of one server: an index, its computations and its selections.

    Args:
        index: The index.
        masks: Folder of label images; see `Images`.
        export: Folder into which selections may be copied or linked.
        read_only: Refuse changes of selections and exports.
    """

    def __init__(
        self, index: Index, *, masks: Path | None = None, export: Path | None = None, read_only: bool = False
    ) -> None:
        self.index, self.export, self.read_only = index, export, read_only
        self.images, self.jobs, self.selections = Images(index, masks), Jobs(), Selections(index.folder)
        self.version = version_of(index)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The properties that do not change while the server runs."""
        folder = self.index.folder.resolve()
        names, labels = (self.index.items.table[column].cast("string").to_pylist() for column in ("name", "label"))
        counts = Counter(label for label in labels if label is not None)
        return {
            "name": folder.name,
            "path": str(folder),
            "count": len(self.index),
            "version": self.version,
            "labels": [{"name": name, "count": counts[name]} for name in sorted(counts)],
            "folders": folder_counts(names),
            "masks": self.images.masks is not None,
            "export": self.export and str(self.export),
            "read_only": self.read_only,
        }

    def rows(self, folder: str = "", label: str = "", name: str = "") -> np.ndarray:
        """Return the rows, uint32, of the images in a folder, with a label, and with all words in their names."""
        table, keep = self.index.items.table, np.ones(len(self.index), bool)
        conditions = [("match_substring", word, True) for word in name.split()]
        conditions += [("starts_with", f"{folder}/", False)] if folder else []
        for function, text, ignore_case in conditions:
            options = pc.MatchSubstringOptions(text, ignore_case=ignore_case)
            keep &= pc.call_function(function, [table["name"]], options).to_numpy()
        if label:
            keep &= self.index.items.labels == label
        return np.flatnonzero(keep).astype("<u4")

    def items(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return what the page shows of these images."""
        table = self.index.items.table.select(["name", "label", "width", "height"]).take(rows)
        return [{"row": row, **item} for row, item in zip(rows, table.to_pylist(), strict=True)]

    def search(
        self, source: str, k: int, region: Sequence[float] | None = None, folder: str = "", label: str = ""
    ) -> dict[str, Any]:
        """Return the most similar images to an image, or to a region of it: left, top, width, height in 0 .. 1."""
        check_value("k", k, least=1, most=MAX_RESULTS)
        query, box = self.images.query(source), None
        if region is not None:
            height, width = self.images.shape(source)
            x, y, across, down = (round(part * side) for part, side in zip(region, [width, height] * 2, strict=True))
            box = x, y, max(1, across), max(1, down)
        own = query if box is None and isinstance(query, int) else None  # an image is always similar to itself
        conditions: Any = {name: value for name, value in {"folder": folder, "label": label}.items() if value}
        hits = self.index.search(query, k + 1, region=box, **conditions)
        hits = [hit for hit in hits if hit.row != own][:k]
        return {"rows": [hit.row for hit in hits], "similarity": [round(hit.similarity, 4) for hit in hits]}

    def nearest_patches(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the most similar patch in each of these images."""
        nearest = partial(self.images.nearest_patch, str(data["source"]), int(data["patch"]))
        return [nearest(str(row)) for row in self.checked(data["rows"], MAX_ITEMS)]

    def start(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Start a long computation."""
        kind = str(data["kind"])
        if kind not in COMPUTATIONS:
            raise UserError(f"Expected one of {', '.join(COMPUTATIONS)}, got {kind!r}.")
        self.jobs.start(kind, partial(COMPUTATIONS[kind], self.index, data))
        return self.jobs.state

    def result(self, kind: str) -> Any:
        """Return the last result of a kind of computation. Raises KeyError if there is none."""
        return self.jobs.results[kind]

    def checked(self, rows: Any, most: int | None = None) -> Sequence[int]:
        """Return the rows of a request. Raises UserError if one is none of the index, or if there are too many."""
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < len(self.index) for row in rows):
            raise UserError(f"Expected rows in 0 .. {len(self.index) - 1}.")
        if most is not None and len(rows) > most:
            raise UserError(f"Expected at most {most} rows, got {len(rows)}.")
        return rows

    # -- selections

    def listed(self) -> dict[str, Any]:
        """Return the version of the selections, and for each the rows of its images and how many have none."""
        version, selections = self.selections.read()
        known = pc.SetLookupOptions(self.index.items.table["name"])
        listed = []
        for selection, images in selections.items():
            found = pc.call_function("index_in", [pa.array(images, pa.string())], known).drop_null().to_pylist()
            listed.append({"name": selection, "rows": found, "missing": len(images) - len(found)})
        return {"version": version, "selections": listed}

    def selected(self, selection: str) -> list[dict[str, Any]]:
        """Return name, label, width and height of the images of a selection. Raises KeyError if there is none."""
        rows = {each["name"]: each["rows"] for each in self.listed()["selections"]}[selection]
        return [{name: item[name] for name in item if name != "row"} for item in self.items(rows)]

    def change(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Apply a change of a selection; see `Selections.change`."""
        images = [self.index.items.names[row] for row in self.checked(data.get("rows", []))]
        state = self.selections.change(
            data["operation"],
            str(data["selection"]),
            version=data["version"],
            images=images,
            to=str(data.get("to", "")),
        )
        return {"version": state.version}

    def export_all(self, data: Mapping[str, Any]) -> dict[str, int]:
        """Copy or link the images of all selections but REMOVE into class folders."""
        if self.export is None:
            raise UserError("Start the page with a folder, `export`, to copy or link files into it.")
        files: dict[str, dict[str, Path | None]] = {
            each["name"]: {str(self.index.items.names[row]): self.index.path_of(row) for row in each["rows"]}
            for each in self.listed()["selections"]
            if each["name"] != REMOVE
        }
        return export_folders(self.export, files, data["how"])._asdict()


def version_of(index: Index) -> str:
    """Return a key of the state of an index, as text of an address.

    Generations start again if an index is removed and another one is built in its folder, so the weights and the time
    of the last change are parts of the key.
    """
    changed = (index.folder / INDEX_INFO).stat().st_mtime_ns
    parts = index.folder.resolve(), index.generation, index.store.info.checkpoint["hash"], changed
    return hashlib.sha256(" ".join(map(str, parts)).encode("utf-8", "replace")).hexdigest()[:12]


def folder_counts(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the folders of images with the number of images below each; of too many, those of the upper levels."""
    counts = Counter[str]()
    for folder, count in Counter(name.rpartition("/")[0] for name in names).items():
        parts = folder.split("/") if folder else []
        counts.update({"/".join(parts[: depth + 1]): count for depth in range(len(parts))})
    upper = sorted(counts, key=lambda folder: (folder.count("/"), -counts[folder]))[:MAX_FOLDERS]
    return [{"name": folder, "count": counts[folder]} for folder in sorted(upper)]
