"""The training loop.

`train` is a generator of events: it trains, and the caller (the command line, a notebook, a test) draws progress,
figures and reports between steps. There are no callbacks; the order of everything is visible in the loop.
"""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from dino_ssl import __version__, kernels
from dino_ssl.config import to_dict
from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import Step, steps_per_epoch, train_batches
from dino_ssl.errors import Diverged, UserError, memory_errors
from dino_ssl.evals.scheduled import is_due, prepare_all
from dino_ssl.events import Ended, EpochDone, Event, Logged, Started
from dino_ssl.feature_stats import FeatureStats
from dino_ssl.files import read_json, remove_parts, write_json
from dino_ssl.methods.method import Outputs
from dino_ssl.metrics import Log, Meter
from dino_ssl.models.pretrained import EXPORTS, Weights
from dino_ssl.optim import clip_grad_norm_per_tensor_, set_lr_and_weight_decay
from dino_ssl.preprocessing import normalize
from dino_ssl.run import FORMAT, Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.signals import StopSignal
from dino_ssl.state import LastCheckpoint, State, build_method, export_backbone, init_state, prepare_model
from dino_ssl.training_evals import TrainingEvals, eval_context, run_datasets, split_dataset

# -- the step ----------------------------------------------------------------------------------------------


def train_step(state: State, model: nn.Module, batch: Batch, clock: Clock, run: Run, rt: Runtime) -> dict[str, Tensor]:
    """Algorithm 1: the student takes an optimizer step, then the method updates its own state.

    model: the method, wrapped for several ranks (`prepare_model`). Returns metrics, which stay on the device.
    """
    method, optimizer, scaler = state.method, state.optimizer, state.scaler
    set_lr_and_weight_decay(
        optimizer, lr=run.optim.lr_schedule()(clock), weight_decay=run.optim.weight_decay_schedule()(clock)
    )
    with memory_errors():  # before anything has changed
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
    state, evals = job.state, job.evals
    clock = Clock(state.step, job.steps_per_epoch, run.optim.epochs)
    yield Started(clock, state.method, job.train_set, job.val_set, evals.reference_scores, state.best)
    if rt.is_main:
        _prepare_folder(job, dataset, resume)
    stats = FeatureStats(state.method.backbone)
    meter = Meter(run.schedules(), rt.world_size, lambda: stats.measure() | state.method.diagnostics())
    skipped = {item.name: item.reason for item in dataset.skipped}
    finished = state.step >= clock.steps
    with Log(job.folder, state.step) as log:
        yield from evals.run(evals.pending(clock), clock, log)
        with StopSignal() as stop, job.saved_before_errors(meter):
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
                    line = meter.close(clock)
                    job.check(math.isfinite(line["loss"]), done)
                    job.check_folder()
                    if rt.is_main:
                        job.last.confirm(line["loss"])
                    log.write(done, line)
                    stop_requested = bool((yield Logged(done, line)))
                if epoch_ends:
                    job.check(state.is_usable, done)
                if epoch_ends and (evaluated := evals.run_online(done, log, state)):
                    if evaluated.is_best and state.is_usable:
                        job.save("best.pt")
                        job.export("best")
                    yield evaluated
                stopping = stop.should_stop(rt, done.step) or stop_requested
                due = [item for item in evals.scheduled if epoch_ends and is_due(item.every_epochs, done)]
                if stopping or finished:
                    job.check(meter.is_finite(all_ranks=True) and state.is_usable, done)
                if (due or stopping or finished or job.save_is_due) and rt.is_main and meter.is_finite():
                    job.save_last()
                if epoch_ends and run.keep_every and done.epoch % run.keep_every == 0:
                    job.save(f"epoch_{done.epoch:04d}.pt")
                if not stopping or finished:
                    yield from evals.run(due, done, log)
                if epoch_ends:
                    yield EpochDone(done, state.method)
                if stopping or finished:
                    break
    if finished and rt.is_main:
        job.last.previous.unlink(missing_ok=True)
    job.export("last")
    yield Ended(clock._replace(step=state.step), state.method, finished, skipped, stop.number)


@dataclass
class _Job:
    """A training run that is ready for its first step."""

    run: Run
    rt: Runtime
    train_set: ImageDataset
    val_set: ImageDataset | None
    """Labeled images of the online evaluation; None if there is none."""
    steps_per_epoch: int
    state: State
    model: nn.Module
    """The method, as a training step calls it."""
    evals: TrainingEvals
    last: LastCheckpoint
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.run.out)

    @property
    def save_is_due(self) -> bool:
        """True if the newest checkpoint is older than `save_minutes`."""
        return time.monotonic() - self.saved_at > 60 * self.run.save_minutes

    def save(self, name: str) -> None:
        """Write checkpoints/NAME on rank 0."""
        if self.rt.is_main:
            self.check_folder()
            self.state.save(self.folder / "checkpoints" / name, self.run, self.train_set.fingerprint)

    def save_last(self) -> None:
        """Write checkpoints/last.pt on rank 0, unless the last step has ruined the weights."""
        if self.rt.is_main and self.state.is_usable:
            self.check_folder()
            self.last.save(self.state, self.run, self.train_set.fingerprint)
        self.saved_at = time.monotonic()

    def check_folder(self) -> None:
        """Raise UserError if the folder of the run was deleted: the rest of its files would be no run."""
        if self.rt.is_main and not (self.folder / "run.json").is_file():
            raise UserError(
                f"{self.folder} was deleted or moved while it was trained: run.json is missing. If it was moved, "
                "resume it in its new place."
            )

    @contextmanager
    def saved_before_errors(self, meter: Meter) -> Iterator[None]:
        """Write last.pt on rank 0 before an error of data, memory or an evaluation between two steps ends training."""
        try:
            yield
        except Diverged:
            raise
        except UserError:
            self.state.optimizer.zero_grad(set_to_none=True)
            with suppress(UserError, MemoryError, RuntimeError):  # a full disk, or too little memory
                if self.state.step and meter.is_finite():
                    self.save_last()
            raise

    def check(self, is_finite: bool, clock: Clock) -> None:
        """Raise Diverged if the loss or a weight is not finite; last.pt becomes the last good checkpoint, on rank 0."""
        if is_finite:
            return
        kept, then = "No good checkpoint was saved", "start again"
        if self.rt.is_main and self.last.restore_good():
            kept, then = "The last good checkpoint is kept", "resume"
        epoch = clock.step / clock.steps_per_epoch
        raise Diverged(
            f"The loss or a weight is not finite at step {clock.step} (epoch {epoch:.1f}). {kept}. Lower `optim.lr`, "
            f"set `optim.clip_grad` to 1 or less, or `precision` to float32, and {then}."
        )

    def export(self, weights: Weights) -> None:
        """Write the backbone on rank 0."""
        if self.rt.is_main:
            export_backbone(self.run, self.state.method.backbone, weights)


def _prepare(run: Run, rt: Runtime, dataset: ImageDataset, resume: bool) -> _Job:
    """Split the data, build or restore the state, and open the data of every evaluation."""
    train_set, val_set = split_dataset(run, dataset.in_memory() if run.cache else dataset)
    per_epoch = steps_per_epoch(len(train_set), run.optim.batch_size, rt.world_size)
    state = init_state(run, rt, len(dataset.classes), resume=resume)
    if resume:
        state.restore(Path(run.out) / "checkpoints/last.pt", train_set)
    model = prepare_model(state.method, rt)
    evals = TrainingEvals(run, rt, state.method, train_set, val_set, resume=resume)
    last = LastCheckpoint(Path(run.out) / "checkpoints", run.method.num_prototypes, resume)
    return _Job(run, rt, train_set, val_set, per_epoch, state, model, evals, last)


def validate_run(run: Run, rt: Runtime, dataset: ImageDataset) -> None:
    """Raise the UserError that `train` would raise before its first step."""
    train_set, val_set = split_dataset(run, run.method.filter_dataset(dataset))
    steps_per_epoch(len(train_set), run.optim.batch_size, rt.world_size)
    method = build_method(run, classes=len(train_set.classes))
    prepare_all(run.evals, eval_context(run, rt), method.backbone, run_datasets(run, train_set, val_set))


def _batches(job: _Job) -> Iterator[Step]:
    """Return the batches of all epochs."""
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


def _prepare_folder(job: _Job, dataset: ImageDataset, resume: bool) -> None:
    """Write run.json: the complete Run, its data and the reference scores. Remove files of an interrupted session."""
    run, folder, path = job.run, job.folder, job.folder / "run.json"
    for part in (folder, folder / "checkpoints", folder / "snapshots"):
        remove_parts(part)
    if resume:  # the exported backbone is older than the checkpoints to come, but would be loaded first
        (folder / EXPORTS["last"]).unlink(missing_ok=True)
    data = {
        "images": len(dataset),
        "trained_on": len(job.train_set),
        "validated_on": len(job.val_set or ()),
        "classes": dataset.classes,
        "skipped": len(dataset.skipped),
        "fingerprint": job.train_set.fingerprint,
    }
    description = {
        "format": FORMAT,
        "run": to_dict(run),
        "backbone": to_dict(run.backbone),
        "prototypes": run.method.num_prototypes,
        "data": data,
        "reference_scores": job.evals.reference_scores,
        "versions": {"dino": __version__, "torch": str(torch.__version__)},
    }
    corrected = (read_json(path) or {}).get("corrected") if resume else None
    write_json(path, description | ({"corrected": corrected} if corrected else {}))
