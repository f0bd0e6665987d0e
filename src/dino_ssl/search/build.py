"""Build and update an index: only new and changed images are read, and a known content keeps its features."""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dino_ssl import __version__
from dino_ssl.data.image_header import NEEDS_HEIF
from dino_ssl.data.sources import DatasetSource
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext
from dino_ssl.loading import Checkpoint
from dino_ssl.progress import Progress
from dino_ssl.runtime import Precision, machine, start
from dino_ssl.search.items import SCHEMA
from dino_ssl.search.listing import Listing, describe_source, list_images
from dino_ssl.search.reading import KnownContent, Record, has_perceptual_hashes, read_images
from dino_ssl.search.store import IndexInfo, Store, Writer, writing
from dino_ssl.terminal import logger

SAVE_SECONDS = 300
"""Seconds after which an update is saved: an interrupted one resumes there."""
SOLVABLE = {*map(os.strerror, errno.errorcode), NEEDS_HEIF}
"""Reasons why an image cannot be read that may be gone although its file has not changed: it is read again."""
INSTALL = 'pip install "dino-ssl[search]"'


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings of reading the images of an index; the features depend on `size`."""

    size: int | None = None
    """Side of the center crop in pixels; None: the size at which the run evaluates its network."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 0
    """Worker processes that decode images."""
    precision: Precision | None = None
    """Of forward passes; None: bfloat16 if the device supports it, otherwise float32."""

    def __post_init__(self) -> None:
        check_range(self, "size", "batch_size", least=1)
        check_range(self, "workers", least=0)


class Changes(NamedTuple):
    """Numbers of images that an update added, reused, removed and kept."""

    added: int = 0
    """Rows of new and changed images."""
    reused: int = 0
    """Of these, rows of a known content: renamed, copied and touched files, which were not decoded."""
    removed: int = 0
    """Rows of images that are gone or have changed."""
    kept: int = 0
    """Rows that did not change."""


class Plan(NamedTuple):
    """The listed images by what is done with them; positions in the listing, int64."""

    kept: np.ndarray
    """Unchanged readable images, in the order of their rows."""
    kept_rows: np.ndarray
    retained: np.ndarray
    """Unchanged images that cannot be used."""
    retained_rows: np.ndarray
    """Their rows in the table of all items."""
    to_read: np.ndarray
    """New and changed images."""


def compare(listing: Listing, store: Store | None) -> Plan:
    """Return which images are unchanged: those of the same path, size and modification time."""
    count, none = len(listing.paths), np.empty(0, np.int64)
    if store is None:
        return Plan(none, none, none, none, np.arange(count))
    table = store.table
    old = pc.call_function("coalesce", [table["path"], table["name"].cast(pa.binary())])
    row = (
        pc.call_function("index_in", [listing.paths], pc.SetLookupOptions(old))
        .fill_null(-1)
        .to_numpy()
        .astype(np.int64)
    )
    same = row >= 0
    for column, present in (("size", listing.sizes), ("mtime", listing.mtimes)):
        same &= table[column].to_numpy()[row] == present
    if has_perceptual_hashes() and store.items.perceptual_hashes is None:
        missing = table["perceptual"].is_null().to_numpy() & table["reason"].is_null().to_numpy()
        same &= ~missing[row]
    may_be_solved = np.zeros(len(table), bool)
    reasons = table["reason"].slice(store.info.rows).to_pylist()  # readable images have none
    may_be_solved[store.info.rows :] = [reason in SOLVABLE for reason in reasons]
    same &= ~may_be_solved[row]
    if listing.content_key != store.info.content_key:
        same[:] = False
    is_row = same & (row < store.info.rows)
    kept, retained = np.flatnonzero(is_row), np.flatnonzero(same & ~is_row)
    kept = kept[np.argsort(row[kept])]
    return Plan(kept, row[kept], retained, row[retained], np.flatnonzero(~same))


def update_index(
    folder: Path,
    checkpoint: Checkpoint,
    source: DatasetSource,
    settings: BuildSettings,
    progress: Progress | None = None,
) -> tuple[Store, Changes]:
    """Make the index the one of these images, and return its state and what has changed.

    Raises UserError if the index has features of other weights or another preprocessing, or of another source.
    """
    hardware = machine(next(checkpoint.backbone.parameters()).device)
    if hardware.ranks > 1:
        raise UserError("An index is written by one process: start it without torchrun.")
    info = new_info(checkpoint, source, settings)
    with writing(folder) as store:
        if store is not None:
            info = with_bit_depth(info, store.info.preprocessing.bit_depth)
            check_same(folder, store.info, info)
        listing = list_images(source, progress)
        plan, rows = compare(listing, store), store.info.rows if store else 0
        changes = Changes(removed=rows - len(plan.kept), kept=len(plan.kept))
        unusable = len(plan.retained) + len(listing.skipped)
        complete = not len(plan.to_read) and store is not None and len(plan.kept) + unusable == len(store.table)
        if store is not None and complete:
            return store.with_places(info), changes
        if not has_perceptual_hashes():
            logger.info(f"Perceptual hashes, by which edited copies are found, need more packages: {INSTALL}")
        with start(settings.precision or hardware.inference_precision, hardware.device) as rt:
            context = EvalContext(
                device=rt.device, workers=settings.workers, batch_size=settings.batch_size, autocast=rt.autocast
            )
            has_files = bool((listing.sizes >= 0).any())
            dataset = listing.open(plan.to_read).with_bit_depth(info.preprocessing.bit_depth)
            images = read_images(
                checkpoint.backbone, dataset, has_files, info.preprocessing, KnownContent(store), context
            )
            info = replace(info, precision=rt.precision, content_key=listing.content_key)
            info = with_bit_depth(info, dataset.bit_depth)
            store, added, reused = _write(folder, listing, plan, info, store, dataset.names, images, progress)
        return store, changes._replace(added=added, reused=reused)


def new_info(checkpoint: Checkpoint, source: DatasetSource, settings: BuildSettings) -> IndexInfo:
    """Return the content of index.json that does not depend on the images."""
    source_name: str | None = checkpoint.source
    if checkpoint.folder is not None:
        source_name = str(Path(checkpoint.source).absolute())
    elif checkpoint.source == type(checkpoint.backbone).__name__:  # a Python object
        source_name = None
    return IndexInfo(
        images=describe_source(source),
        checkpoint={
            "source": source_name,
            "weights": checkpoint.weights,
            "num_heads": checkpoint.num_heads,
            "hash": checkpoint.hash,
        },
        dimensions=checkpoint.backbone.embed_dim,
        preprocessing=replace(checkpoint.backbone.transform, size=settings.size or checkpoint.backbone.transform.size),
        versions={"dino": __version__, "torch": torch.__version__},
    )


def with_bit_depth(info: IndexInfo, bits: int | None) -> IndexInfo:
    """Return the info with this bit depth of 16-bit files, unless it has one: later updates and queries use it."""
    bits = info.preprocessing.bit_depth or bits
    return replace(info, preprocessing=replace(info.preprocessing, bit_depth=bits))


def check_same(folder: Path, old: IndexInfo, new: IndexInfo) -> None:
    """Raise UserError if an index has other features than these, or images of a folder that still exists."""
    if old.checkpoint["hash"] != new.checkpoint["hash"]:
        names = (f"{info.checkpoint['source'] or 'a Python object'} ({info.checkpoint['hash']})" for info in (old, new))
        raise UserError(
            f"{folder} has features of other weights, {', than '.join(names)}. Use the first, or set another `out`."
        )
    if old.preprocessing != new.preprocessing:
        raise UserError(
            f"{folder} has features at {old.preprocessing}; got {new.preprocessing}.\n"
            f"Set `size` to {old.preprocessing.size}, or set another `out`."
        )
    if old.images != new.images and "folder" in old.images and Path(old.images["folder"]).exists():
        old_name, new_name = (str(next(iter(info.images.values()))) for info in (old, new))
        raise UserError(f"{folder} is the index of {old_name}; got {new_name}. Set another `out`.")


def _write(
    folder: Path,
    listing: Listing,
    plan: Plan,
    info: IndexInfo,
    store: Store | None,
    names: Sequence[str],
    images: Iterator[tuple[list[Record], np.ndarray]],
    progress: Progress | None,
) -> tuple[Store, int, int]:
    """Write the next generation: return its state, and the numbers of added rows and of those with known features."""
    table, total = SCHEMA.empty_table() if store is None else store.table, len(plan.to_read)
    refused = [Record(reason=item.reason) for item in listing.skipped]
    skipped = [table.take(plan.retained_rows), _table([item.name for item in listing.skipped], refused)]
    writer = Writer(folder, store, table.take(plan.kept_rows), plan.kept_rows, info.dimensions)
    done, added, reused, saved = 0, 0, 0, time.monotonic()
    try:
        for records, features in images:
            part, last = plan.to_read[done : done + len(records)], done + len(records)
            batch = _table(names[done:last], records, listing, part)
            readable = np.array([record.reason is None for record in records])
            writer.add(batch.filter(readable), features)
            skipped.append(batch.filter(~readable))
            done, added = last, added + len(features)
            reused += sum(record.known for record in records)
            if progress is not None:
                progress(done, total)
            if time.monotonic() - saved > SAVE_SECONDS and done < total:
                store = writer.commit(replace(info, pending=total - done), skipped, listing.labels)
                writer = Writer(folder, store, store.items.table, np.arange(store.info.rows), info.dimensions)
                saved = time.monotonic()
        if not writer.rows:
            first = pa.concat_tables(skipped).slice(0, 1).to_pylist()[0]
            kept = "" if store is None else " The index keeps its earlier images."
            raise UserError(f"None of the {total:,} images can be read. {first['name']}: {first['reason']}{kept}")
        return writer.commit(info, skipped, listing.labels), added, reused
    except KeyboardInterrupt:
        writer.commit(replace(info, pending=total - done), skipped, listing.labels)
        raise
    finally:
        writer.discard()


def _table(
    names: Sequence[str],
    records: Sequence[Record],
    listing: Listing | None = None,
    positions: np.ndarray | None = None,
) -> pa.Table:
    """Return the items of images, without labels; without a listing, of files that a dataset has refused."""
    columns: dict[str, pa.Array] = {name: pa.nulls(len(names), SCHEMA.field(name).type) for name in ("path", "label")}
    columns["name"] = pa.array(names, pa.string())
    for name in ("content", "perceptual", "width", "height", "reason"):
        columns[name] = pa.array([getattr(record, name) for record in records], SCHEMA.field(name).type)
    if listing is None or positions is None:
        return _in_order(columns | {name: pa.array(np.full(len(names), -1, np.int64)) for name in ("size", "mtime")})
    paths = listing.paths.take(positions)
    same = pc.call_function("equal", [paths, columns["name"].cast(pa.binary())])
    columns["path"] = pc.call_function("if_else", [same, pa.scalar(None, pa.binary()), paths])
    return _in_order(columns | {"size": listing.sizes[positions], "mtime": listing.mtimes[positions]})


def _in_order(columns: dict[str, Any]) -> pa.Table:
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)
