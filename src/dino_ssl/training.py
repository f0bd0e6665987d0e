"""A run, from its first step to its last checkpoint.

`train` is a generator of what happened: it trains, and whoever drives it (the command line, a notebook, a test)
draws bars, pictures and reports between its steps. There are no callbacks; what happens, and when, is on the page.
"""

import json
import math
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_ssl import checkpoint, distributed, kernels
from dino_ssl.config import to_dict
from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import steps_per_epoch, train_batches
from dino_ssl.data.sources import relabelled
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import Diverged, UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.online import BoundOnlineEval
from dino_ssl.evals.scheduled import BoundEval, bind_all
from dino_ssl.events import Ended, EpochDone, Evaluated, Event, Logged, Measured, Measuring, Started
from dino_ssl.feature_stats import FeatureStats
from dino_ssl.files import remove_parts, write_json
from dino_ssl.meter import Meter
from dino_ssl.methods.method import BuildContext, Implementations, Method, Outputs
from dino_ssl.metrics import Log, read_metrics
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import load, load_strict, save_backbone
from dino_ssl.models.sync_bn import convert_sync_batchnorm, has_batch_norm
from dino_ssl.optim import clip_grad_norm_per_tensor_, set_hyper
from dino_ssl.run import Run, describe
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.signals import stop_signals


@dataclass
class State:
    """What changes while training, and all that a checkpoint needs besides the Run."""

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)


def build_method(
    run: Run, *, classes: int = 0, weights: Mapping[str, Tensor] | None = None, optimized: bool = True
) -> Method:
    """Return the method of a run with initial weights, on the CPU; the same for the same seed.

    classes: number of classes of the labels. weights: of the backbone that `run.init` names. optimized: use the
    optimized kernels.
    """
    implementations = Implementations(**kernels.optimized()) if optimized else Implementations()
    torch.manual_seed(run.seed)
    method = run.method.build(BuildContext(run.backbone, run.seed, classes, weights, run.init or "", implementations))
    for part in method.trainable.modules():
        if isinstance(part, Backbone):
            part.set_grad_checkpointing(run.grad_checkpointing)
    return method


def prepare_model(method: Method, rt: Runtime) -> nn.Module:
    """Return the module that a training step calls: the method on its device, shared by all ranks.

    The method stays the owner of parameters and state. Batch norms are converted to use the batch of all ranks.
    """
    if rt.world_size > 1:
        convert_sync_batchnorm(method, fused=rt.device.type == "cuda")
    return rt.distribute(method)


def batch_to_device(batch: Batch, rt: Runtime) -> Batch:
    """Copy a batch to the device; uint8 images are normalised there to float32, in channels-last layout."""
    views = []
    for view in batch.views:
        view = rt.to_device(view)
        images = normalize(view.flatten(0, 1)) if view.dtype == torch.uint8 else view.flatten(0, 1).float()
        views.append(images.contiguous(memory_format=torch.channels_last).unflatten(0, view.shape[:2]))
    return Batch(tuple(views), None if batch.labels is None else rt.to_device(batch.labels))


def train_step(state: State, model: nn.Module, batch: Batch, clock: Clock, run: Run, rt: Runtime) -> dict[str, Tensor]:
    """Algorithm 1: the student takes a gradient step, then the method's own state follows.

    model is the method as the ranks share it (or the method itself). Metrics stay on the device.
    """
    method, optimizer, scaler = state.method, state.optimizer, state.scaler
    set_hyper(optimizer, lr=run.optim.lr_schedule()(clock), weight_decay=run.optim.weight_decay_schedule()(clock))
    out = _gradients(state, model, batch, clock, run, rt)
    scaler.unscale_(optimizer)
    gradients = clip_grad_norm_per_tensor_(method.trainable.parameters(), run.optim.clip)
    method.before_step(clock)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    method.after_step(out.carry, clock)
    return out.metrics | {"grad_norm": gradients}


def _gradients(state: State, model: nn.Module, batch: Batch, clock: Clock, run: Run, rt: Runtime) -> Outputs:
    """Forward and backward of a batch, in parts of `optim.micro_batch` pictures: the loss is a mean over pictures, so
    that the parts' gradients, each by its share of them, add up to the whole batch's."""
    assert run.optim.micro_batch != "auto", "the plan has put a number in its place"
    method, parts = state.method, batch.micro_batches(run.optim.micro_batch)
    ahead, outs, shares = [None], [], []
    if len(parts) > 1:
        with rt.autocast():
            ahead = method.prepare_targets((batch_to_device(Batch(part.views[:1]), rt) for part in parts), clock)
    for number, (part, known) in enumerate(zip(parts, ahead, strict=True), 1):
        share = part.views[0].shape[1] / batch.views[0].shape[1]
        with rt.no_sync(model, last=number == len(parts)):
            with rt.autocast():
                out = model(batch_to_device(part, rt), clock, known)
            state.scaler.scale(out.loss * share).backward()  # a disabled scaler is the identity: one path for all
        outs.append(out._replace(loss=out.loss.detach()))
        shares.append(share)
    return outs[0] if len(parts) == 1 else method.merge(outs, shares)


def train(run: Run, rt: Runtime, dataset: ImageDataset, *, resume: bool = False) -> Generator[Event, bool | None]:
    """Trains a Run to its end on `dataset`, yielding what happens; drive it with a `for` loop.

    Whoever answers True to a Logged (`send`, on every rank) ends it there, as a signal would. resume goes on from the
    run's own checkpoints/last.pt, bit for bit on a CPU. Raises UserError where the data cannot fill a batch, the loss
    stops being a number, a disk is full, or the checkpoint is of another run.
    """
    out = Path(run.out)
    dataset = run.method.filter_dataset(dataset)
    dataset = dataset if not run.cache else dataset.in_memory()
    rest, asked, per_epoch = _parts(run, rt, dataset)
    state = _init_state(run, rt, len(dataset.classes), resume)
    if resume:
        _restore(state, run, rest)
    _check_grad_accumulation(run, state.method)
    model = prepare_model(state.method, rt)
    context = _site(run, rt)
    watched = None if asked is None else run.online_eval.on(state.method, rest, asked, context)
    evals = bind_all(run.evals, context, state.method.backbone)
    clock = Clock(state.step, per_epoch, run.optim.epochs)
    baselines = _baselines(run, rt, watched, resume)
    yield Started(clock, state.method, rest, asked, baselines, state.best)
    if rt.is_main:
        remove_parts(out / "checkpoints")
        if resume:  # what was exported is older than what will be saved, and would be taken for the newest
            (out / "backbone.safetensors").unlink(missing_ok=True)
        write_json(out / "run.json", describe(run, dataset, rest, baselines, run.method.num_prototypes))
    log = Log(out, state.step) if rt.is_main else None
    skipped = {item.name: item.reason for item in dataset.skipped}
    stats = FeatureStats(state.method.backbone)
    meter = Meter(run.schedules(), rt.world_size, lambda: stats.measure() | state.method.diagnostics())
    saved_at = time.monotonic()
    finished = state.step >= clock.steps
    try:
        yield from _measured(_pending_evals(evals, clock, out), state, clock, log)
        with stop_signals() as stop:
            batches = train_batches(
                rest,
                kernels.fastest_transform(run.views) if rt.optimized else run.views,
                batch_size=run.optim.batch_size,
                seed=run.seed,
                clock_start=divmod(state.step, per_epoch),
                epochs=run.optim.epochs,
                workers=run.workers,
                rank=rt.rank,
                world=rt.world_size,
                pin_memory=rt.device.type == "cuda",
            )
            for _, _, batch, unreadable in meter.timed(batches):
                stats.next_step()
                enough = False
                skipped |= {item.name: item.reason for item in unreadable}
                clock = clock._replace(step=state.step)
                rt.seed_step(run.seed, state.step)
                meter.add(train_step(state, model, batch, clock, run, rt), batch.views[0].shape[1])
                state.step += 1
                epoch_ends = state.step % per_epoch == 0
                finished = state.step == clock.steps
                done = clock._replace(step=state.step)
                if state.step % run.log_every == 0 or epoch_ends:
                    metrics = meter.close(clock)
                    _check_finite(math.isfinite(metrics["loss"]), done, out)
                    if log is not None:
                        log.write(state.step, {"epoch": state.step / per_epoch, **metrics})
                    enough = bool((yield Logged(done, metrics)))
                if watched is not None and epoch_ends and _is_due(run.online_eval.every_epochs, done):
                    evaluated = _evaluate(watched, state, done)
                    if log is not None:
                        named = {"epoch": state.step / per_epoch, "eval": evaluated.name}
                        log.write(state.step, named | evaluated.values)
                    if evaluated.is_best and rt.is_main:
                        _save(state, run, rest, out / "checkpoints/best.pt")
                    yield evaluated
                stopping = stop.should_stop(rt, state.step) or enough
                due_evals = [one for one in evals if epoch_ends and _is_due(one.every_epochs, done)]
                due = time.monotonic() - saved_at > 60 * run.save_minutes or due_evals  # these may take long, or fail
                if stopping or finished:
                    _check_finite(meter.is_finite(all_ranks=True), done, out)
                if rt.is_main and (due or stopping or finished) and meter.is_finite():
                    saved_at = time.monotonic()
                    _save(state, run, rest, out / "checkpoints/last.pt")
                if rt.is_main and epoch_ends and run.keep_every and done.epoch % run.keep_every == 0:
                    _save(state, run, rest, out / f"checkpoints/epoch_{done.epoch:04d}.pt")
                if not stopping or finished:
                    yield from _measured(due_evals, state, done, log)
                if epoch_ends:
                    yield EpochDone(done, state.method)
                if stopping or finished:
                    break
    finally:
        if log is not None:
            log.close()
    if rt.is_main:
        export_backbone(run, state.method.backbone, out)
    yield Ended(clock._replace(step=state.step), state.method, finished, skipped, stop.signal)


def validate_run(run: Run, rt: Runtime, dataset: ImageDataset) -> None:
    """Raises the UserError that `train` would raise before its first step for these pictures and these evaluations."""
    rest, _, _ = _parts(run, rt, run.method.filter_dataset(dataset))
    method = build_method(run, classes=len(rest.classes))
    _check_grad_accumulation(run, method)
    bind_all(run.evals, _site(run, rt), method.backbone)


def export_backbone(run: Run, backbone: Backbone, out: Path) -> Path:
    """The method's backbone (DINO: the teacher's), alone, as safetensors: what `dino_ssl.load` and timm read."""
    return save_backbone(run.backbone, backbone.state_dict(), out / "backbone.safetensors")


def _parts(run: Run, rt: Runtime, dataset: ImageDataset) -> tuple[ImageDataset, ImageDataset | None, int]:
    """(pictures to learn from, pictures with labels to be asked about while training or None where that cannot be,
    steps of an epoch)."""
    rest, asked = _split(run, dataset)
    return rest, asked, steps_per_epoch(len(rest), run.optim.batch_size, rt.world_size)


def _split(run: Run, dataset: ImageDataset) -> tuple[ImageDataset, ImageDataset | None]:
    if dataset.labels is None or run.online_eval.every_epochs == 0:
        return dataset, None
    if run.val is None:
        rest, asked = dataset.split(run.online_eval.val_fraction, run.seed)
        return rest, asked if len(asked) else None  # a class of one picture has none to spare
    asked = distributed.run_on_rank0(run.val.open)  # looked at by the first rank alone
    if asked.labels is None:
        raise UserError("The accuracy on the pictures of --val needs labels, and they have none: give class folders.")
    return dataset, relabelled(asked, dataset.classes)


def _init_state(run: Run, rt: Runtime, classes: int, resume: bool) -> State:
    """The state at step 0. A run that goes on needs no first weights: its checkpoint has them all."""
    weights = None
    if run.init is not None and not resume:
        source = run.init
        weights = distributed.run_on_rank0(lambda: load(source).state_dict())
    method = build_method(run, classes=classes, weights=weights, optimized=rt.optimized).to(rt.device)
    return State(method, run.optim.build(method.trainable), rt.scaler())


def _check_grad_accumulation(run: Run, method: Method) -> None:
    """Batch norm compares the pictures of a batch, whatever the method does."""
    if run.optim.micro_batch and has_batch_norm(method):
        raise UserError(
            f"--optim.micro-batch {run.optim.micro_batch}: network or head has batch norm, whose statistics are those "
            "of the pictures that pass at once. Expected 0, and a smaller --optim.batch-size or --recompute; a ViT "
            "with --method.head-norm none can go in parts."
        )


def _is_due(every: float, clock: Clock) -> bool:
    """Whether a multiple of `every` epochs was passed in the epoch that just ended; the last one always counts, and
    0 means that one alone."""
    if clock.step == clock.steps or not every:
        return clock.step == clock.steps
    return math.floor(clock.epoch / every) > math.floor((clock.epoch - 1) / every)


def _evaluate(watched: BoundOnlineEval, state: State, clock: Clock) -> Evaluated:
    values = dict(watched.measure())
    name, first = next(iter(values.items()))
    is_best = first > state.best.get("value", -math.inf)
    if is_best:
        state.best = {"value": first, "name": name, "epoch": clock.epoch}
    return Evaluated(clock, watched.name, values, is_best)


def _pending_evals(evals: list[BoundEval], clock: Clock, out: Path) -> list[BoundEval]:
    """What is to be asked before the first step of a session: at step 0 all that are asked on the way, and of a run
    that goes on what was due at its step and has no line, since a stop came before the answer."""
    if clock.step == 0:
        return [one for one in evals if one.every_epochs]
    due = [one for one in evals if clock.step % clock.steps_per_epoch == 0 and _is_due(one.every_epochs, clock)]
    if not due:
        return []
    told = distributed.run_on_rank0(
        lambda: [line.get("eval") for line in read_metrics(out) if line["step"] == clock.step]
    )
    return [one for one in due if one.label not in told]


def _measured(evals: list[BoundEval], state: State, clock: Clock, log: Log | None) -> Iterator[Event]:
    """Asks these evaluations of the network as it is now."""
    for one in evals:
        yield Measuring(clock, one.label)
        values = dict(one.evaluator(state.method.backbone))
        if log is not None:
            log.write(clock.step, {"epoch": clock.step / clock.steps_per_epoch, "eval": one.label, **values}, one.label)
        yield Measured(clock, one.label, values)


def _site(run: Run, rt: Runtime) -> EvalContext:
    return EvalContext(
        device=rt.device,
        workers=run.workers,
        batch_size=run.online_eval.batch_size,
        size=run.views.size,
        autocast=rt.autocast,
    )


def _baselines(
    run: Run, rt: Runtime, watched: BoundOnlineEval | None, resume: bool
) -> Mapping[str, Mapping[str, float]]:
    """Measured once, at the start of a run; a resumed one reads them back."""
    path = Path(run.out) / "run.json"

    def before() -> Mapping[str, Mapping[str, float]] | None:
        return json.loads(path.read_text()).get("baselines", {}) if resume and path.is_file() else None

    if (measured := distributed.run_on_rank0(before)) is not None:
        return measured
    return {} if watched is None else watched.references(lambda: run.backbone.build(drop_path=0.0).to(rt.device))


def _save(state: State, run: Run, dataset: ImageDataset, path: Path) -> None:
    saved = checkpoint.Saved(
        run=to_dict(run),
        step=state.step,
        method=state.method.state_dict(),
        optimizer=state.optimizer.state_dict(),
        scaler=state.scaler.state_dict(),
        best=state.best,
        data=dataset.fingerprint,
    )
    checkpoint.save(path, saved)


def _restore(state: State, run: Run, dataset: ImageDataset) -> None:
    path = Path(run.out) / "checkpoints/last.pt"
    saved = checkpoint.load(path)
    if saved["data"] != dataset.fingerprint:
        raise UserError(
            f"{path} was trained on other pictures than these {len(dataset)}: some were added, removed or changed. "
            "Give the same data to go on, or another --out to start anew."
        )
    load_strict(state.method, saved["method"], str(path))
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.best = saved["step"], saved["best"]


def _check_finite(is_finite: bool, clock: Clock, out: Path) -> None:
    if is_finite:
        return
    saved = (out / "checkpoints/last.pt").is_file()
    epoch = clock.step / clock.steps_per_epoch
    raise Diverged(
        f"The loss stopped being a finite number at step {clock.step} (epoch {epoch:.1f}). "
        + ("Nothing was saved since; the last good checkpoint is kept. " if saved else "Nothing was saved yet. ")
        + "Lower --optim.lr, set --optim.clip to 1 or less, or train with --precision float32, and "
        + ("--resume." if saved else "start again.")
    )
