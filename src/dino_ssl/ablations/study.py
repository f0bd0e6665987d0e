"""A study: the base Run of a table is fixed once for a dataset and a machine; then its runs are trained."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dino_ssl import distributed
from dino_ssl.ablations.bases import IMAGES_SEEN, scale_length
from dino_ssl.ablations.results import ROOT, Study, StudyRun, read_study
from dino_ssl.ablations.table import Scale, Table
from dino_ssl.config import differences, edit, format_value
from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.errors import UserError
from dino_ssl.presets.plan import measure, num_train_images
from dino_ssl.run import EXECUTION_FIELDS, Run
from dino_ssl.runtime import machine, machine_memory

NOT_LEARNED = {*EXECUTION_FIELDS, "online_eval.every_epochs"} - {"precision"}
"""Fields that affect neither the learned weights nor their evaluation at the end."""


def resolve_study(
    table: Table,
    scale: Scale,
    root: Path = ROOT,
    *,
    preset: Run | None = None,
    data: DatasetConfig | None = None,
    val: DatasetConfig | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    workers: int | None = None,
    processes: int = 1,
) -> Study:
    """Return the existing study of a table, or a new one. Call it on all ranks.

    preset: base instead of the table's own. minutes: time per run of a new study, with `processes` runs at a time.
    Raises UserError if a new study has no dataset, or if an existing one has another dataset or other settings.
    """
    folder = root / table.name / scale
    existing = read_study(folder)
    base = preset or (table.base(scale) if existing is None else existing.base)
    if data is not None:
        base = edit(base, data=data)
    elif existing is None and preset is None:
        raise UserError(
            f"{table.name} was not run yet and needs a dataset: set `data` to a folder with one folder per class, or "
            "to scenes or simple-scenes (synthetic images). `val` sets the validation set."
        )
    if val is not None:
        base = edit(base, val=val)
    dataset = base.data.open()
    base = edit(
        base,
        precision=base.precision if base.precision == "float32" else machine().precision,
        cache=processes * dataset.nbytes < machine_memory() / 4,  # each process has its own
        workers=base.workers if workers is None else workers,
        on_collapse="warn",  # the collapse is the result
    )
    num_images = num_train_images(base, dataset)
    if epochs is not None:
        base = scale_length(base, epochs)
    elif existing is not None:
        optim, online_eval = existing.base.optim, existing.base.online_eval
        base = edit(base, optim=dict(epochs=optim.epochs, warmup_epochs=optim.warmup_epochs))
        base = edit(base, online_eval=dict(every_epochs=online_eval.every_epochs))
    elif minutes is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))  # as many as a run will have
        seconds = measure(base, machine(), dataset).seconds(base, machine(), num_images) / distributed.world_size()
        base = scale_length(base, max(1, round(60 * minutes / seconds)))
    elif scale == "small" and preset is None:
        base = scale_length(base, max(1, round(IMAGES_SEEN / num_images)))
    base = distributed.run_on_rank0(lambda: base)  # each rank has measured its own speed
    summary = {
        "images": len(dataset),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
        "val_fraction": base.online_eval.val_fraction if base.val is None else 0,
    }
    study = Study(folder, table, scale, base, summary)
    if existing is not None:
        _check_same(existing, study)
    return study


def _check_same(existing: Study, study: Study) -> None:
    """Raise UserError if dataset or settings differ: the runs of one study must be comparable."""
    changes = [item for item in differences(existing.base, study.base) if item[0] not in EXECUTION_FIELDS]
    if existing.data["fingerprint"] != study.data["fingerprint"]:
        changes.append(("data", f"{existing.data['images']:,} images", f"{study.data['images']:,} other images"))
    if changes:
        lines = [f"  `{name}` is {format_value(old)} there, got {format_value(new)}" for name, old, new in changes]
        raise UserError(
            "\n".join([f"{existing.folder} has runs with other settings:", *lines])
            + "\nRemove these settings to resume the study, or set `out` to a different folder."
        )


def link_shared_runs(runs: Sequence[StudyRun], root: Path = ROOT) -> int:
    """Link runs that were not started to identical finished runs of other tables; return the number of links."""
    study = runs[0].study
    others = [other for path in sorted(root.glob(f"*/{study.scale}")) if (other := read_study(path)) is not None]
    finished = [run for other in others if other.data == study.data for run in other.runs() if run.result is not None]
    for run in runs:
        if run.folder.exists():
            continue
        run.folder.unlink(missing_ok=True)  # a link to a folder that was removed
        for other in finished:
            changes = {name for name, _, _ in differences(other.run, run.run)}
            if changes <= NOT_LEARNED and (study.table.evaluates_student <= other.study.table.evaluates_student):
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                run.folder.symlink_to(os.path.relpath(other.folder.resolve(), run.folder.parent.resolve()))
                break
    return sum(run.folder.is_symlink() for run in runs)
