"""Start or resume a training run: one function for Python and for the command line."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dino_ssl import distributed
from dino_ssl.api.resolve import ExistingRun, check_init, find_run, mark_changes, resumed, with_init_network
from dino_ssl.api.session import Outcome, run_session
from dino_ssl.api.time_budget import TimeBudget
from dino_ssl.config import edit
from dino_ssl.data.dataset import DatasetConfig, ImageDataset
from dino_ssl.data.sources import DatasetSource, config_of, dataset_config, folder_path, has_images_in, open_dataset
from dino_ssl.errors import UserError, check_value
from dino_ssl.files import write_json
from dino_ssl.methods import DINOConfig, method_named
from dino_ssl.methods.method import MethodConfig
from dino_ssl.models import BackboneConfig
from dino_ssl.models.pretrained import network_of
from dino_ssl.presets import resolve
from dino_ssl.presets.plan import FORMAT, Change, Reason, plan
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine, start
from dino_ssl.terminal import Terminal


def train(
    dataset: DatasetSource,
    *,
    preset: str | Run | None = None,
    out: str | Path | None = None,
    minutes: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    trust: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> Outcome:
    """Train a backbone on a dataset. Settings that are not given are planned, as by `dino train`.

    >>> train("photos", minutes=30, batch_size=128, views=dict(local=4))

    Args:
        dataset: A folder, a list of images, or any map-style torch dataset (see `data.sources.open_dataset`).
        preset: The name of a preset, or a Run.
        out: Output folder. Default: runs/NAME of the folder.
        minutes: Training time in minutes, from which the number of epochs is derived.
        epochs: Short for `optim=dict(epochs=...)`, as are `batch_size` and `lr`.
        batch_size: Images per optimizer step.
        lr: Peak learning rate for a batch of 256.
        device: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
        resume: Resume the run in `out`.
        trust: On resume, import types from outside the package that run.json names.
        quiet: Print nothing; messages are only logged, to the logger `dino_ssl`.
        changes: Fields of `Run`; a dict changes fields of a nested one. `method` may be a name, as "byol", and `val` a
            folder. `init` brings its network, unless `backbone` or `preset` is given.

    Raises:
        UserError: If a setting is invalid, the dataset cannot be read, or the loss is not finite.
    """
    check_value("minutes", minutes, above=0)
    path = folder_path(dataset)
    folder = Path(out or f"runs/{Path(path).resolve().name if path else 'images'}")
    existing = find_run(folder, trust=trust)
    if existing is not None and not resume:
        raise UserError(f"{folder} has a run. Pass resume=True to resume it, or a different `out`.")
    if existing is None and resume:
        raise UserError(f"Nothing to resume in {folder}: expected run.json and checkpoints/last.pt.")
    method = method_named(changes.pop("method")) if isinstance(changes.get("method"), str) else None
    changes = _checked(changes, {"epochs": epochs, "batch_size": batch_size, "lr": lr})
    init_network = None
    if changes.get("init") is not None and not resume:
        init_network = network_of(changes["init"], trust=trust)
    is_named = preset is not None or isinstance(changes.get("backbone"), BackboneConfig)
    terminal = Terminal(quiet=quiet)
    with nullcontext() if quiet else terminal.show_log(), start(device=device) as rt:
        opened = distributed.run_on_rank0(lambda: open_dataset(dataset))
        data = config_of(dataset, opened)

        def change(run: Run) -> Run:
            if method is not None and type(run.method) is not method:
                run = edit(run, method=method())
            if init_network is not None:
                run = with_init_network(run, init_network, is_named=is_named)
            return edit(run, data=data, out=str(folder), **changes)

        base = resolve(preset) if isinstance(preset, str) else preset
        if existing is None and (init_network is not None or (base is not None and base.init is not None)):
            check_init(change(base or Run()))
        prepared = prepare(
            lambda: opened,
            terminal,
            rt,
            change=change,
            existing=existing,
            preset=base,
            method=method or type(changes.get("method") or DINOConfig()),
            minutes=minutes,
        )
        return prepared.train(terminal)


def _checked(changes: dict[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of a Run with the short names in `optim`, and a DatasetConfig for `val`."""
    optim, short = changes.get("optim", {}), {name: value for name, value in short.items() if value is not None}
    for name in short:
        if not isinstance(optim, Mapping) or name in optim:
            raise UserError(f"`{name}` and `optim` both set `optim.{name}`: give only one of them.")
    val = changes.get("val")
    if not isinstance(val, str | Path | DatasetConfig | None):
        raise UserError(f"`val`: expected a folder of class folders, got a {type(val).__name__}.")
    changes |= {} if val is None else {"val": dataset_config(val, "val")}
    return changes | ({"optim": {**optim, **short}} if short else {})


@dataclass(frozen=True)
class PreparedRun:
    """A complete Run and its opened dataset, ready to train."""

    run: Run
    dataset: ImageDataset
    existing: ExistingRun | None = None
    reasons: list[Reason] = field(default_factory=list)
    device: torch.device | None = None
    """None: a GPU if there is one."""
    budget: TimeBudget | None = None
    """The time of a run that is planned by `minutes`."""

    @property
    def plan(self) -> list[dict[str, str]]:
        """The plan as JSON data; empty for a resumed run."""
        return [reason._asdict() for reason in self.reasons]

    def train(self, terminal: Terminal) -> Outcome:
        """Train to the end, or until a signal."""
        with start(self.run.precision, self.device) as rt:
            if rt.is_main and self.existing is None:
                write_json(Path(self.run.out) / "plan.json", {"format": FORMAT, "plan": self.plan})
            resume = self.existing is not None
            return run_session(self.run, rt, self.dataset, terminal, resume=resume, budget=self.budget)


def prepare(
    open_data: Callable[[], ImageDataset],
    terminal: Terminal,
    rt: Runtime,
    *,
    change: Change,
    existing: ExistingRun | None = None,
    preset: Run | None = None,
    method: type[MethodConfig] = DINOConfig,
    minutes: float | None = None,
) -> PreparedRun:
    """Plan a run, or load the one to resume, and open its dataset; all ranks take part.

    open_data: opens the dataset with progress. change: applies the user's settings to a Run. existing: the run to
    resume. preset: None plans a run. method: planned for, without a preset.
    """
    if existing is not None:
        return PreparedRun(resumed(existing, change), open_data(), existing, device=rt.device)
    dataset = open_data()

    def complete(run: Run) -> Run:
        return edit(change(run), data=dict(bit_depth=dataset.bit_depth)) if dataset.bit_depth else change(run)

    with terminal.progress("measuring this machine") as progress:
        planned = plan(
            dataset,
            machine(rt.device),
            preset=preset,
            change=complete,
            method=method,
            minutes=minutes,
            world=rt.world_size,
            progress=progress,
        )
    reasons = mark_changes(planned, change, preset)
    run, reasons = distributed.run_on_rank0(lambda: (planned.run, reasons))  # every rank has measured
    _check_out(run, dataset)
    rows = [(f"`{name}`" if "." in name else name, value, reason) for name, value, reason in reasons]
    terminal.table("The plan", ("", "choice", "reason"), rows)
    terminal.print()
    budget = None if minutes is None else TimeBudget(minutes, planned.fit)
    return PreparedRun(run, dataset, reasons=reasons, device=rt.device, budget=budget)


def _check_out(run: Run, dataset: ImageDataset) -> None:
    """Raise UserError if there are images of the dataset in the output folder, which a resumed run would not list."""
    if run.data.folder is None:
        return
    out, folder = Path(run.out), run.data.folder
    if out.resolve() == folder.resolve() or has_images_in(dataset, folder, out):
        raise UserError(f"The output folder {run.out} has images of the dataset. Choose a different `out`.")
