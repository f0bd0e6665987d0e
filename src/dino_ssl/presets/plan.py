"""A complete Run for a dataset and a machine, with the reason of each choice.

Nothing is chosen later: the Run that `plan` returns is trained, and saved with its results.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dino_ssl.config import edit
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import steps_per_epoch
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.formatting import duration
from dino_ssl.methods import MethodConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.backbone import BackboneConfig
from dino_ssl.models.vit import ViT
from dino_ssl.presets.benchmark_step import Speed, measure, micro_batch
from dino_ssl.presets.schedule import FULL_SCHEDULE_STEPS, fit_schedule, short_schedule
from dino_ssl.presets.small import SMALL_CROPS, small, small_vit
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, machine_memory

PROTOTYPES = ((35, 32), (284, 128), (20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))
"""(largest number of images, K): at most four prototypes per training image, since most would stay unused otherwise.
App. C: 65536 for ImageNet."""
LARGE_DATASET = 200_000
"""Images from which on the paper's settings are used, on a GPU."""
CPU_MINUTES = 60.0
"""Training time on a CPU if none is set."""
WORKER_MARGIN = 1.25
"""Images that the workers should be able to load per image trained: files differ."""


@dataclass(frozen=True)
class Reason:
    """One choice of the plan and its reason."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A complete Run, and the reasons of its choices."""

    run: Run
    reasons: list[Reason]


def plan(
    dataset: ImageDataset,
    machine: Machine,
    *,
    preset: Run | None = None,
    method: type[MethodConfig] = DINOConfig,
    world: int = 1,
    minutes: float | None = None,
) -> Plan:
    """Return a Run for this dataset and machine; takes some seconds, to measure the speed.

    preset: its settings are kept except those of the machine (precision, workers, cache). method: used if there is no
    preset. minutes: training time, from which the number of epochs is derived. world: number of ranks.
    """
    run, reasons = (preset, []) if preset is not None else _for_dataset(dataset, machine, world, method)
    run, more = _for_machine(run, dataset, machine, keep_precision=preset is not None)
    reasons += more
    if run.optim.micro_batch == "auto":
        size, reason = micro_batch(run, machine, len(dataset.classes), world)
        run = edit(run, optim=dict(micro_batch=size))
        reasons.append(Reason("micro-batch", f"{size}" if size else "none", reason))
    reasons.append(_quality(run, dataset))
    num_images = num_train_images(run, dataset)
    if num_images < run.optim.batch_size:
        return Plan(run, reasons)  # training raises the error
    speed = measure(run, machine, dataset)
    run, reason = with_workers(run, machine, speed)
    reasons.append(reason)
    steps = steps_per_epoch(num_images, run.optim.batch_size)
    images_per_epoch = steps * run.optim.batch_size
    if minutes is not None or preset is None:
        run, reason = _with_epochs(run, machine, speed, images_per_epoch, minutes)
        reasons.append(reason)
    if preset is None and machine.device.type == "cpu":
        run, reasons = _with_short_schedule(run, reasons, steps * run.optim.epochs)
    seconds = speed.seconds(run, machine, images_per_epoch * run.optim.epochs) / world
    rates = f"{1 / speed.step:.0f} images/s in the training step, {1 / speed.data:.0f} images/s per loading worker"
    reasons.append(Reason("expected time", duration(seconds), f"measured: {rates}"))
    return Plan(run, reasons)


def num_train_images(run: Run, dataset: ImageDataset) -> int:
    """Return the number of training images, without the held-out ones; at least 1."""
    is_split = dataset.labels is not None and run.val is None
    return max(1, len(dataset) - (round(run.online_eval.val_fraction * len(dataset)) if is_split else 0))


def describe_preset(run: Run) -> str:
    """Return network, length and method of a preset in one line."""
    length = f"{run.optim.epochs} epochs, batch {run.optim.batch_size}"
    return f"{run.backbone.describe()}, {length}, {run.method.summary}"


def _for_dataset(
    dataset: ImageDataset, machine: Machine, world: int, kind: type[MethodConfig]
) -> tuple[Run, list[Reason]]:
    """Choose network, method, crops, batch size and learning rate."""
    count, on_cpu = len(dataset), machine.device.type == "cpu"
    large = count >= LARGE_DATASET and not on_cpu
    if on_cpu:
        base, backbone, crops = small(), small().backbone, SMALL_CROPS
        reason = "a ResNet-10 of half the width: the best accuracy after an hour on a CPU"
    else:
        base, backbone, crops = small_vit(), ViT(size="small", patch=16), MultiCrop()
        reason = "the paper's main network"
    method, method_reasons = _method(base, kind, count, large)
    views, crops_reason = _crops(crops, backbone, dataset.short_side, on_cpu, method.local_views)
    batch_size = _batch_size(count, machine, backbone, views.global_size, world)
    scale = views.global_size / base.views.size
    run = edit(
        base,
        backbone=backbone.with_image_size(views.global_size),
        views=views,
        method=method,
        optim=dict(batch_size=batch_size),
        online_eval=dict(size=base.online_eval.size and round(base.online_eval.size * scale)),
    )
    if large:
        run = edit(run, optim=dict(lr=5e-4, weight_decay_end=0.4))
    return run, [
        Reason("images", f"{count:,}", f"median short side {dataset.short_side} px"),
        Reason("network", backbone.describe(), reason),
        *method_reasons,
        crops_reason,
        Reason("batch", f"{batch_size}", "images per step over all ranks; fits into memory and gives many steps"),
        Reason("learning rate", f"{run.optim.lr:g} per 256", "the paper's" if large else "tuned on small datasets"),
    ]


def _method(base: Run, kind: type[MethodConfig], count: int, large: bool) -> tuple[MethodConfig, list[Reason]]:
    """Choose the settings of the method: K and the teacher's of DINO, or another method's own."""
    if kind is not type(base.method):
        method = kind() if large else kind.for_small_data(count)
        source = "its publication's" if large else "smaller heads and a faster teacher, for thousands of images"
        return method, [Reason("method", method.summary, f"you chose it; its settings are {source}")]
    prototypes = next((k for limit, k in PROTOTYPES if count <= limit), 65536)
    method = edit(base.method, out_dim=prototypes)
    if large:
        method = edit(method, momentum=0.996, teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    slow = "a fast teacher: with few steps, the paper's 0.996 would stay close to its random start"
    return method, [
        Reason("K", f"{prototypes}", f"prototypes for {count:,} images (65536 for ImageNet's 1.3 million)"),
        Reason("teacher", _describe_teacher(method), "the paper's" if large else slow),
    ]


def _crops(
    crops: MultiCrop, backbone: BackboneConfig, short_side: int, on_cpu: bool, local: bool
) -> tuple[MultiCrop, Reason]:
    """Choose global and local crops that are multiples of the patch size and fit into the images."""
    multiple, largest = backbone.patch_multiple, crops.global_size
    global_size = max(2 * multiple, min(largest, short_side) // multiple * multiple)
    local_size = max(multiple, round(global_size * crops.local_size / crops.global_size / multiple) * multiple)
    views = edit(crops, global_size=global_size, local_size=local_size)
    if not local:
        views = edit(views, local=0, global_scale=(0.14, 1.0))  # the authors' scale without local views
    reason = f"multiples of {multiple} px within images of {short_side} px"
    if global_size == largest:
        reason += "; larger crops cost more than they gain here" if on_cpu else "; the paper's size"
    if not local:
        return views, Reason("crops", f"2x{global_size}", f"{reason}; local crops do not help this method")
    return views, Reason("crops", f"2x{global_size} + {views.local}x{local_size}", reason)


def _batch_size(count: int, machine: Machine, backbone: BackboneConfig, image_size: int, world: int) -> int:
    """Return a power of two that is divisible by the ranks, fits into memory, and gives 25 steps per epoch if possible.

    A tenth of the images may be held out.
    """
    fits = 0.5 * machine.memory / backbone.activation_bytes(image_size) * world
    largest = 64 if machine.device.type == "cpu" else 1024
    size = min(fits, largest, max(8, count / 25), 0.9 * count)
    return max(1, 2 ** int(math.log2(max(1, size))) // world) * world


def _for_machine(
    run: Run, dataset: ImageDataset, machine: Machine, *, keep_precision: bool
) -> tuple[Run, list[Reason]]:
    """Choose precision and cache."""
    if keep_precision and run.precision == "float32":
        precision, reason = run.precision, "as in the preset"
    else:
        precision, reason = machine.precision, machine.precision_reason
    cache, cache_reason = _choose_cache(dataset, machine)
    memory = f"{machine.memory / 2**30:.0f} GiB; device {machine.device}"
    return edit(run, precision=precision, cache=cache), [
        Reason("machine", f"{machine.name}, {machine.cores} cores", memory),
        Reason("precision", precision, reason),
        Reason("cache", "in memory" if cache else "none", cache_reason),
    ]


def _choose_cache(dataset: ImageDataset, machine: Machine) -> tuple[bool, str]:
    """Return whether to keep decoded images in memory (at most an eighth of it, and one rank only), and the reason."""
    memory = machine_memory()
    fits = machine.ranks == 1 and dataset.nbytes < memory / 8
    return fits, f"{dataset.nbytes / 2**20:,.0f} MiB decoded, of {memory / 2**30:.0f} GiB"


def with_workers(run: Run, machine: Machine, speed: Speed) -> tuple[Run, Reason]:
    """Choose the workers that keep up with the step, with a margin, but not more than the rank has cores.

    The process of a GPU needs one core itself.
    """
    available = machine.cores_per_rank if machine.device.type == "cpu" else machine.cores_per_rank - 1
    needed = math.ceil(WORKER_MARGIN * speed.data / speed.step)
    workers = max(1, min(needed, available))
    reason = f"an image takes {_ms(speed.data)} to decode and augment, and {_ms(speed.step)} in the training step"
    if needed > workers:
        reason += f"; {needed} would keep up, but there are too few cores"
    return edit(run, workers=workers), Reason("workers", f"{workers}", reason)


def _with_epochs(
    run: Run, machine: Machine, speed: Speed, images_per_epoch: int, minutes: float | None
) -> tuple[Run, Reason]:
    """Choose the epochs that fit into the time; without a time, an hour on a CPU and about the paper's on a GPU."""
    if minutes is None and machine.device.type != "cpu":
        epochs = 100 if images_per_epoch > 500_000 else 200 if images_per_epoch > 100_000 else 400
        reason = "small datasets need more epochs"
    else:
        seconds = 60 * (CPU_MINUTES if minutes is None else minutes)
        epochs = max(1, int(seconds / speed.seconds(run, machine, images_per_epoch)))
        reason = f"fit into {duration(seconds)}"
    reason += "; `minutes` or `optim.epochs` changes the length"
    return fit_schedule(run, epochs), Reason("epochs", f"{epochs}", reason)


def _with_short_schedule(run: Run, reasons: list[Reason], steps: int) -> tuple[Run, list[Reason]]:
    """Choose the final values of learning rate and momentum for this number of steps, and replace their reasons."""
    short = short_schedule(run, steps)
    if short == run:
        return run, reasons
    reason = f"only {steps:,} steps: the usual final values are for {FULL_SCHEDULE_STEPS:,} and more"
    by_name = {item.name: item for item in reasons}
    by_name["teacher"] = Reason("teacher", _describe_teacher(short.method), reason)
    by_name["learning rate"] = Reason("learning rate", f"{short.optim.lr:g} per 256, decays to one half", reason)
    return short, list(by_name.values())


def _describe_teacher(method: Any) -> str:
    return f"momentum {method.momentum:g} to {method.momentum_end:g}, temperature {method.teacher_temp:g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 10e-3 else 1}f} ms"


def _quality(run: Run, dataset: ImageDataset) -> Reason:
    """Return which accuracy is measured during training, and on which images."""
    if dataset.labels is None:
        return Reason("quality", "loss and entropies", "no class folders: accuracy cannot be measured")
    if run.val is None and np.bincount(dataset.labels[dataset.labels >= 0]).max(initial=0) < 2:
        return Reason("quality", "loss and entropies", "one image per class: accuracy cannot be measured")
    metric = "accuracy of the classifier" if run.method.classifies else f"{run.online_eval.k}-NN accuracy"
    held_out = f"{run.online_eval.val_fraction:.0%} of each of {len(dataset.classes)} classes is held out"
    return Reason("quality", metric, held_out if run.val is None else "on the validation set")
