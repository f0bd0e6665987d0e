"""The folder of an index.

    index.json           what the index holds, and the names of its files; written last, atomically
    items-G.parquet      one row per image, readable ones first
    features-G-S.f16     float16 unit features of the readable images, in shards

G is the generation, which grows with every change. A writer adds files of a new generation next to the old ones and
then replaces index.json, so the last complete state survives a crash at any moment. Only then are old files removed;
readers keep them mapped.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.dataset import Skipped
from dino_ssl.errors import UserError
from dino_ssl.evals.resumable import append_rows
from dino_ssl.files import atomic_write, check_format, locked, mark_output, read_json, remove_parts, write_json
from dino_ssl.names import INDEX_INFO, check_index
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.search.items import SCHEMA, Items, Shards

FORMAT = 1
"""Version of the files of an index."""
SHARD_BYTES = 2**28
"""Size of a complete shard: an update copies less than this."""
BUFFER_ROWS = 4096
Labels = Callable[[Sequence[str]], Sequence[str | None]]
"""Names of images -> their class names."""


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """The content of index.json."""

    format: int = FORMAT
    generation: int = 0
    rows: int = 0
    """Readable images."""
    pending: int = 0
    """Images that an interrupted update has not read yet."""
    dimensions: int = 0
    items: str = ""
    """Name of the file."""
    shards: dict[str, int] = field(default_factory=dict)
    """Rows of each file of features."""
    images: dict[str, Any] = field(default_factory=dict)
    """Where the images are: {"folder": path}, {"dataset": settings} or {"object": type}."""
    content_key: str | None = None
    """Key of the content of a dataset without files."""
    checkpoint: dict[str, Any] = field(default_factory=dict)
    """Source, weights ("last" or "best"), num_heads, and the hash of the weights."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    precision: str = "float32"
    versions: dict[str, str] = field(default_factory=dict)


class Store:
    """One complete state of an index, read-only; its files stay readable while it is used."""

    def __init__(self, folder: Path, info: IndexInfo) -> None:
        self.folder, self.info = folder, info
        self.table = pq.read_table(pa.memory_map(os.fsencode(folder / info.items)))
        self.items = Items(self.table.slice(0, info.rows))
        parts = [  # copy-on-write: torch warns of arrays that it could not write to
            np.memmap(folder / name, np.float16, "c", shape=(rows, info.dimensions))
            for name, rows in info.shards.items()
        ]
        empty = np.empty((0, info.dimensions), np.float16)
        self.features: Any = Shards(parts) if len(parts) > 1 else (parts or [empty])[0]

    def with_places(self, info: IndexInfo) -> "Store":
        """Return this state with the paths of the images and of the checkpoint in `info`, which may have been moved."""
        places = replace(self.info, images=info.images, checkpoint=info.checkpoint)
        if places == self.info:
            return self
        write_json(self.folder / INDEX_INFO, to_dict(places))
        return open_store(self.folder)

    @cached_property
    def skipped(self) -> list[Skipped]:
        """Images that cannot be used."""
        columns = self.table.slice(self.info.rows).select(["name", "reason"]).to_pydict()
        return [*map(Skipped, columns["name"], columns["reason"])]


def read_info(folder: Path) -> IndexInfo | None:
    """Return the content of index.json; None if there is none. Raises UserError for another version, or a damaged one.

    A file that is cut or no JSON was not written by an index, which replaces it atomically.
    """
    content = read_json(folder / INDEX_INFO)
    if content is None and not (folder / INDEX_INFO).exists():
        return None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{folder / INDEX_INFO} is damaged. Remove {folder} and build the index again.")
    check_format(folder / INDEX_INFO, content["format"], FORMAT)
    return from_dict(IndexInfo, content)


def open_store(folder: Path) -> Store:
    """Open the last complete state of an index. Raises UserError if there is none, or a file is missing."""
    reason: Exception | None = None
    for _ in range(3):  # a writer may remove the files between the two reads
        check_index(str(folder))
        info = read_info(folder)
        try:
            return Store(folder, info or IndexInfo())
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = error
    raise UserError(f"The index {folder} is incomplete ({reason}). Remove it and build it again.") from reason


@contextmanager
def writing(folder: Path) -> Iterator[Store | None]:
    """Hold an index for this process and yield its last state, None for a new one; remove what a killed writer left.

    Raises UserError if another process writes it, or if the folder has other content.
    """
    mark_output(folder)
    if (info := read_info(folder)) is None and (others := [path.name for path in folder.iterdir() if not _ours(path)]):
        raise UserError(f"{folder} is no index: it has {others[0]}. Expected a new folder, or an index to update.")
    with locked(folder, "written"):
        remove_parts(folder)
        info = read_info(folder)
        remove_unused(folder, info)
        yield None if info is None else open_store(folder)


def _ours(path: Path) -> bool:
    return path.name.startswith((".", "items-", "features-"))


def remove_unused(folder: Path, info: IndexInfo | None) -> None:
    """Remove the files of other generations than this one."""
    used = {info.items, *info.shards} if info else set()
    for path in (*folder.glob("items-*.parquet"), *folder.glob("features-*.f16")):
        if path.name not in used:
            path.unlink(missing_ok=True)


class Writer:
    """The next generation of an index: kept rows first, then new ones; nothing is visible before `commit`."""

    def __init__(self, folder: Path, store: Store | None, items: pa.Table, kept: np.ndarray, dimensions: int) -> None:
        """Take over the rows `kept` (ascending) of a state, with `items`; its complete shards are used as they are."""
        self.folder, self.dimensions = folder, dimensions
        self.generation = store.info.generation + 1 if store else 1
        self.shard_rows = max(BUFFER_ROWS, SHARD_BYTES // (2 * dimensions))
        self.shards: dict[str, int] = {}
        self.rows, self._current = len(items), ""
        self._buffer: list[np.ndarray] = []
        self._tables, self._recent = [items], []
        start = 0
        for name, count in store.info.shards.items() if store else ():
            own = kept[np.searchsorted(kept, start) : np.searchsorted(kept, start + count)]
            if len(own) == count == self.shard_rows:
                self.flush()
                self.shards[name], self._current = count, name
            else:
                for at in range(0, len(own), BUFFER_ROWS):
                    self._append(store.features[own[at : at + BUFFER_ROWS]])  # pyright: ignore
            start += count

    def add(self, items: pa.Table, features: np.ndarray) -> None:
        """Append images: their items, and float16 unit features [n, D]."""
        self.rows += len(items)
        self._append(features)
        self._recent.append(items)
        if len(self._recent) >= 64:  # small tables take more memory than their content
            self._tables.append(_concat(self._recent))
            self._recent = []

    def _append(self, features: np.ndarray) -> None:
        self._buffer.append(features)
        if sum(map(len, self._buffer)) >= BUFFER_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows."""
        rows = np.concatenate(self._buffer) if self._buffer else np.empty((0, self.dimensions), np.float16)
        self._buffer = []
        while len(rows):
            if not self._current or self.shards[self._current] == self.shard_rows:
                self._current = f"features-{self.generation}-{len(self.shards)}.f16"
                self.shards[self._current] = 0
            written = self.shards[self._current]
            part, rows = np.split(rows, [self.shard_rows - written])
            append_rows(self.folder / self._current, part, written)
            self.shards[self._current] += len(part)

    def commit(self, info: IndexInfo, skipped: Sequence[pa.Table], labels: Labels) -> Store:
        """Make this generation the state of the index, and return it. labels: see `Listing.labels`."""
        self.flush()
        rows, items = _concat([*self._tables, *self._recent]), f"items-{self.generation}.parquet"
        known = pa.array(labels(rows["name"].to_pylist()), pa.string()).dictionary_encode()
        rows = rows.set_column(SCHEMA.names.index("label"), SCHEMA.field("label"), known)
        table = _concat([rows, *skipped])
        atomic_write(self.folder / items, lambda part: _write_table(table, part))
        state = dict(generation=self.generation, rows=self.rows, dimensions=self.dimensions)
        info = replace(info, **state, items=items, shards=self.shards)
        write_json(self.folder / INDEX_INFO, to_dict(info))
        self.discard()
        return open_store(self.folder)

    def discard(self) -> None:
        """Remove the files that do not belong to the last complete state: the disk may be full."""
        remove_unused(self.folder, read_info(self.folder))


def _write_table(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:  # its name need not be UTF-8
        pq.write_table(table, file)


def _concat(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()
