"""The index of tar shards: one row per image, in an uncompressed Arrow file that is memory-mapped.

Columns: `shard` (number of the tar file), `offset` and `length` of the image's bytes in it, `size` (width and height in
pixels once decoded), `label` (-1 if unknown), `crc32` of the bytes, and `path`. There is one record batch, so that each
column is one contiguous array, which is mapped and never loaded as a whole.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dino_ssl.data.dataset import BadImage, Skipped
from dino_ssl.data.decode import SUFFIXES, probe
from dino_ssl.files import atomic_write

INDEX = "index.arrow"
DTYPES = {"shard": "int32", "offset": "int64", "length": "int64", "size": "int64", "label": "int64", "crc32": "uint32"}
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""(key, extension) of a member in WebDataset's layout: the extension begins at the first dot of the file name."""

A = TypeVar("A")
B = TypeVar("B")


class ImageRow(NamedTuple):
    """One image of a shard."""

    path: str
    offset: int
    length: int
    size: tuple[int, int]
    crc32: int
    class_name: str | None


def write_index(
    directory: Path, shards: Iterable[Sequence[ImageRow]], classes: Sequence[str] | None
) -> Sequence[str] | None:
    """Write index.arrow for the images of `shards` in order, and return the classes in the order of their labels.

    If `classes` is None, all class names are taken: numbers by value, then text. Returns None if there is no image.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    types = {name: getattr(pa, dtype)() for name, dtype in DTYPES.items() if name != "label"}
    types |= {"size": pa.list_(pa.int64(), 2), "path": pa.large_string(), "class_name": pa.large_string()}
    schema = pa.schema(types.items())
    batches = (
        pa.RecordBatch.from_pylist([row._asdict() | {"shard": number} for row in rows], schema)
        for number, rows in enumerate(shards)
    )
    table = pa.Table.from_batches(batches, schema).combine_chunks()
    if not len(table):
        return None
    if classes is None:
        classes = sorted(table["class_name"].unique().drop_null().to_pylist(), key=_class_order)
    options = pc.SetLookupOptions(pa.array(classes, pa.large_string()))
    label = pc.call_function("index_in", [table["class_name"]], options).fill_null(-1).cast(pa.int64())
    table = table.drop_columns("class_name").append_column("label", label)

    def write(aside: Path) -> None:
        with pa.ipc.new_file(str(aside), table.schema) as writer:
            writer.write_table(table)

    atomic_write(directory / INDEX, write)
    return classes


def _class_order(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def map_index(file: Path) -> dict[str, np.ndarray]:
    """Return the columns of index.arrow as mapped arrays; raise OSError or ValueError if it is damaged.

    `size` is [N, 2]. `path` is UTF-8 text, divided by the N + 1 `path_ends`. Arrays are writable, as torch requires,
    but changes stay in the process.
    """
    import pyarrow as pa

    mapped = np.asarray(np.memmap(file, np.uint8, "c"))
    batch = pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0)
    batch.validate()

    def view(buffer: Any, dtype: str, count: int) -> np.ndarray:
        start = buffer.address - mapped.ctypes.data
        return mapped[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    counts = {name: 2 * len(batch) if name == "size" else len(batch) for name in DTYPES}
    columns = {name: view(batch[name].buffers()[-1], DTYPES[name], count) for name, count in counts.items()}
    _, ends, text = batch["path"].buffers()
    columns |= {"path": view(text, "uint8", text.size), "path_ends": view(ends, "int64", len(batch) + 1)}
    return columns | {"size": columns["size"].reshape(-1, 2)}


def map_in_order(function: Callable[[A], B], items: Iterable[A], threads: int, window: int) -> Iterator[B]:
    """Yield function(item) in order, computed by threads, at most `window` items ahead."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(items, window)):
            yield from pool.map(function, chunk)


def scan_shard(shard: Path) -> tuple[list[ImageRow], list[Skipped]]:
    """Read a tar file in WebDataset's layout from start to end, and return its images and what cannot be used.

    Members of one sample are adjacent and share a key. The first member with an image's extension is the image. Its
    class is "class" of KEY.json, else KEY.cls, else "label" of KEY.json.
    """
    rows: list[ImageRow] = []
    skipped: list[Skipped] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            named = ((match, file) for file in tar if file.isreg() and (match := MEMBER.fullmatch(file.name)))
            for _, sample in groupby(named, lambda item: item[0][1]):
                members = {match[2].lower(): file for match, file in sample}
                image = next((file for extension, file in members.items() if f".{extension}" in SUFFIXES), None)
                if image is None:
                    continue
                path = os.fsencode(f"{shard.name}/{image.name}").decode("utf-8", "backslashreplace")
                data = _content(tar, image)
                try:
                    size = probe(path, data)
                except BadImage as bad:
                    skipped.append(Skipped(path, bad.reason))
                    continue
                class_name = _class_name(tar, members)
                rows.append(ImageRow(path, image.offset_data, len(data), size, zlib.crc32(data), class_name))
    except (tarfile.TarError, OSError) as error:
        skipped.append(Skipped(shard.name, f"incomplete tar file: {error}"))
    return rows, skipped


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _class_name(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str | None:
    names = [_content(tar, members["cls"]).decode("utf-8", "replace").strip()] if "cls" in members else []
    with suppress(KeyError, ValueError, AttributeError):  # no KEY.json, or not a JSON object
        description = json.loads(_content(tar, members["json"]))
        names = [description.get("class"), *names, description.get("label")]
    return next((str(name) for name in names if isinstance(name, str | int) and name != ""), None)
