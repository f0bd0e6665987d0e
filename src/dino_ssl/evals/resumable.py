"""Features of a large dataset: computed in chunks and kept on disk, so that an interrupted computation resumes.

The folder holds features.f32 [rows, D] and indices.i64 [rows], to which chunks are appended, and state.json: whose
features they are, and how many images are done. All ranks need to see the folder.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_ssl import distributed
from dino_ssl.config import to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.features import ImageFeatures, extract, precision_of, unreadable, weights_hash
from dino_ssl.files import read_json, write_errors, write_json
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import no_progress
from dino_ssl.terminal import logger

FORMAT = 1
"""Version of state.json."""
FIRST_CHUNK, LAST_CHUNK, CHUNK_SECONDS = 64, 16384, 10
"""Images of the first and the largest chunk. Chunks grow until one takes this time, since each starts workers."""


def extract_resumable(backbone: Backbone, dataset: ImageDataset, context: EvalContext, folder: Path) -> ImageFeatures:
    """Return the features of `extract`, memory-mapped: memory holds one chunk of them.

    Called again with the same arguments after an interruption, it continues after the last complete chunk. Raises
    UserError if the folder holds features of other weights, of another dataset or at another size or precision.
    """
    count, size = len(dataset), FIRST_CHUNK
    job = {
        "format": FORMAT,
        "weights": weights_hash(backbone),
        "dataset": dataset.fingerprint,
        "preprocessing": to_dict(replace(backbone.transform, size=context.size)),
        "precision": precision_of(context),
    }
    done, rows = distributed.run_on_rank0(lambda: find_state(folder, job, count, backbone.embed_dim))
    features, indices = folder / "features.f32", folder / "indices.i64"
    with context.progress(f"features of {count} images") as progress:
        while done < count:
            start, end = time.monotonic(), min(done + size, count)
            chunk = extract(backbone, dataset.subset(np.arange(done, end)), replace(context, progress=no_progress))
            if distributed.is_rank0():
                append_rows(features, chunk.features.numpy(), rows)
                append_rows(indices, chunk.indices.numpy() + done, rows)
                write_json(folder / "state.json", {**job, "done": end, "rows": rows + len(chunk.indices)})
            done, rows = end, rows + len(chunk.indices)
            progress(done, count)
            if distributed.run_on_rank0(lambda start=start: time.monotonic() - start < CHUNK_SECONDS / 2):
                size = min(2 * size, LAST_CHUNK)
    if not rows:
        first = unreadable(dataset, 0)
        raise UserError(f"None of the {count} images can be read. {first.name}: {first.reason}")
    table = {
        "features": torch.from_numpy(np.memmap(features, np.float32, "r+", shape=(rows, backbone.embed_dim))),
        "indices": torch.from_numpy(np.memmap(indices, np.int64, "r+", shape=rows)),
    }
    distributed.barrier()  # the caller may remove the files
    return ImageFeatures.of(table, dataset)


def find_state(folder: Path, job: Mapping[str, Any], count: int, width: int) -> tuple[int, int]:
    """Return (images done, rows written) of this job, for features [rows, width].

    Raises UserError if the folder holds features of another one, or if it is damaged.
    """
    if (state := read_json(folder / "state.json")) is None:
        return 0, 0
    state = state if isinstance(state, dict) else {}
    if differing := [key for key in job if state.get(key) != job[key]]:
        lines = "\n".join(f"  {key}: {state.get(key)} there, {job[key]} now" for key in differing)
        raise UserError(
            f"{folder} holds the features of another job:\n{lines}\n"
            "Resume it with its settings, or remove the folder to start again."
        )
    done, rows = (state.get(name) for name in ("done", "rows"))
    sizes = [path.stat().st_size if path.is_file() else 0 for path in (folder / "features.f32", folder / "indices.i64")]
    if not (type(done) is int and type(rows) is int and 0 <= rows <= done <= count):
        raise UserError(f"{folder}/state.json is damaged. Remove the folder to start again.")
    if sizes[0] < 4 * rows * width or sizes[1] < 8 * rows:
        raise UserError(f"{folder} is damaged: its files have fewer than {rows} rows. Remove it to start again.")
    logger.info("Resuming after %s of %s images (%s).", done, count, folder)
    return done, rows


def append_rows(path: Path, values: np.ndarray, row: int) -> None:
    """Write rows to a file after its first `row` rows, and to the disk; a killed process may have left more."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(row * values.strides[0])
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
