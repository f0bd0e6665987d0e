"""The training loop.

`train` is a generator of events: it trains, and the caller (the command line, a notebook, a test) draws progress,
figures and reports between steps. There are no callbacks; the order of everything is visible in the loop.
"""

import json
import math
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from dino_ssl import distributed, kernels
from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import Step, steps_per_epoch, train_batches
from dino_ssl.data.sources import relabelled
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import Diverged, UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.online import PreparedOnlineEval
from dino_ssl.evals.scheduled import PreparedScheduledEval, is_due, prepare_all
from dino_ssl.events import Ended, EpochDone, EvalDone, EvalStarted, Evaluated, Event, Logged, Started
from dino_ssl.feature_stats import FeatureStats
from dino_ssl.files import remove_parts, write_json
from dino_ssl.meter import Meter
from dino_ssl.methods.method import Outputs
from dino_ssl.metrics import Log, read_metrics
from dino_ssl.optim import clip_grad_norm_per_tensor_, set_lr_and_weight_decay
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.signals import stop_signals
from dino_ssl.state import (
    State,
    build_method,
    check_grad_accumulation,
    describe_run,
    export_backbone,
    init_state,
    prepare_model,
)

# -- the step ----------------------------------------------------------------------------------------------


def train_step(state: State, model: nn.Module, batch: Batch, clock: Clock, run: Run, rt: Runtime) -> dict[str, Tensor]:
    """Algorithm 1: the student takes an optimizer step, then the method updates its own state.

    model: the method, wrapped for several ranks (`prepare_model`). Returns metrics, which stay on the device.
    """
    method, optimizer, scaler = state.method, state.optimizer, state.scaler
    set_lr_and_weight_decay(
        optimizer, lr=run.optim.lr_schedule()(clock), weight_decay=run.optim.weight_decay_schedule()(clock)
    )
    outputs = _accumulate_gradients(state, model, batch, clock, run, rt)
    scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm_per_tensor_(method.trainable.parameters(), run.optim.clip_grad)
    method.before_step(clock)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with record_function("after_step"):
        method.after_step(outputs.carry, clock)
    return outputs.metrics | {"grad_norm": grad_norm}


def _accumulate_gradients(state: State, model: nn.Module, batch: Batch, clock: Clock, run: Run, rt: Runtime) -> Outputs:
    """Run forward and backward on micro-batches of `optim.micro_batch` images.

    The loss is a mean over images, so the gradient of the batch is the sum of those of the micro-batches, weighted by
    their share of the images.
    """
    assert run.optim.micro_batch != "auto", "the plan replaces it by a number"
    method, micro_batches = state.method, batch.micro_batches(run.optim.micro_batch)
    targets, outputs, weights = [None], [], []
    if len(micro_batches) > 1:
        with rt.autocast():
            targets = method.prepare_targets(
                (batch_to_device(Batch(part.views[:1]), rt) for part in micro_batches), clock
            )
    for number, (micro_batch, target) in enumerate(zip(micro_batches, targets, strict=True), 1):
        weight = micro_batch.num_images / batch.num_images
        with rt.no_sync(model, last=number == len(micro_batches)):
            with rt.autocast(), record_function("forward"):
                out = model(batch_to_device(micro_batch, rt), clock, target)
            state.scaler.scale(out.loss * weight).backward()  # a disabled scaler is the identity
        outputs.append(out._replace(loss=out.loss.detach()))
        weights.append(weight)
    return outputs[0] if len(micro_batches) == 1 else method.merge(outputs, weights)


@record_function("copy to device")
def batch_to_device(batch: Batch, rt: Runtime) -> Batch:
    """Copy a batch to the device; uint8 images are normalized there to float32, in channels-last layout."""
    views = []
    for view in batch.views:
        view = rt.to_device(view)
        images = normalize(view.flatten(0, 1)) if view.dtype == torch.uint8 else view.flatten(0, 1).float()
        views.append(images.contiguous(memory_format=torch.channels_last).unflatten(0, view.shape[:2]))
    return Batch(tuple(views), None if batch.labels is None else rt.to_device(batch.labels))


# -- the loop ----------------------------------------------------------------------------------------------


def train(run: Run, rt: Runtime, dataset: ImageDataset, *, resume: bool = False) -> Generator[Event, bool | None]:
    """Train a Run to its end on a dataset, yielding events; iterate over it with a `for` loop.

    Sending True in reply to a Logged event, on every rank, stops training as a signal would. resume: continue from
    checkpoints/last.pt of the run; on a CPU the result is bit-identical to an uninterrupted run.
    Raises UserError if the dataset cannot fill a batch, the loss is not finite, a disk is full, or the checkpoint
    belongs to another run.
    """
    dataset = run.method.filter_dataset(dataset)
    job = _prepare(run, rt, dataset, resume)
    state, clock = job.state, Clock(job.state.step, job.steps_per_epoch, run.optim.epochs)
    yield Started(clock, state.method, job.train_set, job.val_set, job.reference_scores, state.best)
    log = _open_run_folder(job, dataset, resume)
    stats = FeatureStats(state.method.backbone)
    meter = Meter(run.schedules(), rt.world_size, lambda: stats.measure() | state.method.diagnostics())
    skipped = {item.name: item.reason for item in dataset.skipped}
    saver = _Saver(job)
    finished = state.step >= clock.steps
    try:
        yield from _evaluate(job, _pending_evals(job, clock), clock, log)
        with stop_signals() as stop:
            for step in meter.timed(_batches(job)):
                skipped |= {item.name: item.reason for item in step.skipped}
                clock = clock._replace(step=state.step)
                rt.seed_step(run.seed, state.step)
                stats.next_step()
                metrics = train_step(state, job.model, step.batch, clock, run, rt)
                meter.add(metrics, step.batch.num_images)
                state.step += 1
                done = clock._replace(step=state.step)
                epoch_ends, finished = done.step % done.steps_per_epoch == 0, done.step == done.steps
                stop_requested = False
                if done.step % run.log_every == 0 or epoch_ends:
                    event = _log_metrics(job, meter, clock, done, log)
                    stop_requested = bool((yield event))
                if epoch_ends:
                    yield from _evaluate_online(job, done, log, saver)
                stopping = stop.should_stop(rt, done.step) or stop_requested
                due = [item for item in job.evals if epoch_ends and is_due(item.every_epochs, done)]
                if stopping or finished:
                    _check_finite(meter.is_finite(all_ranks=True), done, job.folder)
                saver.save_if_due(done, meter, force=bool(due) or stopping or finished, epoch_ends=epoch_ends)
                if not stopping or finished:
                    yield from _evaluate(job, due, done, log)
                if epoch_ends:
                    yield EpochDone(done, state.method)
                if stopping or finished:
                    break
    finally:
        if log is not None:
            log.close()
    if rt.is_main:
        export_backbone(run, state.method.backbone, job.folder)
    yield Ended(clock._replace(step=state.step), state.method, finished, skipped, stop.signal)


@dataclass(frozen=True)
class _Job:
    """A training run that is ready for its first step."""

    run: Run
    rt: Runtime
    folder: Path
    train_set: ImageDataset
    val_set: ImageDataset | None
    """Labeled images of the online evaluation; None if there is none."""
    steps_per_epoch: int
    state: State
    model: nn.Module
    """The method, as a training step calls it."""
    online_eval: PreparedOnlineEval | None
    evals: list[PreparedScheduledEval]
    reference_scores: Mapping[str, Mapping[str, float]]


def _prepare(run: Run, rt: Runtime, dataset: ImageDataset, resume: bool) -> _Job:
    """Split the data, build or restore the state, and open the data of every evaluation."""
    folder = Path(run.out)
    train_set, val_set = split_dataset(run, dataset.in_memory() if run.cache else dataset)
    per_epoch = steps_per_epoch(len(train_set), run.optim.batch_size, rt.world_size)
    state = init_state(run, rt, len(dataset.classes), resume=resume)
    if resume:
        state.restore(folder / "checkpoints/last.pt", train_set)
    check_grad_accumulation(run, state.method)
    model = prepare_model(state.method, rt)
    context = eval_context(run, rt)
    online = None if val_set is None else run.online_eval.prepare(state.method, train_set, val_set, context)
    evals = prepare_all(run.evals, context, state.method.backbone)
    references = _reference_scores(run, rt, online, resume)
    return _Job(run, rt, folder, train_set, val_set, per_epoch, state, model, online, evals, references)


def validate_run(run: Run, rt: Runtime, dataset: ImageDataset) -> None:
    """Raise the UserError that `train` would raise before its first step."""
    train_set, _ = split_dataset(run, run.method.filter_dataset(dataset))
    steps_per_epoch(len(train_set), run.optim.batch_size, rt.world_size)
    method = build_method(run, classes=len(train_set.classes))
    check_grad_accumulation(run, method)
    prepare_all(run.evals, eval_context(run, rt), method.backbone)


def split_dataset(run: Run, dataset: ImageDataset) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training set and the validation set of the online evaluation; None without labels."""
    if dataset.labels is None or run.online_eval.every_epochs == 0:
        return dataset, None
    if run.val is None:
        train_set, val_set = dataset.split(run.online_eval.val_fraction, run.seed)
        return train_set, val_set if len(val_set) else None  # no class has two images
    val_set = distributed.run_on_rank0(run.val.open)
    if val_set.labels is None:
        raise UserError("The validation set `val` has no labels: put the images of each class in a folder of its own.")
    return dataset, relabelled(val_set, dataset.classes)


def eval_context(run: Run, rt: Runtime) -> EvalContext:
    """Return the context in which a run's network is evaluated."""
    return EvalContext(
        device=rt.device,
        workers=run.workers,
        batch_size=run.online_eval.batch_size,
        size=run.views.size,
        autocast=rt.autocast,
    )


def _batches(job: _Job) -> Iterator[Step]:
    run, rt = job.run, job.rt
    return train_batches(
        job.train_set,
        kernels.fastest_transform(run.views) if rt.optimized else run.views,
        batch_size=run.optim.batch_size,
        seed=run.seed,
        clock_start=divmod(job.state.step, job.steps_per_epoch),
        epochs=run.optim.epochs,
        workers=run.workers,
        rank=rt.rank,
        world=rt.world_size,
        pin_memory=rt.device.type == "cuda",
    )


# -- evaluation during training ----------------------------------------------------------------------------


def _evaluate_online(job: _Job, clock: Clock, log: Log | None, saver: "_Saver") -> Iterator[Event]:
    """Measure the online accuracy if it is due, and keep the best checkpoint."""
    if job.online_eval is None or not is_due(job.run.online_eval.every_epochs, clock):
        return
    values = dict(job.online_eval.measure())
    name, value = next(iter(values.items()))
    is_best = value > job.state.best.get("value", -math.inf)
    if is_best:
        job.state.best = {"value": value, "name": name, "epoch": clock.epoch}
        saver.save("best.pt")
    if log is not None:
        row = {"epoch": clock.step / clock.steps_per_epoch, "eval": job.online_eval.name, **values}
        log.write(clock.step, row)
    yield Evaluated(clock, job.online_eval.name, values, is_best)


def _evaluate(job: _Job, evals: list[PreparedScheduledEval], clock: Clock, log: Log | None) -> Iterator[Event]:
    """Run these of the run's `evals` on the current network."""
    for item in evals:
        yield EvalStarted(clock, item.label)
        values = dict(item.evaluation(job.state.method.backbone))
        if log is not None:
            row = {"epoch": clock.step / clock.steps_per_epoch, "eval": item.label, **values}
            log.write(clock.step, row, item.label)
        yield EvalDone(clock, item.label, values)


def _pending_evals(job: _Job, clock: Clock) -> list[PreparedScheduledEval]:
    """Return the evaluations due before the first step.

    At step 0 all scheduled ones; after a resume those that were due at this step and have no line in the metrics,
    because training stopped before they ran.
    """
    if clock.step == 0:
        return [item for item in job.evals if item.every_epochs]
    due = [item for item in job.evals if clock.step % clock.steps_per_epoch == 0 and is_due(item.every_epochs, clock)]
    if not due:
        return []
    logged = distributed.run_on_rank0(
        lambda: [line.get("eval") for line in read_metrics(job.folder) if line["step"] == clock.step]
    )
    return [item for item in due if item.label not in logged]


def _reference_scores(
    run: Run, rt: Runtime, online: PreparedOnlineEval | None, resume: bool
) -> Mapping[str, Mapping[str, float]]:
    """Measure the reference scores at the start of a run; a resumed run reads them from run.json."""
    path = Path(run.out) / "run.json"

    def read() -> Mapping[str, Mapping[str, float]] | None:
        return json.loads(path.read_text()).get("reference_scores", {}) if resume and path.is_file() else None

    if (scores := distributed.run_on_rank0(read)) is not None:
        return scores
    return {} if online is None else online.references(lambda: run.backbone.build(drop_path=0.0).to(rt.device))


# -- the run folder ----------------------------------------------------------------------------------------


def _open_run_folder(job: _Job, dataset: ImageDataset, resume: bool) -> Log | None:
    """Write run.json and open the metrics file, on rank 0."""
    if not job.rt.is_main:
        return None
    remove_parts(job.folder / "checkpoints")
    if resume:  # the exported backbone is older than the checkpoints to come, but would be loaded first
        (job.folder / "backbone.safetensors").unlink(missing_ok=True)
    description = describe_run(job.run, dataset, job.train_set, job.reference_scores)
    write_json(job.folder / "run.json", description)
    return Log(job.folder, job.state.step)


def _log_metrics(job: _Job, meter: Meter, clock: Clock, done: Clock, log: Log | None) -> Logged:
    metrics = meter.close(clock)
    _check_finite(math.isfinite(metrics["loss"]), done, job.folder)
    if log is not None:
        log.write(done.step, {"epoch": done.step / done.steps_per_epoch, **metrics})
    return Logged(done, metrics)


class _Saver:
    """Writes checkpoints, on rank 0."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.saved_at = time.monotonic()

    def save(self, name: str) -> None:
        """Write checkpoints/NAME."""
        job = self.job
        if job.rt.is_main:
            job.state.save(job.folder / "checkpoints" / name, job.run, job.train_set.fingerprint)

    def save_if_due(self, clock: Clock, meter: Meter, *, force: bool, epoch_ends: bool) -> None:
        """Write last.pt every `save_minutes`, and a checkpoint to keep every `keep_every` epochs."""
        run = self.job.run
        due = force or time.monotonic() - self.saved_at > 60 * run.save_minutes
        if self.job.rt.is_main and due and meter.is_finite():
            self.saved_at = time.monotonic()
            self.save("last.pt")
        if epoch_ends and run.keep_every and clock.epoch % run.keep_every == 0:
            self.save(f"epoch_{clock.epoch:04d}.pt")


def _check_finite(is_finite: bool, clock: Clock, folder: Path) -> None:
    if is_finite:
        return
    saved = (folder / "checkpoints/last.pt").is_file()
    epoch = clock.step / clock.steps_per_epoch
    raise Diverged(
        f"The loss is not finite at step {clock.step} (epoch {epoch:.1f}). "
        + ("The last good checkpoint is kept. " if saved else "No checkpoint was saved yet. ")
        + "Lower `optim.lr`, set `optim.clip_grad` to 1 or less, or `precision` to float32, and "
        + ("resume." if saved else "start again.")
    )
