"""A run, from its settings to its last checkpoint. The only place that sees a whole Run.

`train` is a generator of what happened: it trains, and whoever drives it (the command line, a notebook, a test)
draws bars, pictures and reports between its steps. There are no callbacks; what happens, and when, is on the page.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino import checkpoint, dist
from dino.config import from_dict, to_dict
from dino.data.folder import Folder
from dino.data.loader import train_batches
from dino.data.pictures import Pictures
from dino.data.scenes import Scenes
from dino.data.views import Batch, MultiCrop
from dino.errors import UserError
from dino.evals.knn import KNN, BoundKNN
from dino.logs import Log
from dino.methods.dino import DINO, DINOConfig
from dino.methods.method import Method
from dino.models.backbone import Backbone
from dino.models.heads import Network
from dino.models.pretrained import load_strict, save_backbone
from dino.models.timm import Timm
from dino.models.vit import ViT
from dino.optim import Optim, clip_grad_norms_, set_hyper
from dino.runtime import Precision, Runtime
from dino.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides what a training run does. It is saved with every checkpoint."""

    data: Folder | Scenes = field(default_factory=lambda: Folder(path="photos"))
    """The pictures."""
    backbone: ViT | Timm = field(default_factory=ViT)
    """The network that is trained."""
    method: DINOConfig = field(default_factory=DINOConfig)
    """How it learns."""
    views: MultiCrop = field(default_factory=MultiCrop)
    """What the student and the teacher see of a picture."""
    optim: Optim = field(default_factory=Optim)
    """How the student moves."""
    knn: KNN = field(default_factory=KNN)
    """The accuracy measured while training, where the pictures have labels."""
    precision: Precision = "float32"
    """Precision of the matrix products."""
    workers: int = 2
    """Processes that decode and crop, per rank; 0 does it in the training process."""
    cache: bool = False
    """Keep the decoded pictures in memory: worth it where they fit, and where reading one is slow."""
    seed: int = 0
    """Decides the weights at the start, the order of the pictures and every augmentation."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    save_minutes: float = 10
    """Minutes between two saves of checkpoints/last.pt; the end and Ctrl-C save too."""
    keep_every: int = 0
    """Epochs between two checkpoints that are kept for good; 0 keeps only the last and the best."""
    out: str = "runs/dino"
    """Folder of everything the run writes."""


@dataclass
class State:
    """What changes while training, and all that a checkpoint needs besides the Run."""

    method: DINO
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)


class Started(NamedTuple):
    """Training is about to take its first step (or goes on from `clock.step`)."""

    clock: Clock
    method: Method
    train: Pictures
    held_back: Pictures | None
    baselines: dict[str, dict[str, float]]


class Logged(NamedTuple):
    """Metrics, averaged over the steps since the last ones."""

    clock: Clock
    metrics: dict[str, float]


class Evaluated(NamedTuple):
    """The held-back pictures were asked about."""

    clock: Clock
    name: str
    values: dict[str, float]
    is_best: bool


class EpochDone(NamedTuple):
    """A whole epoch is behind; the method may be looked at (not touched)."""

    clock: Clock
    method: Method


class Ended(NamedTuple):
    """All is saved. `finished` is False where a signal asked to stop."""

    clock: Clock
    method: Method
    finished: bool
    skipped: dict[str, str]


Event = Started | Logged | Evaluated | EpochDone | Ended


def build_method(run: Run) -> DINO:
    """The method of a run with fresh weights, on the CPU; the same for the same seed."""
    torch.manual_seed(run.seed)
    student = run.backbone.build()
    teacher = run.backbone.build(drop_path=0.0)
    return DINO(
        Network(student, run.method.head(student.embed_dim)),
        Network(teacher, run.method.head(teacher.embed_dim)),
        run.method,
    )


def train_step(state: State, model: nn.Module, batch: Batch, clock: Clock, run: Run, rt: Runtime) -> dict[str, Tensor]:
    """Algorithm 1: the student takes a gradient step, then the method's own state follows.

    model is the method as the ranks share it (or the method itself). Metrics stay on the device.
    """
    method, optimizer, scaler = state.method, state.optimizer, state.scaler
    set_hyper(optimizer, lr=run.optim.lr_schedule()(clock), weight_decay=run.optim.weight_decay_schedule()(clock))
    with rt.autocast():
        out = model(batch, clock)
    scaler.scale(out.loss).backward()  # a disabled scaler is the identity: one path for every precision
    scaler.unscale_(optimizer)
    clip_grad_norms_(method.trained.parameters(), run.optim.clip)
    method.before_step(clock)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    method.after_step(out.carry, clock)
    return out.metrics


def train(run: Run, rt: Runtime, pictures: Pictures, *, resume: bool = False) -> Iterator[Event]:
    """Trains a Run to its end on `pictures`, yielding what happens; drive it with a `for` loop.

    resume goes on from the run's own checkpoints/last.pt, bit for bit on a CPU. Raises UserError where the data
    cannot fill a batch, the loss stops being a number, a disk is full, or the checkpoint is of another run.
    """
    out = Path(run.out)
    pictures = pictures.in_memory() if run.cache else pictures
    labelled = pictures.labels is not None and run.knn.every_epochs > 0
    rest, held_back = pictures.split(run.knn.held_back, run.seed) if labelled else (pictures, None)
    per_epoch = steps_per_epoch(run, rest)
    state = State(*_fresh(run, rt))
    if resume:
        _restore(state, run, rest)
    model = rt.prepare(state.method)
    knn = None
    if held_back is not None:
        knn = run.knn.bind(
            rest, held_back, size=run.views.global_size, device=rt.device, workers=run.workers, autocast=rt.autocast
        )
    clock = Clock(state.step, per_epoch, run.optim.epochs)
    baselines = _baselines(run, knn, resume)
    yield Started(clock, state.method, rest, held_back, baselines)
    if rt.is_main:
        checkpoint.write_json(out / "run.json", describe(run, pictures, rest, baselines))
    log = Log(out, state.step) if rt.is_main else None
    skipped = {item.name: item.reason for item in pictures.skipped}
    window = Window(run, rt)
    saved_at = time.monotonic()
    finished = state.step >= clock.steps
    try:
        with stop_signals() as stop:
            batches = train_batches(
                rest,
                run.views,
                batch_size=run.optim.batch_size,
                seed=run.seed,
                clock_start=divmod(state.step, per_epoch),
                epochs=run.optim.epochs,
                workers=run.workers,
                rank=rt.rank,
                world=rt.world,
            )
            for _, _, batch, unreadable in window.waiting(batches):
                skipped |= {item.name: item.reason for item in unreadable}
                clock = clock._replace(step=state.step)
                rt.seed_step(run.seed, state.step)
                window.add(train_step(state, model, rt.place(batch), clock, run, rt), batch)
                state.step += 1
                epoch_ends = state.step % per_epoch == 0
                finished = state.step == clock.steps
                done = clock._replace(step=state.step)
                if state.step % run.log_every == 0 or epoch_ends:
                    metrics = window.close(clock)
                    _must_be_finite(metrics, done, out)
                    if log is not None:
                        log.write(state.step, {"epoch": state.step / per_epoch, **metrics})
                    yield Logged(done, metrics)
                if knn is not None and epoch_ends and _is_due(run.knn.every_epochs, done):
                    evaluated = _evaluate(knn, state, done)
                    if log is not None:
                        log.write(state.step, {"epoch": state.step / per_epoch, "eval": "knn", **evaluated.values})
                    if evaluated.is_best and rt.is_main:
                        _save(state, run, rest, out / "checkpoints/best.pt")
                    yield evaluated
                stopping = _any_rank(stop.is_set, rt, state.step)
                due = time.monotonic() - saved_at > 60 * run.save_minutes
                if rt.is_main and (due or stopping or finished):
                    saved_at = time.monotonic()
                    window.check()
                    _save(state, run, rest, out / "checkpoints/last.pt")
                if rt.is_main and epoch_ends and run.keep_every and done.epoch % run.keep_every == 0:
                    _save(state, run, rest, out / f"checkpoints/epoch_{done.epoch:04d}.pt")
                if epoch_ends:
                    yield EpochDone(done, state.method)
                if stopping or finished:
                    break
    finally:
        if log is not None:
            log.close()
    if rt.is_main:
        export_backbone(run, state.method.backbone, out)
    yield Ended(clock._replace(step=state.step), state.method, finished, skipped)


def steps_per_epoch(run: Run, pictures: Pictures) -> int:
    """Whole batches in the pictures; the last, incomplete one is left out, another in every epoch."""
    batch = run.optim.batch_size
    if len(pictures) < batch:
        raise UserError(
            f"The batch is larger than the data: optim.batch_size is {batch}, and there are {len(pictures)} pictures "
            f"to train on. Set --optim.batch-size to {len(pictures)} or less."
        )
    return len(pictures) // batch


def describe(run: Run, pictures: Pictures, rest: Pictures, baselines: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds: the complete Run, and what it ran on."""
    from dino import __version__

    return {
        "run": to_dict(run),
        "backbone": to_dict(run.backbone),
        "data": {
            "pictures": len(pictures),
            "trained_on": len(rest),
            "classes": pictures.classes,
            "skipped": len(pictures.skipped),
            "fingerprint": rest.fingerprint,
        },
        "baselines": baselines,
        "versions": {"dino": __version__, "torch": str(torch.__version__)},
    }


def read_run(folder: Path) -> Run:
    """The Run of a run's folder. Raises UserError where there is none."""
    import json

    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"No run in {folder}: it has no run.json. Expected a folder that `dino train` made.")
    try:
        return from_dict(Run, json.loads(path.read_text())["run"])
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path} is not a run's description: {error}.") from error


def export_backbone(run: Run, backbone: Backbone, out: Path) -> Path:
    """The teacher's backbone, alone, as safetensors: what `dino.load` and timm read."""
    return save_backbone(run.backbone, backbone.state_dict(), out / "backbone.safetensors")


class Window:
    """Metrics between two log lines: sums that stay on the device, and where the time went."""

    def __init__(self, run: Run, rt: Runtime) -> None:
        self._optim, self._method, self._rt = run.optim, run.method, rt
        self._began = time.monotonic()
        self._open()

    def _open(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._pictures = 0, 0
        self._waited, self._since = 0.0, time.monotonic()

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, and the time it took to get each on the account of the data."""
        batches = iter(batches)
        while True:
            asked = time.monotonic()
            item = next(batches, None)
            self._waited += time.monotonic() - asked
            if item is None:
                return
            yield item

    def add(self, metrics: dict[str, Tensor], batch: Batch) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._pictures += batch.views[0].shape[1]

    def check(self) -> None:
        """Before a checkpoint is replaced: what was trained since the last line must still be numbers."""
        if "loss" in self._sums and not torch.isfinite(self._sums["loss"]):
            raise _not_finite()

    def close(self, clock: Clock) -> dict[str, float]:
        """Averages over the window's steps and ranks, with the schedules' values; opens the next window."""
        stacked = dist.mean(torch.stack(list(self._sums.values()))) / max(1, self._steps)
        metrics = dict(zip(self._sums, stacked.tolist(), strict=True))  # the one place that waits for the device
        seconds = time.monotonic() - self._since
        metrics |= {
            "lr": self._optim.lr_schedule()(clock),
            "weight_decay": self._optim.weight_decay_schedule()(clock),
            "momentum": self._method.momentum_schedule()(clock),
            "teacher_temp": self._method.teacher_temp_schedule()(clock),
            "images_per_s": self._rt.world * self._pictures / seconds,
            "wait": self._waited / seconds,
            "time": time.monotonic() - self._began,
        }
        self._open()
        return metrics


class Stop:
    """Whether somebody asked to stop; set by the signal, read between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def is_set(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop after the step in hand; a second Ctrl-C stops at once, unsaved."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_rank(is_set: Any, rt: Runtime, step: int) -> bool:
    """Whether any rank was asked to stop; ranks agree every 10 steps, one process asks itself each time."""
    if rt.world == 1:
        return is_set()
    if step % 10:
        return False
    return bool(dist.total(torch.tensor([float(is_set())], device=rt.device)).item())


def _fresh(run: Run, rt: Runtime) -> tuple[DINO, torch.optim.Optimizer, torch.amp.GradScaler]:
    method = build_method(run).to(rt.device)
    return method, run.optim.build(method.trained), rt.scaler()


def _is_due(every: float, clock: Clock) -> bool:
    """Whether a multiple of `every` epochs was passed in the epoch that just ended; the last one always counts."""
    return clock.step == clock.steps or math.floor(clock.epoch / every) > math.floor((clock.epoch - 1) / every)


def _evaluate(knn: BoundKNN, state: State, clock: Clock) -> Evaluated:
    values = dict(knn(state.method.backbone))
    first = next(iter(values.values()))
    is_best = first > state.best.get("value", -math.inf)
    if is_best:
        state.best = {"value": first, "name": next(iter(values)), "epoch": clock.epoch}
    return Evaluated(clock, "knn", values, is_best)


def _baselines(run: Run, knn: BoundKNN | None, resume: bool) -> dict[str, dict[str, float]]:
    """Measured once, at the start of a run; a resumed one reads them back."""
    path = Path(run.out) / "run.json"
    if resume and path.is_file():
        import json

        return json.loads(path.read_text()).get("baselines", {})
    return {} if knn is None else knn.baselines(lambda: run.backbone.build(drop_path=0.0))


def _save(state: State, run: Run, pictures: Pictures, path: Path) -> None:
    saved = checkpoint.Saved(
        run=to_dict(run),
        step=state.step,
        method=state.method.state_dict(),
        optimizer=state.optimizer.state_dict(),
        scaler=state.scaler.state_dict(),
        best=state.best,
        data=pictures.fingerprint,
    )
    checkpoint.save(path, saved)


def _restore(state: State, run: Run, pictures: Pictures) -> None:
    path = Path(run.out) / "checkpoints/last.pt"
    saved = checkpoint.load(path)
    if saved["data"] != pictures.fingerprint:
        raise UserError(
            f"{path} was trained on other pictures than these {len(pictures)}: some were added, removed or changed. "
            "Give the same data to go on, or another --out to start anew."
        )
    load_strict(state.method, saved["method"], str(path))
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.best = saved["step"], saved["best"]


def _must_be_finite(metrics: dict[str, float], clock: Clock, out: Path) -> None:
    if not math.isfinite(metrics["loss"]):
        raise _not_finite(f" at step {clock.step} (epoch {clock.step / clock.steps_per_epoch:.1f})")


def _not_finite(where: str = "") -> UserError:
    return UserError(
        f"The loss stopped being a finite number{where}. Nothing was saved since; the last good checkpoint is kept. "
        "Lower --optim.lr, set --optim.clip to 1 or less, or train with --precision float32, and --resume."
    )
