"""The index of tar shards: one row per image, in an uncompressed Arrow file that is memory-mapped.

Columns: `shard` (number of the tar file), `offset` and `length` of the image's bytes in it, `size` (width and height in
pixels once decoded), `label` (-1 if unknown), `crc32` of the bytes, and `path`. Each shard is one record batch, written
when the shard is complete.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino_ssl.data.dataset import BadImage, Skipped
from dino_ssl.data.image_header import SUFFIXES, probe
from dino_ssl.files import atomic_write
from dino_ssl.formatting import visible

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index.arrow"
FORMAT = 2
"""Version of info.json and index.arrow."""
MEMBER = re.compile(r"(?!(?:.*/)?\.\./)((?:.*/)?[^./]+)\.([^/]+)")
"""(key, extension) of a member in WebDataset's layout: the extension begins at the first dot of the file name.
Names with `..` are ignored: outputs are named after images, and would leave their folder."""


class ImageRow(NamedTuple):
    """One image of a shard."""

    path: str
    offset: int
    length: int
    size: tuple[int, int]
    crc32: int
    class_name: str | None


def write_index(directory: Path, shards: Iterable[Sequence[ImageRow]], labels: dict[str, int]) -> None:
    """Write index.arrow for the images of `shards`, in order; classes that `labels` lacks get the next label."""
    import pyarrow as pa

    def batches() -> "Iterator[pa.RecordBatch]":
        for number, rows in enumerate(shards):
            label = [-1 if row.class_name is None else labels.setdefault(row.class_name, len(labels)) for row in rows]
            columns = {name: [getattr(row, name) for row in rows] for name in ImageRow._fields}
            yield pa.RecordBatch.from_pydict(columns | {"shard": [number] * len(rows), "label": label}, _schema())

    _write(directory / INDEX, batches())


def sort_labels(directory: Path, labels: dict[str, int]) -> list[str]:
    """Renumber the labels in index.arrow by class, numbers by value, then text; return the classes in this order."""
    import pyarrow as pa

    classes = sorted(labels, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    rank = {name: label for label, name in enumerate(classes)}
    new_labels = np.array([*map(rank.get, labels), -1])  # indexed by the old labels; the last one is that of -1
    file = directory / INDEX
    columns = ((batch, pa.array(new_labels[numbers(batch["label"])])) for batch in read_batches(file))
    _write(file, (batch.set_column(batch.schema.names.index("label"), "label", column) for batch, column in columns))
    return classes


def _schema() -> "pa.Schema":
    import pyarrow as pa

    types = dict(shard=pa.int32(), offset=pa.int64(), length=pa.int64(), size=pa.list_(pa.int64(), 2))
    types |= dict(label=pa.int64(), crc32=pa.uint32(), path=pa.large_string())
    return pa.schema(types, metadata={"format_version": str(FORMAT)})


def _write(file: Path, batches: "Iterable[pa.RecordBatch]") -> None:
    import pyarrow as pa

    def write(aside: Path) -> None:
        with pa.ipc.new_file(str(aside), _schema()) as writer:
            for batch in batches:
                writer.write_batch(batch)

    atomic_write(file, write)


def read_batches(file: Path) -> "Iterator[pa.RecordBatch]":
    """Yield the record batches of index.arrow, which are read one at a time."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as source, pa.ipc.open_file(source) as reader:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def map_index(file: Path) -> "pa.Table":
    """Return index.arrow as a mapped table, with `path` as bytes; raise OSError or ValueError if it is damaged."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all().cast(_schema())
        table = table.set_column(len(table.schema) - 1, "path", table["path"].cast("large_binary"))
        table.validate()
        table["path"].validate(full=True)  # its offsets: reading by a wrong one would end the process
    except (KeyError, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    return table


def numbers(column: Any) -> np.ndarray:
    """Return a column of numbers, or [N, 2] sizes, as a writable array in memory."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(column.type):
        return np.array(pc.call_function("list_flatten", [column])).reshape(-1, 2)
    return np.array(column)


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
                tar.members.clear()  # type: ignore[attr-defined]  # it would take a kilobyte for each member
                image = next((file for extension, file in members.items() if f".{extension}" in SUFFIXES), None)
                if image is None:
                    continue
                path = visible(os.fsencode(f"{shard.name}/{image.name}").decode("utf-8", "backslashreplace"))
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
    with suppress(KeyError, ValueError, AttributeError, RecursionError):  # no KEY.json, or not a JSON object
        description = json.loads(_content(tar, members["json"]))
        names = [description.get("class"), *names, description.get("label")]
    return next((visible(str(name)) for name in names if isinstance(name, str | int) and name != ""), None)
