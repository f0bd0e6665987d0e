"""dino embed: write the features of images to a file."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dino_ssl.cli.images import (
    BatchSize,
    Checkpoint,
    DatasetName,
    InputSize,
    Json,
    Trust,
    Workers,
    dataset_named,
    report_skipped,
)
from dino_ssl.cli.options import parse
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, check_writable
from dino_ssl.terminal import command_output, is_rank0

if TYPE_CHECKING:
    from dino_ssl.api.calls import Embedding

EXAMPLES = """\
  dino embed runs/photos photos/ -o features.parquet    columns name, label, feature
  dino embed dino_vits16 photos/ -o features.npz        arrays name, label, feature
  dino embed timm:resnet50 photos/ -o features.csv      name, label, f0, f1, ..."""

FORMAT = 1
"""Version of the layout of Parquet and npz files, in their metadata."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Write the feature of every image to a file: .parquet, .npz or .csv."""

    checkpoint: Checkpoint
    dataset: DatasetName
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "features.parquet"
    """Output file; the format is chosen by the suffix."""
    size: InputSize = None
    batch_size: BatchSize = 64
    workers: Workers = 0
    trust: Trust = False
    json: Json = False


def embed(argv: Sequence[str]) -> int:
    """Run `dino embed`."""
    options = parse(EmbedOptions, argv, "dino embed", EXAMPLES)
    path = Path(options.out)
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"`out` must end in one of {', '.join(WRITERS)}; got {options.out!r}.")
    check_writable(path.parent)
    with command_output(options.json) as (terminal, write_result):
        from dino_ssl.api.calls import embed as embed_dataset
        from dino_ssl.api.calls import open_checkpoint

        checkpoint = open_checkpoint(options.checkpoint, trust=options.trust)
        with terminal.progress("features") as progress:
            embedding = embed_dataset(
                checkpoint, dataset_named(options.dataset), size=options.size, batch_size=options.batch_size,
                workers=options.workers, progress=progress,
            )  # fmt: skip
        metadata = {
            "format": FORMAT, "checkpoint": options.checkpoint, "hash": checkpoint.hash,
            "size": options.size or checkpoint.size,
        }  # fmt: skip
        if is_rank0():
            atomic_write(path, lambda part: WRITERS[path.suffix.lower()](part, embedding, metadata))
        count, width = embedding.features.shape
        terminal.print(f"{count} features of {width} dimensions: {path}")
        skipped = report_skipped(embedding.skipped, terminal)
        write_result({"file": str(path), "images": count, "width": width, "skipped": skipped, **metadata})
    return 0


def _write_parquet(path: Path, embedding: "Embedding", metadata: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    values, width = pyarrow.array(embedding.features.ravel()), embedding.features.shape[1]
    columns = {
        "name": pyarrow.array(list(map(encodable, embedding.names)), pyarrow.string()),
        "label": pyarrow.array(embedding.labels, pyarrow.string()),
        "feature": pyarrow.FixedSizeListArray.from_arrays(values, width),
    }
    table = pyarrow.table(columns).replace_schema_metadata({"dino": json.dumps(metadata)})
    pyarrow.parquet.write_table(table, path)


def _write_npz(path: Path, embedding: "Embedding", metadata: dict[str, Any]) -> None:
    import numpy as np

    with open(path, "wb") as file:
        np.savez(
            file,
            name=np.array(list(map(encodable, embedding.names)), dtype=np.str_),
            label=np.array([label or "" for label in embedding.labels], dtype=np.str_),
            feature=embedding.features,
            metadata=np.array(json.dumps(metadata)),
        )


def _write_csv(path: Path, embedding: "Embedding", metadata: dict[str, Any]) -> None:
    header = ["name", "label", *(f"f{i}" for i in range(embedding.features.shape[1]))]
    rows = zip(embedding.names, embedding.labels, embedding.features, strict=True)
    write_rows(path, header, ((name, label, *map(str, feature)) for name, label, feature in rows))


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file whose first two columns are an image name and a label or None."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows((encodable(name), label or "", *values) for name, label, *values in rows)


def encodable(name: str) -> str:
    """Return a file name that can be encoded as UTF-8; other bytes become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


WRITERS: dict[str, Callable[[Path, "Embedding", dict[str, Any]], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".csv": _write_csv,
}
