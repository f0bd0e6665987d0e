"""dino embed: write the features of images to a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import tyro

from dino_ssl.api.calls import Embedding
from dino_ssl.cli.images import (
    DatasetOptions,
    compute_features,
    dataset_named,
    partial_features,
    report_skipped,
    run_command,
)
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, check_format, check_writable
from dino_ssl.formatting import csv_text, plural
from dino_ssl.loading import Checkpoint
from dino_ssl.terminal import Terminal, is_rank0

EXAMPLES = """\
  dino embed runs/photos photos/ -o features.parquet    columns name, label, feature
  dino embed dino_vits16 photos/ -o features.npz        arrays name, label, feature
  dino embed timm:resnet50 photos/ -o features.csv      name, label, f0, f1, ..."""

FORMAT = 1
"""Version of the layout of Parquet and npz files, in their metadata."""
SUFFIXES = (".parquet", ".npz", ".csv")
ROWS = 16384
"""Rows that are written at once, a row group of Parquet."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(DatasetOptions):
    """Write the feature of every image to a file: .parquet, .npz or .csv.

    Until the file is complete, OUT.partial keeps the features; after an interruption, the same command resumes.
    """

    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "features.parquet"
    """Output file; the format is chosen by the suffix."""


def embed(argv: Sequence[str]) -> int:
    """Run `dino embed`."""
    return run_command(_embed, EmbedOptions, argv, "dino embed", EXAMPLES)


def _embed(options: EmbedOptions, terminal: Terminal) -> dict[str, Any]:
    path = Path(options.out)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"`out` must end in one of {', '.join(SUFFIXES)}; got {options.out!r}.")
    check_writable(path.parent)
    with partial_features(path, terminal) as partial:
        checkpoint, embedding = compute_features(options, dataset_named(options.dataset), terminal, partial)
        size, precision = options.size or checkpoint.backbone.transform.size, embedding.precision
        metadata = {"format": FORMAT, "checkpoint": options.checkpoint, "hash": checkpoint.hash, "size": size}
        metadata |= {"precision": precision}
        if is_rank0():
            atomic_write(path, lambda part: _write(part, path.suffix.lower(), embedding, metadata))
    count, width = embedding.features.shape
    terminal.print(f"{plural(count, 'feature')} of {width} dimensions in {precision}: {path}")
    skipped = report_skipped(embedding.skipped, terminal)
    return {"file": str(path), "images": count, "width": width, "skipped": skipped, **metadata}


def _write(path: Path, suffix: str, embedding: Embedding, metadata: dict[str, Any]) -> None:
    names, labels, features = embedding.names, embedding.labels, embedding.features
    if suffix == ".npz":
        known = np.array([label or "" for label in labels], np.str_)
        with open(path, "wb") as file:
            np.savez(file, name=np.array(names, np.str_), label=known, feature=features, metadata=json.dumps(metadata))
        return
    text, width, is_csv = pyarrow.string(), features.shape[1], suffix == ".csv"
    kinds = {"feature": pyarrow.list_(pyarrow.float32(), width)}
    if is_csv:
        kinds = {f"f{index}": pyarrow.float32() for index in range(width)}
    schema = pyarrow.schema({"name": text, "label": text, **kinds}, {"dino": json.dumps(metadata)})
    open_writer: Any = pyarrow.csv.CSVWriter if is_csv else pyarrow.parquet.ParquetWriter
    with open_writer(str(path), schema) as writer:
        for start in range(0, len(names), ROWS):
            rows = slice(start, start + ROWS)
            vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features[rows].ravel()), width)
            columns = features[rows].T if is_csv else [vectors]
            words = [[*map(csv_text, column[rows])] if is_csv else column[rows] for column in (names, labels)]
            writer.write_table(pyarrow.table([*words, *columns], schema=schema))


def read_features(path: Path, checkpoint: Checkpoint) -> Embedding:
    """Return the features in a Parquet file of this command. Raises UserError for any other file or other weights."""
    try:
        table = pyarrow.parquet.read_table(path)
        metadata = json.loads(table.schema.metadata[b"dino"])
    except (OSError, pyarrow.ArrowException, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a Parquet file of `dino embed`: {error}") from error
    check_format(path, metadata["format"], FORMAT)
    if metadata["hash"] != checkpoint.hash:
        raise UserError(
            f"{path} has features of other weights, {metadata['checkpoint']} ({metadata['hash']}), than "
            f"{checkpoint.source} ({checkpoint.hash}). Use that checkpoint, or compute the features again."
        )
    names, labels, features = table.columns
    array = features.combine_chunks().flatten().to_numpy().reshape(len(table), -1).copy()  # writable, as torch expects
    return Embedding(names.to_pylist(), array, labels.to_pylist(), [], metadata["precision"])


def write_csv(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns of strings or numbers as CSV."""
    safe = {name: [*map(csv_text, column)] for name, column in columns.items()}
    pyarrow.csv.write_csv(pyarrow.table(safe), str(path))
