"""Resolve a training run: a new plan with the user's settings, or an existing run that is resumed."""

from dataclasses import dataclass
from pathlib import Path

from dino_ssl import checkpoint
from dino_ssl.config import differences, edit, format_value
from dino_ssl.data.loader import steps_per_epoch
from dino_ssl.errors import UserError
from dino_ssl.files import has_checkpoint
from dino_ssl.loading import Checkpoint
from dino_ssl.models import BackboneConfig
from dino_ssl.models.pretrained import load, weights_file
from dino_ssl.models.weights import load_strict
from dino_ssl.presets.plan import Change, Plan, Reason, describe_preset
from dino_ssl.run import EXECUTION_FIELDS, Run, read_description, read_run

RESUMABLE_FIELDS = (
    *EXECUTION_FIELDS,
    "init",
    "online_eval.every_epochs",
    "online_eval.k",
    "online_eval.max_train_images",
    "method.teacher_temp",
    "method.warmup_teacher_temp",
    "method.momentum",
    "method.center_momentum",
    "optim.clip_grad",
    "optim.lr",
    "optim.min_lr",
)
"""Fields that a resumed run may change: those about execution and evaluation, and those that counteract a collapse."""


NETWORK_FIELDS = {"backbone", *(f"backbone.{name}" for name in ("name", "args", "size", "patch", "image_size"))}
"""Fields that the row `network` of the plan shows."""
VAL_FIELDS = {"val", "val.path"}
"""Fields that the row `quality` of the plan shows."""
ROWS = {
    "method.out_dim": "K",
    "optim.batch_size": "batch",
    "optim.micro_batch": "micro-batch",
    "optim.lr": "learning rate",
    "optim.epochs": "epochs",
}
"""Fields whose row in the plan has another name."""


def mark_changes(planned: Plan, change: Change, preset: Run | None = None) -> list[Reason]:
    """Return the reasons of a plan with the user's settings: in the row of the field, or in a new row."""
    run, before = planned.run, planned.recommended
    after = change(before)
    changes = {name: (format_value(new), format_value(old)) for name, old, new in differences(before, after)}
    if after.optim.micro_batch == "auto":
        del changes["optim.micro_batch"]  # the plan measured it
    for part in [part for part in ("backbone", "method") if part in changes]:  # another type: compare with its defaults
        defaults = edit(after, **{part: type(getattr(after, part))()})
        changes = {name: values for name, values in changes.items() if not name.startswith(f"{part}.")}
        changes |= {name: (format_value(new), "") for name, _, new in differences(defaults, after)}
    if "method" in changes:
        changes["method"] = (run.method.summary, before.method.summary)
    rows = {} if preset is None else {"preset": Reason("preset", describe_preset(preset), "chosen by you")}
    rows |= {reason.name: reason for reason in planned.reasons}
    if any(name.partition(".")[0] == "backbone" for name in changes) and (run.init or changes.keys() & NETWORK_FIELDS):
        reason = "that of the initial weights" if run.init else "set by you"
        rows["network"] = Reason("network", run.backbone.describe(), reason)
    for name, (new, old) in changes.items():
        of_init = run.init is not None and name.startswith("backbone.")  # the row `network` shows it
        if name not in NETWORK_FIELDS | VAL_FIELDS and name.split(".")[0] not in ("out", "data") and not of_init:
            row = ROWS.get(name, name)
            rows[row] = Reason(row, new, f"set by you; the plan had {old}" if old else "set by you")
    return list(rows.values())


def starting_from(run: Run, source: Checkpoint, *, size: int | None = None) -> Run:
    """Return the run with a checkpoint's network and weights, and the run's drop-path rate.

    size: side of the views in pixels; None keeps the run's.
    """
    if (network := source.backbone.config) is None:
        raise UserError(f"{source.source} does not say which network its weights belong to, so it cannot be trained.")
    init = str(weights_file(Path(source.source), "teacher", "best")) if source.weights == "best" else source.source
    drop_path = getattr(run.backbone, "drop_path", 0.0)
    views = run.views if size is None else run.views.with_size(size)
    return edit(run, backbone=network.untrained().with_drop_path(drop_path), init=init, views=views)


def with_init_network(run: Run, network: BackboneConfig, *, is_named: bool) -> Run:
    """Return the run with the network of its initial weights.

    is_named: the run's own network was chosen by the user. It is kept, with position embeddings for the image size of
    the weights; `check_init` refuses another one.
    """
    kept = run.backbone.with_image_size(network.input_size)
    return edit(run, backbone=kept if is_named else network.untrained())


def check_init(run: Run) -> None:
    """Raise UserError if the initial weights that a run names are missing, or belong to another network."""
    if run.init is None:
        return
    source = load(run.init)
    try:
        load_strict(run.backbone.untrained().build(), source.state_dict(), run.init)
    except UserError as error:
        first_difference = str(error).splitlines()[1].strip()
        raise UserError(
            f"The initial weights `init` {run.init} are those of {source.config and source.config.describe()}, but the "
            f"network of this run is {run.backbone.describe()}: {first_difference}.\n"
            "If neither a network nor a preset is given, the run takes the network of its initial weights."
        ) from error


@dataclass(frozen=True)
class ExistingRun:
    """A run in its output folder, with a checkpoint."""

    run: Run
    step: int
    """Step of checkpoints/last.pt."""
    steps: int

    @property
    def finished(self) -> bool:
        """True if the last step was taken."""
        return self.step >= self.steps


def find_run(folder: Path, *, trust: bool = False) -> ExistingRun | None:
    """Return the run in a folder; None if it has no checkpoint yet.

    trust: import types from outside the package. Raises UserError if `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The output folder {folder} is a file. Choose a different `out`.")
    if not has_checkpoint(folder):
        return None
    run = read_run(folder, trust=trust)
    per_epoch = steps_per_epoch(read_description(folder)["data"]["trained_on"], run.optim.batch_size)
    step = checkpoint.load(folder / "checkpoints/last.pt", mmap=True)["step"]
    return ExistingRun(edit(run, out=str(folder)), step, per_epoch * run.optim.epochs)


def resumed(existing: ExistingRun, change: Change) -> Run:
    """Return an existing run with the user's settings. Raises UserError if they would change what it learns."""
    folder = existing.run.out
    if existing.finished:
        raise UserError(
            f"The run in {folder} is finished ({existing.steps} steps). Its report: {folder}/report.html\n"
            "For a new run, choose a different `out`."
        )
    run = change(existing.run)
    refused = [item for item in differences(existing.run, run) if item[0] not in RESUMABLE_FIELDS]
    if any(name == "data.fingerprint" for name, _, _ in refused):
        raise UserError(
            f"The run in {folder} was trained on another dataset than the one passed. Pass the same images in the same "
            "order to resume, or start another run with another `out`."
        )
    if refused:
        listed = "\n".join(f"  `{name}` was {format_value(old)}, got {format_value(new)}" for name, old, new in refused)
        raise UserError(
            f"The run in {folder} cannot be resumed with other training settings:\n{listed}\n"
            "Omit them to resume, or start a new run with a different `out`."
        )
    return edit(run, out=folder)
