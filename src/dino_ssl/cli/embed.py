"""dino embed: the features of pictures, as a file."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError
from dino_ssl.files import check_writable
from dino_ssl.terminal import command_output, is_rank0

if TYPE_CHECKING:
    from dino_ssl.api.calls import Embedding

EXAMPLES = """\
  dino embed runs/photos photos/ -o features.parquet    columns name, label, feature
  dino embed dino_vits16 photos/ -o features.npz        arrays name, label, feature
  dino embed timm:resnet50 photos/ -o features.csv      name, label, f0, f1, ..."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Write the feature of every picture to a file: .parquet, .npz or .csv."""

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    folder: tyro.conf.Positional[str]
    """Folder of pictures; `scenes` draws pictures."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "features.parquet"
    """The file; its ending says the format."""
    size: int | None = None
    """Side in pixels of what the network sees; what it was trained on without it."""
    batch_size: int = 64
    """Pictures per forward pass."""
    workers: int = 0
    """Processes that decode."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def embed(argv: Sequence[str]) -> int:
    options = parse(EmbedOptions, argv, "dino embed", EXAMPLES)
    path = Path(options.out)
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"--out must end in one of {', '.join(WRITERS)}; got {options.out!r}.")
    check_writable(path.parent)
    with command_output(options.json) as (terminal, give):
        from dino_ssl.api.calls import embed as features_of
        from dino_ssl.api.calls import open_checkpoint
        from dino_ssl.files import atomic_write

        found = open_checkpoint(options.checkpoint)
        with terminal.progress("embedding") as done:
            embedding = features_of(
                found,
                options.folder,
                size=options.size,
                batch_size=options.batch_size,
                workers=options.workers,
                progress=done,
            )
        about = {"checkpoint": options.checkpoint, "hash": found.hash, "size": options.size or found.size}
        if is_rank0():
            atomic_write(path, lambda aside: WRITERS[path.suffix.lower()](aside, embedding, about))
        count, width = embedding.features.shape
        terminal.print(f"{count} features of {width} numbers: {path}")
        for item in embedding.skipped[:5]:
            terminal.print(f"  left out: {item.name}: {item.reason}", style="yellow")
        if len(embedding.skipped) > 5:
            terminal.print(f"  ... {len(embedding.skipped)} left out in all; --json lists them", style="yellow")
        skipped = [{"name": item.name, "reason": item.reason} for item in embedding.skipped]
        give({"file": str(path), "images": count, "width": width, "skipped": skipped, **about})
    return 0


def _parquet(path: Path, embedding: "Embedding", about: dict) -> None:
    import pyarrow
    import pyarrow.parquet

    width = embedding.features.shape[1]
    flat = pyarrow.array(embedding.features.ravel())
    columns = {
        "name": pyarrow.array([encodable(name) for name in embedding.names], pyarrow.string()),
        "label": pyarrow.array(embedding.labels, pyarrow.string()),
        "feature": pyarrow.FixedSizeListArray.from_arrays(flat, width),
    }
    table = pyarrow.table(columns).replace_schema_metadata({"dino": json.dumps(about)})
    pyarrow.parquet.write_table(table, path)


def _npz(path: Path, embedding: "Embedding", about: dict) -> None:
    import numpy as np

    with open(path, "wb") as file:
        np.savez(
            file,
            name=np.array([encodable(name) for name in embedding.names], dtype=np.str_),
            label=np.array([label or "" for label in embedding.labels], dtype=np.str_),
            feature=embedding.features,
            about=np.array(json.dumps(about)),
        )


def _csv(path: Path, embedding: "Embedding", about: dict) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "label", *(f"f{i}" for i in range(embedding.features.shape[1]))])
        for name, label, feature in zip(embedding.names, embedding.labels, embedding.features, strict=True):
            rows.writerow([encodable(name), label or "", *map(str, feature)])


def encodable(name: str) -> str:
    """A file name as text; bytes that are none are shown as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


WRITERS: dict[str, Callable[[Path, "Embedding", dict], None]] = {
    ".parquet": _parquet,
    ".npz": _npz,
    ".csv": _csv,
}
