"""dino index: build or update the index of a folder of images, for `dino search` and other commands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl.cli.images import DatasetOptions, dataset_named, report_skipped, run_command
from dino_ssl.cli.options import Flag
from dino_ssl.files import check_writable
from dino_ssl.formatting import plural
from dino_ssl.search.index import Index
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino index runs/photos photos/ -o photos.idx          build, or update: only what has changed is read
  dino index dino_vits16 photos/ --workers 4            any network; the index is photos.idx
  dino index dino_vits16 photos/ --approximate          faster search in 100,000 images and more
  dino search photos.idx query.jpg                      the most similar images"""


@dataclass(frozen=True, kw_only=True)
class IndexOptions(DatasetOptions):
    """Build the index of a dataset, or update it: the feature of every image, and its hashes, size and class.

    An update reads new and changed images and drops those that are gone. An interrupted one resumes.
    """

    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the index. Default: the name of the dataset, with the suffix .idx."""
    approximate: Flag = False
    """Build approximate search as well, for 100,000 images and more: needs faiss. Updates keep it."""


def index(argv: Sequence[str]) -> int:
    """Run `dino index`."""
    return run_command(_index, IndexOptions, argv, "dino index", EXAMPLES)


def _index(options: IndexOptions, terminal: Terminal) -> dict[str, Any]:
    path = Path(options.out or f"{Path(options.dataset).resolve().name}.idx")
    check_writable(path.parent)
    names = ("size", "batch_size", "workers", "precision", "approximate")
    settings: Any = {name: getattr(options, name) for name in names}
    with terminal.progress("indexing") as progress:
        built = Index.build(
            options.open_checkpoint(), dataset_named(options.dataset), path=path, progress=progress, **settings
        )
    changes, width = built.changes, built.features.shape[1]
    terminal.print(f"{plural(len(built), 'image')}, {width} dimensions: {path}")
    reused = f" ({changes.reused:,} with the features of a known content)" if changes.reused else ""
    terminal.print(f"{changes.added:,} added{reused}, {changes.removed:,} removed, {changes.kept:,} unchanged")
    approximate = None
    if built.approximate is not None:
        info = built.approximate.info
        approximate = {"lists": info.lists, "probes": info.probes, "recall": info.recall}
        terminal.print(
            f"Approximate search: {info.probes:,} of {info.lists:,} lists are compared with a query; recall@10 against "
            f"exact search: {info.recall:.3f}"
        )
    skipped = report_skipped(built.skipped, terminal)
    counts = {"images": len(built), "width": width, **changes._asdict(), "generation": built.generation}
    return {
        "index": str(path),
        **counts,
        "checkpoint": built.store.info.checkpoint,
        "approximate": approximate,
        "skipped": skipped,
    }
