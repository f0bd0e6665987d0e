"""The duplicates of an index: found with its calibrated threshold, shown, and moved to a folder."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_ssl.config import from_dict
from dino_ssl.data.dataset import BadImage
from dino_ssl.errors import UserError, check_value
from dino_ssl.files import check_format, read_json, write_json
from dino_ssl.formatting import Summarized, format_bytes, plural
from dino_ssl.progress import Progress, StartProgress
from dino_ssl.search.calibration import Calibration, calibrate
from dino_ssl.search.duplicates import TIERS, DuplicateGroup, Keep, Tier, find_duplicates, known_components
from dino_ssl.search.gallery import Group, Tile, write_gallery
from dino_ssl.search.moves import Move, Refused, move_files
from dino_ssl.search.query import image_vector

if TYPE_CHECKING:
    from dino_ssl.search.index import Index

FORMAT = 1
"""Version of the file that keeps the threshold of an index."""
THUMBNAIL_SIDE = 256
COLUMNS = ("group", "action", "name", "tier", "similarity", "lowest", "width", "height", "bytes")
TIER_NAMES: dict[Tier, str] = {
    "bytes": "same bytes",
    "pixels": "same pixels",
    "hash": "perceptual hash",
    "features": "features",
}


@dataclass(frozen=True)
class Duplicates(Summarized):
    """Groups of duplicates of an index."""

    index: "Index"
    groups: list[DuplicateGroup]
    threshold: float
    """Cosine of the features of duplicates."""
    calibration: Calibration | None
    """Where the threshold comes from; None if the caller has set it, or if there is nothing to compare."""

    @property
    def copies(self) -> list[int]:
        """Rows of all images that are not kept."""
        return [copy.row for group in self.groups for copy in group.copies]

    @property
    def nbytes(self) -> int:
        """Size of the files of all images that are not kept."""
        return int(np.maximum(self.index.items.sizes_bytes[self.copies], 0).sum()) if self.groups else 0

    @property
    def counts(self) -> dict[Tier, int]:
        """Number of images that are not kept, by tier; without perceptual hashes, that tier is missing."""
        counts = Counter(copy.tier for group in self.groups for copy in group.copies)
        return {
            tier: counts[tier] for tier in TIERS if tier != "hash" or self.index.items.perceptual_hashes is not None
        }

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        counts = {TIER_NAMES[tier]: count for tier, count in self.counts.items()}
        return {"groups": len(self.groups), "copies": len(self.copies), **counts, "threshold": f"{self.threshold:.4f}"}

    @property
    def sentence(self) -> str:
        """The number of groups and of duplicates, in all and by tier, as a sentence."""
        counts = ", ".join(f"{TIER_NAMES[tier]} {count:,}" for tier, count in self.counts.items())
        groups, images = plural(len(self.groups), "group"), plural(len(self.index), "image")
        copies = f"{plural(len(self.copies), 'duplicate')} of those to keep, {format_bytes(self.nbytes)}"
        return f"{groups} among {images}, with {copies}: {counts}."

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """One line per image of a group: group, action, name, tier, similarity to the image that is kept, size."""
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        items = self.index.items
        for number, group in enumerate(self.groups, 1):
            for row, tier, similarity in _members(group):
                values = (number, "copy" if tier else "keep", items.names[row], tier, similarity, group.lowest)
                sizes = (int(column[row]) for column in (items.widths, items.heights, items.sizes_bytes))
                for name, value in zip(COLUMNS, (*values, *sizes), strict=True):
                    columns[name].append(value)
        return columns

    def write_html(self, path: str | Path, progress: Progress | None = None) -> Path:
        """Write a page of all groups with thumbnails, and return its path."""
        lead = self.sentence if self.calibration is None else f"{self.sentence} {self.calibration.sentence}"
        return write_gallery(path, f"Duplicates in {self.index.folder.name}", lead, self._pages(progress))

    def _pages(self, progress: Progress | None) -> Iterator[Group]:
        for number, group in enumerate(self.groups, 1):
            tiers = ", ".join(TIER_NAMES[tier] for tier in TIERS if tier in {copy.tier for copy in group.copies})
            note = f"{tiers} · lowest similarity {group.lowest:.4f}"
            yield Group(f"Group {number}", self._tiles(group), note)
            if progress is not None:
                progress(number, len(self.groups))

    def _tiles(self, group: DuplicateGroup) -> Iterator[Tile]:
        items = self.index.items
        for row, tier, similarity in _members(group):
            try:
                image = self.index.thumbnail(row, THUMBNAIL_SIDE)
            except BadImage:  # removed or changed since it was indexed
                image = None
            size = f"{items.widths[row]} x {items.heights[row]}, {format_bytes(int(items.sizes_bytes[row]))}"
            note = f"{size} · {TIER_NAMES[tier]}, {similarity:.4f}" if tier else size
            yield Tile(items.names[row], image, note, "" if tier else "keep", self.index.path_of(row))

    def plan(self, folder: str | Path) -> tuple[list[Move], list[Refused]]:
        """Return the moves of all copies into a folder, which keep their folders, and the copies that stay.

        A copy stays if its file or that of the image to keep has changed since it was indexed, and if it is a link, or
        the image to keep is one to it. Files that were moved there before are neither.
        """
        moves, refused = [], []
        for group in self.groups:
            for row in (copy.row for copy in group.copies):
                name, source = self.index.items.names[row], self.index.path_of(row)
                target = Path(folder) / os.fsdecode(self.index.items.path(row))
                if source is not None and target.is_file() and not source.exists():
                    continue
                if reason := self._obstacle(row, group.keep):
                    refused.append(Refused(source or Path(name), reason))
                elif source is not None:
                    moves.append(Move(source, target))
        return moves, refused

    def _obstacle(self, row: int, keep: int) -> str:
        """Return why a copy must not be moved; an empty string if it may be."""
        source, kept = self.index.path_of(row), self.index.path_of(keep)
        if source is None or kept is None:
            return "not a file in a folder"
        the_kept = f"the image to keep, {self.index.items.names[keep]},"
        if change := self.index.change_of(keep):
            return f"{the_kept} {change}"
        if source.is_symlink():
            return "is a link"
        return self.index.change_of(row) or (f"{the_kept} is a link to it" if source.samefile(kept) else "")

    def move(self, folder: str | Path, progress: Progress | None = None) -> list[Refused]:
        """Move all copies to a folder and return those that stay, with the reason. `undo_moves(folder)` moves back."""
        moves, refused = self.plan(folder)
        return refused + (move_files(moves, Path(folder), progress) if moves else [])


def _members(group: DuplicateGroup) -> list[tuple[int, Any, Any]]:
    """Return (row, tier, similarity) of every image; without the latter two for the image to keep."""
    return [(group.keep, None, None), *group.copies]


def duplicates_of(
    index: "Index", threshold: float | None, *, keep: Keep, distance: int, progress: StartProgress
) -> Duplicates:
    """Return the duplicates of an index; see `Index.duplicates`."""
    check_value("threshold", threshold, above=-1, most=1)
    calibration = None
    if threshold is None and len(index) > 1:
        with progress("threshold, of edited copies") as show:
            calibration = calibration_of(index, show)
    used = threshold if threshold is not None else calibration.threshold if calibration else 1.0
    options: Any = {"keep": keep, "distance": distance, "start_progress": progress}
    groups = find_duplicates(index.features, index.items, used, read=index.read, **options)
    return Duplicates(index, groups, used, calibration)


def calibration_of(index: "Index", progress: Progress | None = None) -> Calibration:
    """Return the calibration of the present state of an index, kept in its folder."""
    file = index.folder / "duplicates.json"
    key = {"checkpoint": index.store.info.checkpoint["hash"], "generation": index.generation}
    if isinstance(saved := read_json(file), dict):
        check_format(file, saved.get("format"), FORMAT)
        if {name: saved.get(name) for name in key} == key:
            return from_dict(Calibration, saved["calibration"])
    known = known_components(index.items).roots
    calibration = calibrate(index.features, known, index.read, partial(image_vector, index), progress)
    with suppress(UserError):  # a read-only folder: measured again the next time
        write_json(file, {"format": FORMAT, **key, "calibration": asdict(calibration)})
    return calibration
