"""The columns of an index: properties of its images, and their features in shards."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ssl.data.dataset import StoredNames
from dino_ssl.data.folder import printable
from dino_ssl.errors import UserError, did_you_mean

SCHEMA = pa.schema(
    {
        "name": pa.string(),  # relative to the folder, without undecodable bytes
        "path": pa.binary(),  # the bytes of the name in the file system; null if they are those of `name`
        "size": pa.int64(),  # in bytes; of an image in a shard as well; -1 if there is no file
        "mtime": pa.int64(),  # in nanoseconds; the checksum of an image in a shard; -1 if there is neither
        "content": pa.binary(16),  # blake2b of the file, or of the pixels if there is no file
        "perceptual": pa.uint64(),  # ImageHash.phash
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.dictionary(pa.int32(), pa.string()),
        "reason": pa.string(),  # why the image cannot be used; null for a readable one
    }
)
"""Columns of items-G.parquet."""


class Items:
    """Properties of the N images of an index, row by row: sequences and arrays of length N."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def names(self) -> Sequence[str]:
        """Unique names: paths relative to the folder of images."""
        return StoredNames(self.table["name"].cast(pa.large_string()).cast(pa.large_binary()))

    @cached_property
    def sizes_bytes(self) -> np.ndarray:
        """Size of each file, int64."""
        return self.table["size"].to_numpy()

    @cached_property
    def mtimes(self) -> np.ndarray:
        """Modification time of each file in nanoseconds, int64."""
        return self.table["mtime"].to_numpy()

    @cached_property
    def content_hashes(self) -> np.ndarray:
        """Hash of the bytes of each file, 32 hex digits."""
        return np.array([value.hex() for value in self.table["content"].to_pylist()], "U32")

    @cached_property
    def perceptual_hashes(self) -> np.ndarray | None:
        """`ImageHash.phash` of each image, uint64; None if the package was missing while one was indexed."""
        column = self.table["perceptual"]
        return None if column.null_count else column.to_numpy()

    @cached_property
    def widths(self) -> np.ndarray:
        """Width of each image in pixels, int32."""
        return self.table["width"].to_numpy()

    @cached_property
    def heights(self) -> np.ndarray:
        """Height of each image in pixels, int32."""
        return self.table["height"].to_numpy()

    @cached_property
    def labels(self) -> np.ndarray:
        """Class name of each image or None, object."""
        return np.array(self.table["label"].cast(pa.string()).to_pylist() or [], object)

    def row_of(self, name: str) -> int | None:
        """Return the row of the image of this name; None if there is none."""
        row = pc.call_function("index", [self.table["name"]], pc.IndexOptions(pa.scalar(printable(name)))).as_py()
        return None if row < 0 else row

    def select(self, folder: str | None = None, label: str | None = None) -> np.ndarray | None:
        """Return [N] True for the images below a folder and of a class; None without a condition.

        Raises UserError if there is none.
        """
        where = np.ones(len(self), bool)
        folder = None if folder is None or PurePosixPath(folder) == PurePosixPath() else str(PurePosixPath(folder))
        if folder is not None:
            options = pc.MatchSubstringOptions(f"{folder}/")
            where &= pc.call_function("starts_with", [self.table["name"]], options).to_numpy()
        if label is not None:
            where &= self.labels == label
        if len(self) and not where.any():
            labels = sorted({str(known) for known in self.labels if known is not None})
            hint = did_you_mean(label, labels) if label is not None and label not in labels else ""
            parts = ([f"in the folder {folder}"] if folder else []) + ([f"of the class {label}"] if label else [])
            raise UserError(f"No image of the index is {' and '.join(parts)}{hint or '.'}")
        return None if folder is None and label is None else where

    def path(self, row: int) -> bytes:
        """Return the name of an image in the file system."""
        return self.table["path"][row].as_py() or self.table["name"][row].as_py().encode()


class Shards:
    """[N, D] float16 features in several memory-mapped files; slices and integer arrays give arrays in memory."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, parts)])
        self.shape, self.dtype, self.ndim = (int(self.starts[-1]), parts[0].shape[1]), parts[0].dtype, 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            spans = ((start - first, max(stop - first, 0)) for first in self.starts[:-1].tolist())
            pieces = [part[max(begin, 0) : end] for part, (begin, end) in zip(self.parts, spans, strict=True)]
            pieces = [piece for piece in pieces if len(piece)]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [self.parts[0][:0]])
        rows = np.arange(len(self))[rows]
        out = np.empty((*rows.shape, self.shape[1]), self.dtype)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(shard):
            out[shard == number] = self.parts[number][rows[shard == number] - self.starts[number]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)
