"""How a session begins: with a plan that holds what the person set, or with the run that is already there."""

import json
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_ssl import checkpoint
from dino_ssl.api.checkpoints import Checkpoint
from dino_ssl.config import edit, flatten, format_value, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.errors import UserError
from dino_ssl.methods import METHODS, MethodConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models import backbone_named
from dino_ssl.presets.plan import CPU_MINUTES, Plan, Reason, describe_preset, plan
from dino_ssl.presets.schedule import fit_schedule
from dino_ssl.run import EXECUTION_FIELDS, Run, read_run
from dino_ssl.runtime import Machine
from dino_ssl.terminal import Terminal

RESUMABLE_FIELDS = (
    *EXECUTION_FIELDS,
    "init",
    "online_eval.every_epochs",
    "online_eval.k",
    "online_eval.max_memory",
    "method.teacher_temp",
    "method.warmup_teacher_temp",
    "method.momentum",
    "method.center_momentum",
    "optim.clip_grad",
    "optim.lr",
    "optim.min_lr",
)
"""Fields that a resumed run may change: those of the execution, of the evaluation, and remedies against a collapse."""
MEASURED = ("workers", "epochs", "expected time")
"""Rows of the plan that hang on how fast the run is."""
Change = Callable[[Run], Run]
"""What the person set themselves, applied to any Run."""


def resolve_run(
    dataset: ImageDataset,
    here: Machine,
    *,
    preset: Run | None,
    change: Change,
    method: type[MethodConfig] = DINOConfig,
    minutes: float | None = None,
    world: int = 1,
) -> Plan:
    """The plan for these pictures and this machine, with what the person set in it.

    method: what is planned for where there is no preset. What is set is planned with: the number of epochs and the
    expected time are those of the run as it is.
    """
    if preset is not None:
        first = plan(dataset, here, preset=change(preset), minutes=minutes, world=world)
        recipe = Reason("recipe", describe_preset(preset), "as the preset says")
        return _with_changes(Plan(first.run, [recipe, *first.reasons]), preset, change)
    first = plan(dataset, here, method=method, minutes=minutes, world=world)
    asked = change(first.run)
    if asked == first.run:
        return first
    if asked.optim.epochs != first.run.optim.epochs:
        minutes = None
    elif minutes is None and here.device.type == "cpu":
        minutes = CPU_MINUTES
    asked = change(_followed(first.run, asked))
    second = plan(dataset, here, preset=asked, minutes=minutes, world=world)
    known = {reason.name: reason for reason in second.reasons if reason.name in MEASURED}
    reasons = [known.pop(reason.name, reason) for reason in first.reasons]
    return _with_changes(Plan(second.run, [*reasons, *known.values()]), first.run, change)


def _followed(run: Run, asked: Run) -> Run:
    """The planned run where the person changed its length or its crops: what hangs on them follows."""
    epochs, size = asked.optim.epochs, asked.views.size
    if epochs != run.optim.epochs:
        run = fit_schedule(run, epochs)
    if size != run.views.size:
        run = edit(run, backbone=run.backbone.with_image_size(size))
    return run


NETWORK = {"backbone", "backbone.name", "backbone.size", "backbone.patch"}
"""Settings that the row `network` of the plan tells."""
ROWS = {
    "method.out_dim": "K",
    "optim.batch_size": "batch",
    "optim.micro_batch": "micro-batch",
    "optim.lr": "learning rate",
    "optim.epochs": "epochs",
    "workers": "workers",
    "precision": "precision",
}
"""Settings that have a row of their own in the plan."""


def _with_changes(planned: Plan, before: Run, change: Change) -> Plan:
    """The plan with what the person set: in the row of that setting, or in a row of its own below."""
    run, asked = change(planned.run), change(before)
    reasons = {reason.name: reason for reason in planned.reasons}
    set_here = {name: (old, value) for name, old, value in differences(before, asked)}
    if set_here.keys() & NETWORK:
        reasons["network"] = Reason("network", run.backbone.describe(), "you set it")
    if "backbone" in set_here:  # of another type: none of its settings is the plan's
        set_here = {name: both for name, both in set_here.items() if not name.startswith("backbone")}
        defaults = edit(asked, backbone=type(asked.backbone)())
        for name, _, value in differences(defaults, asked):
            if name not in NETWORK and name != "backbone.image_size":
                reasons[flag(name)] = Reason(flag(name), format_value(value), "you set it")
    if "method" in set_here:  # likewise
        reasons["method"] = Reason("method", run.method.summary, f"you set it; the plan had {before.method.summary}")
        set_here = {name: both for name, both in set_here.items() if not name.startswith("method")}
        defaults = edit(asked, method=type(asked.method)())
        set_here |= {name: (old, value) for name, old, value in differences(defaults, asked)}
    for name, (old, value) in set_here.items():
        if name.split(".")[0] not in ("out", "data"):
            row = ROWS.get(name, flag(name))
            reasons[row] = Reason(row, format_value(value), f"you set it; the plan had {format_value(old) or 'none'}")
    return Plan(run, list(reasons.values()))


def differences(before: Run, after: Run) -> list[tuple[str, Any, Any]]:
    """(dotted field, old value, new value) of every setting that differs."""
    old, new = settings_of(before), settings_of(after)
    return [(name, old.get(name), new.get(name)) for name in [*old, *(n for n in new if n not in old)]
            if old.get(name) != new.get(name)]  # fmt: skip


def settings_of(run: Run) -> dict[str, Any]:
    """Every setting of a run by its dotted name; its evaluations as they are typed."""
    return flatten(to_dict(run)) | {"evals": [shlex.quote(str(ask)) for ask in run.evals]}


def flag(name: str) -> str:
    """A dotted field as it is typed: optim.batch_size -> --optim.batch-size."""
    return f"--{name.replace('_', '-')}"


def typed(name: str, value: Any) -> tuple[str, str]:
    """A setting as it is typed, its flag and its words: a switch has no words, a method its short name."""
    if isinstance(value, bool):
        place, _, field = name.rpartition(".")
        return (flag(name) if value else flag(f"{place}.no-{field}".lstrip(".")), "")
    if name == "method":
        value = next((short for short, kind in METHODS.items() if kind.__name__ == value), value)
    return flag(name), format_value(value)


def cli_diff(before: Run, after: Run, leave_out: Collection[str] = ()) -> str:
    """What makes one run of another, as it is typed; without some dotted fields."""
    words = []
    if type(after.method) is not type(before.method):
        before = edit(before, method=type(after.method)())
        words.append(" ".join(typed("method", type(after.method).__name__)))
    if type(after.backbone) is not type(before.backbone):
        words.append(f"--network {after.backbone.spec}")
        before = edit(before, backbone=backbone_named(after.backbone.spec))
    changed = [(name, value) for name, _, value in differences(before, after) if name not in leave_out]
    return " ".join([*words, *(" ".join(typed(name, value)).rstrip() for name, value in changed)])


def show_plan(terminal: Terminal, planned: Plan) -> None:
    rows = [(reason.name, reason.value, reason.reason) for reason in planned.reasons]
    terminal.table("The plan", ("", "choice", "why"), rows)
    terminal.print()


def starting_from(run: Run, found: Checkpoint, *, size: int | None = None) -> Run:
    """The run, begun with a checkpoint's backbone: its network, with the run's drop-path. size: side of the views."""
    if found.network is None:
        raise UserError(
            f"{found.source} does not say which network its weights belong to, so training cannot build it."
        )
    network = found.network.untrained().with_drop_path(run.backbone.drop_path)
    views = run.views
    if size is not None:
        views = edit(views, **{"size" if isinstance(views, Augment) else "global_size": size})
    return edit(run, backbone=network, init=found.source, views=views)


@dataclass(frozen=True)
class ExistingRun:
    """What lies in an output folder."""

    run: Run
    step: int
    steps: int

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def runs_nearby(folder: Path) -> str:
    """A line that names the runs beside a folder; empty where there are none."""
    runs = sorted(str(path.parents[1]) for path in folder.parent.glob("*/checkpoints/last.pt"))
    return f"\nRuns there: {', '.join(runs)}." if runs else ""


def find_run(folder: Path) -> ExistingRun | None:
    """The run in a folder with the step it is saved at; None where nothing was saved yet.

    Raises UserError where the folder's name is taken by something that is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The run's folder {folder} is a file. Choose another one with --out.")
    if not (folder / "run.json").is_file() or not (folder / "checkpoints/last.pt").is_file():
        return None
    run = read_run(folder)
    described = json.loads((folder / "run.json").read_text())
    per_epoch = max(1, described["data"]["trained_on"] // run.optim.batch_size)
    saved = checkpoint.load(folder / "checkpoints/last.pt")
    return ExistingRun(edit(run, out=str(folder)), saved["step"], per_epoch * run.optim.epochs)


def resumed(found: ExistingRun, change: Change) -> Run:
    """The found run with what the person set. Raises UserError where that would change what is learned."""
    folder = found.run.out
    if found.finished:
        raise UserError(
            f"The run in {folder} is finished: {found.steps} steps. Its report: {folder}/report.html\n"
            "To train anew, choose another folder with --out."
        )
    run = change(found.run)
    refused = [item for item in differences(found.run, run) if item[0] not in RESUMABLE_FIELDS]
    if refused:
        listed = "\n".join(
            f"  {flag(name)} is {format_value(old)} there, got {format_value(new)}" for name, old, new in refused
        )
        raise UserError(
            f"The run in {folder} cannot go on with other settings of what it learns:\n{listed}\n"
            "Leave them away to go on, or start another run with --out."
        )
    return edit(run, out=folder)
