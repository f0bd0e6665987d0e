"""A complete Run for a dataset and a machine, with the reason of each choice.

Nothing is chosen later: the Run that `plan` returns is trained, and saved with its results.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dino_ssl.config import edit
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.formatting import duration, plural
from dino_ssl.methods import MethodConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.presets.benchmark_step import Speed, measure, micro_batch
from dino_ssl.presets.recipe import Rows, describe_teacher, fit_to_size, recipe_for
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, machine_memory

FORMAT = 1
"""Version of plan.json."""
LEARNING_IMAGES = 10_000
"""Training images, counted in every epoch, below which nothing was measured: one epoch of 6,500 photos, of 40, was
enough for `small` to be above random weights and raw pixels (LOG.md). Larger networks need more."""
FEW_IMAGES = 2500
"""Number of different images up to which runs of 60,000 to 90,000 training images ended above raw pixels on some photos
and below on others (docs/train.md)."""
FULL_SCHEDULE_STEPS = 8000
"""Number of steps from which a plan uses the full schedules of learning rate and momentum. Those of short runs were
better for 2,800 steps; for 9,600 and 15,958, only the full ones were measured (docs/results.md)."""
WORKER_MARGIN = 1.25
"""Images that the workers should be able to load per image trained: files differ."""


class Reason(NamedTuple):
    """One choice of the plan and its reason."""

    name: str
    value: str
    reason: str


class Plan(NamedTuple):
    """A complete Run, and the reasons of its choices."""

    run: Run
    reasons: list[Reason]
    recommended: Run
    """The Run without the user's settings: the preset, or what is chosen for the dataset."""
    fit: Callable[[int], Run]
    """Returns the Run with another number of epochs, and with the schedules for it."""


Change = Callable[[Run], Run]
"""Applies the user's settings to any Run."""


def plan(
    dataset: ImageDataset,
    machine: Machine,
    *,
    preset: Run | None = None,
    change: Change = lambda run: run,
    method: type[MethodConfig] = DINOConfig,
    world: int = 1,
    minutes: float | None = None,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Return a Run for this dataset and machine, with the user's settings; takes some seconds, to measure the speed.

    preset: its settings are kept except those of the machine (precision, workers, cache). method: used if there is no
    preset. minutes: training time, from which the number of epochs is derived; nothing else that is learned depends on
    the measured speed. world: number of ranks. Raises UserError if the user sets both time and epochs.
    """
    rows: Rows = {}
    recipe = recipe_for(dataset, machine, world, method, rows) if preset is None else preset
    recipe = _for_machine(recipe, dataset, machine, rows, keep_float32=preset is not None)
    run = change(recipe)
    if preset is None and run.views.size != recipe.views.size:
        recipe = fit_to_size(recipe, run.views.size)
        run = change(recipe)
    if dataset.bit_depth is not None:
        white = 2**dataset.bit_depth - 1
        rows["bit depth"] = (
            f"{dataset.bit_depth}",
            f"of 16-bit files: {white:,} is white; fits a sample of the values, or set by `data.bit_depth`",
        )
    if run.optim.micro_batch == "auto":
        size, reason = micro_batch(run, machine, len(dataset.classes), world)
        rows["micro-batch"] = str(size or "none"), reason
        user, change = change, lambda run: edit(user(run), optim=dict(micro_batch=size))
        run = change(run)
    rows["quality"] = _quality(run, dataset)
    epochs, steps = run.optim.epochs, num_train_images(run, dataset) // run.optim.batch_size
    if preset is None:
        reason = f"for {len(dataset):,} images on this device; `minutes` or `optim.epochs` changes it"
        rows["epochs"] = f"{epochs}", reason
    if minutes is not None and change(edit(run, optim=dict(epochs=epochs + 1))).optim.epochs == epochs:
        raise UserError("`minutes` and `optim.epochs` both set the length of the run. Omit one of them.")
    if steps:  # otherwise training raises the error
        speed = measure(run, machine, dataset, progress)
        run = with_workers(run, machine, speed, rows)
        recipe = edit(recipe, workers=run.workers)
        epochs = _choose_length(run, machine, speed, steps, world, minutes, rows)
        if preset is None:  # LEARNING_IMAGES were measured with the networks and settings of a plan
            seconds = speed.seconds(run, machine, LEARNING_IMAGES) / world
            _warn_of_few_images(run, len(dataset), epochs * steps * run.optim.batch_size, seconds, rows)
    adapts = preset is None and machine.device.type == "cpu"

    def fit(epochs: int, change: Change = change) -> Run:
        fitted = fit_schedule(change(recipe), epochs)
        return change(short_schedule(fitted, epochs * steps) if adapts else fitted)

    run = fit(epochs) if preset is None or minutes is not None else change(recipe)
    if adapts:
        _explain_schedule(run, epochs * steps, rows)
    recommended = preset or fit(recipe.optim.epochs, lambda run: run)
    return Plan(run, [Reason(name, *row) for name, row in rows.items()], recommended, fit)


def num_train_images(run: Run, dataset: ImageDataset) -> int:
    """Return the number of training images, without the held-out ones; at least 1."""
    fraction = run.online_eval.held_out_fraction(dataset) if run.val is None else 0
    return max(1, len(dataset) - round(fraction * len(dataset)))


def describe_preset(run: Run) -> str:
    """Return network, length and method of a preset in one line."""
    return f"{run.backbone.describe()}, {run.optim.epochs} epochs, batch {run.optim.batch_size}, {run.method.summary}"


def fit_schedule(run: Run, epochs: int) -> Run:
    """Return the run with this many epochs, a warm-up of at most a tenth of them, and about 15 evaluations."""
    warmup = min(run.optim.warmup_epochs, 0.1 * epochs)
    every = max(1.0, epochs // 15)
    return edit(run, optim=dict(epochs=epochs, warmup_epochs=warmup), online_eval=dict(every_epochs=every))


def short_schedule(run: Run, steps: int) -> Run:
    """Return the run with schedules for this number of steps, if they are fewer than FULL_SCHEDULE_STEPS.

    The learning rate decays only to half of its peak, and the EMA momentum stays low. `small()`, then a ResNet-10 with
    crops of 64 and 32 px, reached 53.4 % after half an hour and 180,000 images, and 44.9 % with the usual final values
    (LOG.md). Methods without such settings are unchanged.
    """
    method = run.method.for_few_steps()
    if steps >= FULL_SCHEDULE_STEPS or method is None:
        return run
    peak = run.optim.lr * run.optim.batch_size / 256
    return edit(run, method=method, optim=dict(min_lr=peak / 2))


def _for_machine(run: Run, dataset: ImageDataset, machine: Machine, rows: Rows, *, keep_float32: bool) -> Run:
    """Choose the precision, and whether one rank keeps decoded images in at most an eighth of the memory."""
    precision, reason = machine.precision, machine.precision_reason
    if keep_float32 and run.precision == "float32":
        precision, reason = run.precision, "as in the preset"
    memory = machine_memory()
    cache = machine.ranks == 1 and dataset.nbytes < memory / 8
    device = f"{machine.memory / 2**30:.0f} GiB; device {machine.device}"
    decoded = f"{dataset.nbytes / 2**20:,.0f} MiB decoded, of {memory / 2**30:.0f} GiB"
    rows["machine"] = f"{machine.name}, {machine.cores} cores", device
    rows["precision"] = precision, reason
    rows["cache"] = "in memory" if cache else "none", decoded
    return edit(run, precision=precision, cache=cache)


def with_workers(run: Run, machine: Machine, speed: Speed, rows: Rows) -> Run:
    """Choose the workers that keep up with the step, with a margin, but not more than the rank has cores."""
    available = machine.cores_per_rank - (machine.device.type != "cpu")  # the process of a GPU needs one core itself
    needed = math.ceil(WORKER_MARGIN * speed.data / speed.step)
    workers = max(1, min(needed, available))
    step, data = (f"{1e3 * seconds:.1f} ms" for seconds in (speed.step, speed.data))
    reason = f"an image takes {data} to decode and augment, and {step} in the training step"
    if needed > workers:
        reason += f"; {needed} would keep up, but there are too few cores"
    rows["workers"] = f"{workers}", reason
    return edit(run, workers=workers)


def _choose_length(
    run: Run, machine: Machine, speed: Speed, steps: int, world: int, minutes: float | None, rows: Rows
) -> int:
    """Return the epochs of `steps` steps that fit into the time, or the run's; add the expected time."""
    num_images, epochs = steps * run.optim.batch_size, run.optim.epochs
    seconds = speed.seconds(run, machine, num_images) / world
    if minutes is not None:
        epochs = max(1, int(60 * minutes / seconds))
        reason = "fit into {} at the measured speed; corrected once by the speed of the first epochs"
        rows["epochs"] = f"{epochs}", reason.format(duration(60 * minutes))
    rates = f"{1 / speed.step:,.1f} images/s in the training step, {1 / speed.data:.0f} images/s per loading worker"
    if 0 < speed.num_images < run.optim.batch_size:
        rates += f"; scaled from steps of {speed.num_images} images"
    rows["expected time"] = duration(epochs * seconds), f"measured: {rates}"
    return epochs


def _warn_of_few_images(run: Run, num_distinct: int, num_images: int, seconds: float, rows: Rows) -> None:
    """Add a warning if the run sees too few images to learn, or too few different ones.

    num_images: those of all epochs. seconds: the time of LEARNING_IMAGES.
    """
    if run.init is not None or run.method.classifies:
        return
    if num_images < LEARNING_IMAGES:
        rows["warning"] = (
            "may end below random weights and raw pixels",
            f"its epochs have {plural(num_images, 'image')} in all; we have no measurement of fewer than "
            f"{LEARNING_IMAGES:,}, which take {duration(seconds)} here: train longer (`minutes`), add images, or start "
            "from released weights (`init` dino_vits16)",
        )
    elif num_distinct <= FEW_IMAGES:
        rows["warning"] = (
            "may end below raw pixels",
            f"{plural(num_distinct, 'different image')}: runs on 200 to 2,000 ended above raw pixels on photos of many "
            "scenes, and below on photos of one layout: add images, or start from released weights (`init` "
            "dino_vits16)",
        )


def _explain_schedule(run: Run, steps: int, rows: Rows) -> None:
    """Replace the reasons of the final values of learning rate and momentum if they are those for few steps."""
    if steps < FULL_SCHEDULE_STEPS and run.method.for_few_steps() is not None:
        reason = f"only {plural(steps, 'step')}: the usual final values are for {FULL_SCHEDULE_STEPS:,} and more"
        rows["teacher"] = describe_teacher(run), reason
        rows["learning rate"] = f"{run.optim.lr:g} per 256, decays to one half", reason


def _quality(run: Run, dataset: ImageDataset) -> tuple[str, str]:
    """Return what is measured during training, and on which images."""
    labels, num_held_out = dataset.labels, round(run.online_eval.held_out_fraction(dataset) * len(dataset))
    if not run.online_eval.every_epochs:
        return "loss and entropies", "`online_eval.every_epochs` is 0"
    if labels is None:
        if run.val is None and not num_held_out:
            return "loss and entropies", f"{plural(len(dataset), 'image')} without labels: too few to hold out some"
        held_out = (
            f"{num_held_out:,} images are held out" if run.val is None else f"on the validation set, {run.val.spec}"
        )
        return "two-crop retrieval", f"no labels; {held_out}"
    if run.val is None and np.bincount(labels[labels >= 0]).max(initial=0) < 2:
        return "loss and entropies", "accuracy cannot be measured without class folders of two images"
    metric = "accuracy of the classifier" if run.method.classifies else f"{run.online_eval.k}-NN accuracy"
    held_out = f"{run.online_eval.val_fraction:.0%} of each of {len(dataset.classes)} classes is held out"
    return metric, held_out if run.val is None else f"on the validation set, {run.val.spec}"
