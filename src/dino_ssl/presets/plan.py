"""One function that looks at the pictures and the machine, chooses a complete Run, and says why.

Nothing is decided later: what `plan` returns is what trains, and it is saved with the run.
"""

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from dino_ssl.config import edit
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.loader import sample_rng
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.formatting import duration
from dino_ssl.kernels import fastest_transform
from dino_ssl.methods import MethodConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.backbone import BackboneConfig
from dino_ssl.models.vit import ViT
from dino_ssl.presets.benchmark_step import benchmark_step
from dino_ssl.presets.memory import micro_batch
from dino_ssl.presets.small import FULL_SCHEDULE_STEPS, short_schedule, small, small_vit
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime, machine_memory
from dino_ssl.schedules import Clock

PROTOTYPES = ((35, 32), (284, 128), (20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))
"""K by the number of pictures: many more prototypes than kinds of things only stay unused (App. C: 65536), and at most
four for each picture that is not held back."""

MARGIN = 1.25
"""Times as many pictures as the step takes are what the workers should be able to make: no file is like another."""


@dataclass(frozen=True)
class Reason:
    """One choice of the plan: what, its value, and why."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Plan:
    run: Run
    reasons: list[Reason]


@dataclass(frozen=True)
class Speed:
    """What one picture costs on this machine, in seconds: the training step, and decoding and cropping."""

    step: float
    data: float

    def seconds(self, run: Run, here: Machine, dataset: int) -> float:
        """Expected time to see so many pictures: a GPU overlaps its work with the workers', a CPU shares its cores."""
        if here.device.type == "cpu":
            return dataset * (self.step + self.data / max(1, here.own_cores))
        return dataset * max(self.step, self.data / max(1, run.workers))


def plan(
    dataset: ImageDataset,
    here: Machine,
    *,
    preset: Run | None = None,
    method: type[MethodConfig] = DINOConfig,
    world: int = 1,
    minutes: float | None = None,
) -> Plan:
    """A Run for these pictures on this machine, with the reasons.

    preset: keep its recipe, and adapt what the machine decides alone (precision, workers). method: how it learns where
    there is no preset. minutes: the time to spend; the number of epochs follows from the speed that is measured here.
    """
    if preset is not None:
        run, reasons = preset, []
    else:
        run, reasons = _for_data(dataset, here, world, method)
    run, more = _for_machine(run, dataset, here, keep_precision=preset is not None)
    reasons += more
    if run.optim.micro_batch == "auto":
        size, why = micro_batch(run, here, len(dataset.classes), world)
        run = edit(run, optim=dict(micro_batch=size))
        reasons.append(Reason("micro-batch", f"{size}" if size else "none", why))
    reasons += _held_back(run, dataset)
    if len(dataset) < run.optim.batch_size:
        return Plan(run, reasons)  # training refuses it, and says what to do
    speed = measure(run, here, dataset)
    run, reason = with_workers(run, here, speed)
    reasons.append(reason)
    trained = _trained(run, dataset)
    if minutes is not None or preset is None:
        run, reason = _epochs(run, here, speed, trained, minutes)
        reasons.append(reason)
    if preset is None and here.device.type == "cpu":
        run, reasons = _hurried(run, reasons, trained // run.optim.batch_size * run.optim.epochs)
    seconds = speed.seconds(run, here, trained * run.optim.epochs) / world
    measured = f"measured: {1 / speed.step:.0f} images/s through the step, {1 / speed.data:.0f} through one worker"
    reasons.append(Reason("expected time", duration(seconds), measured))
    return Plan(run, reasons)


def measure(run: Run, here: Machine, dataset: ImageDataset, *, steps: int = 3) -> Speed:
    """Takes a few real training steps and reads a few real pictures, and forgets them; some seconds."""
    batch_size = min(run.optim.batch_size, 32 if here.device.type == "cpu" else 128)
    tried = benchmark_step(run, Runtime(here.device, run.precision), batch_size, len(dataset.classes))
    times = [tried.step(Clock(step, steps + 1, run.optim.epochs)) for step in range(steps + 1)]
    return Speed(statistics.median(times[1:]) / batch_size, reading(run, dataset))


def _for_data(dataset: ImageDataset, here: Machine, world: int, kind: type[MethodConfig]) -> tuple[Run, list[Reason]]:
    """What the pictures decide: network, method, crops, batch."""
    count, side = len(dataset), dataset.short_side
    on_cpu = here.device.type == "cpu"
    large = count >= 200_000 and not on_cpu
    base = small() if on_cpu else small_vit()
    reasons = [Reason("images", f"{count:,}", f"median short side {side} px")]

    backbone = base.backbone if on_cpu else ViT(size="small", patch=16)
    why = (
        "ten layers of half the width: what learns most in an hour on a CPU; --network timm:NAME takes another"
        if on_cpu
        else "the paper's main network; --network vit_base/16 or timm:NAME takes another"
    )
    reasons.append(Reason("network", backbone.describe(), why))

    method, of_method = _method(base, kind, count, large)
    reasons += of_method

    views, reason = _crops(base.views if on_cpu else MultiCrop(), backbone, side, on_cpu, method.local_views)
    reasons.append(reason)

    batch = _batch(count, here, backbone, views.global_size, world)
    reasons.append(
        Reason(
            "batch",
            f"{batch}",
            "pictures a step over all ranks; small enough for many steps, and for the memory",
        )
    )
    run = edit(
        base,
        backbone=backbone.with_image_size(views.global_size),
        views=views,
        method=method,
        optim=dict(batch_size=batch),
        online_eval=dict(
            size=base.online_eval.size and round(base.online_eval.size * views.global_size / base.views.size)
        ),
    )
    if large:
        run = edit(run, optim=dict(lr=5e-4, weight_decay_end=0.4))
    reasons.append(
        Reason("learning rate", f"{run.optim.lr:g} per 256", "the paper's" if large else "tuned on small data")
    )
    return run, reasons


def _method(base: Run, kind: type[MethodConfig], count: int, large: bool) -> tuple[MethodConfig, list[Reason]]:
    """How it learns: DINO with K and a teacher for so many pictures, or another method's settings for them."""
    if kind is not DINOConfig:
        method = kind() if large else kind.for_small_data(count)
        why = "its publication's" if large else "smaller heads, a faster teacher: for thousands of pictures"
        return method, [Reason("method", method.summary, f"you chose it; its settings are {why}")]
    prototypes = next((k for most, k in PROTOTYPES if count <= most), 65536)
    assert isinstance(base.method, DINOConfig)
    method = edit(base.method, out_dim=prototypes)
    if large:
        method = edit(method, momentum=0.996, teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    return method, [
        Reason("K", f"{prototypes}", f"prototypes for {count:,} pictures (65536 for ImageNet's 1.3 million)"),
        Reason(
            "teacher",
            _teacher(method),
            "the paper's" if large else "a faster teacher: with few steps, the paper's 0.996 would stay near its start",
        ),
    ]


def _crops(base: MultiCrop | Augment, backbone: BackboneConfig, side: int, on_cpu: bool, local: bool):
    """Global and local crops that the pictures and the patches can fill."""
    assert isinstance(base, MultiCrop)
    patch = backbone.patch_multiple
    largest = base.global_size if on_cpu else 224
    wide = max(2 * patch, min(largest, side) // patch * patch)
    narrow = max(patch, round(wide * base.local_size / base.global_size / patch) * patch)
    views = edit(base, global_size=wide, local_size=narrow)
    if not local:
        views = edit(views, local=0, global_scale=(0.14, 1.0))  # the authors' scale of two views alone
    why = f"multiples of {patch} px within pictures of {side} px"
    if wide == largest:
        why += "; larger crops cost more than they bring here" if on_cpu else "; the paper's size"
    if not local:
        return views, Reason("crops", f"2x{wide}", f"{why}; local ones do not help this method")
    return views, Reason("crops", f"2x{wide} + {views.local}x{narrow}", why)


def _batch(count: int, here: Machine, backbone: BackboneConfig, size: int, world: int) -> int:
    """A power of two that the ranks can share evenly: what the memory holds, yet at least 25 steps an epoch where the
    data allows. A tenth of the pictures may be held back."""
    fits = 0.5 * here.memory / backbone.activation_bytes(size) * world
    most = 64 if here.device.type == "cpu" else 1024
    wanted = min(fits, most, max(8, count / 25), 0.9 * count)
    return max(1, 2 ** int(math.log2(max(1, wanted))) // world) * world


def _for_machine(run: Run, dataset: ImageDataset, here: Machine, *, keep_precision: bool) -> tuple[Run, list[Reason]]:
    """What the machine decides: precision, and whether the decoded pictures stay in memory."""
    if keep_precision and run.precision == "float32":
        precision, why = run.precision, "as the recipe says"
    else:
        precision, why = here.precision, here.why
    cache, cache_reason = _choose_cache(dataset, here)
    run = edit(run, precision=precision, cache=cache)
    return run, [
        Reason("machine", f"{here.name}, {here.cores} cores", f"{here.memory / 2**30:.0f} GiB; device {here.device}"),
        Reason("precision", precision, why),
        Reason("cache", "in memory" if cache else "none", cache_reason),
    ]


def _choose_cache(dataset: ImageDataset, here: Machine) -> tuple[bool, str]:
    """Return whether to keep decoded images in memory (at most an eighth of it, and one rank only), and the reason."""
    memory = machine_memory()
    fits = here.ranks == 1 and dataset.nbytes < memory / 8
    return fits, f"{dataset.nbytes / 2**20:,.0f} MiB decoded, of {memory / 2**30:.0f} GiB"


def with_workers(run: Run, here: Machine, speed: Speed) -> tuple[Run, Reason]:
    """As many workers as keep up with the step, and a quarter more; no more than a rank has cores, of which a GPU's
    rank needs one itself."""
    most = here.own_cores if here.device.type == "cpu" else here.own_cores - 1
    wanted = math.ceil(MARGIN * speed.data / speed.step)
    workers = max(1, min(wanted, most))
    why = f"a picture takes {_ms(speed.data)} to decode and crop, and {_ms(speed.step)} in the step"
    if wanted > workers:
        why += f"; {wanted} would keep up, for which there are too few cores"
    return edit(run, workers=workers), Reason("workers", f"{workers}", why)


def _hurried(run: Run, reasons: list[Reason], steps: int) -> tuple[Run, list[Reason]]:
    """The run with ends of rate and momentum for so many steps, and the rows that tell of them."""
    short = short_schedule(run, steps)
    if short == run or not isinstance(short.method, DINOConfig):
        return run, reasons
    why = f"{steps:,} steps are no time to settle in: the usual ends are for {FULL_SCHEDULE_STEPS:,} and more"
    rows = {reason.name: reason for reason in reasons}
    rows["teacher"] = Reason("teacher", _teacher(short.method), why)
    rows["learning rate"] = Reason("learning rate", f"{short.optim.lr:g} per 256, sinking to a half", why)
    return short, list(rows.values())


def _teacher(method: DINOConfig) -> str:
    return f"momentum {method.momentum:g} to {method.momentum_end:g}, temperature {method.teacher_temp:g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 10e-3 else 1}f} ms"


def _held_back(run: Run, dataset: ImageDataset) -> list[Reason]:
    if dataset.labels is None:
        return [Reason("quality", "loss and entropies", "no class folders: no accuracy can be measured")]
    if run.val is None and np.bincount(dataset.labels[dataset.labels >= 0]).max(initial=0) < 2:
        return [Reason("quality", "loss and entropies", "no class has a picture to spare: no accuracy can be measured")]
    share = f"{run.online_eval.val_fraction:.0%} of each of {len(dataset.classes)} classes is held back"
    what = "the classifier's accuracy" if run.method.classifies else f"{run.online_eval.k}-NN accuracy"
    return [Reason("quality", what, share if run.val is None else "on the pictures that were given for it")]


def _trained(run: Run, dataset: ImageDataset) -> int:
    """Pictures of one epoch: whole batches of what is not held back."""
    held = 0 if dataset.labels is None or run.val is not None else round(run.online_eval.val_fraction * len(dataset))
    return max(1, (len(dataset) - held) // run.optim.batch_size) * run.optim.batch_size


def _epochs(run: Run, here: Machine, speed: Speed, trained: int, minutes: float | None) -> tuple[Run, Reason]:
    """As many epochs as the time allows; without a time, an hour on a CPU and the paper's order elsewhere."""
    if minutes is None and here.device.type != "cpu":
        epochs = 100 if trained > 500_000 else 200 if trained > 100_000 else 400
        why = "small data needs more epochs; --optim.epochs or --minutes takes another length"
    else:
        asked = 60.0 if minutes is None else minutes
        epochs = max(1, int(60 * asked / speed.seconds(run, here, trained)))
        why = f"what fits in {duration(60 * asked)}; --minutes or --optim.epochs takes another length"
    warmup = min(run.optim.warmup_epochs, 0.1 * epochs)
    run = edit(
        run, optim=dict(epochs=epochs, warmup_epochs=warmup), online_eval=dict(every_epochs=max(1.0, epochs // 15))
    )
    return run, Reason("epochs", f"{epochs}", why)


def reading(run: Run, dataset: ImageDataset) -> float:
    """Seconds that one picture takes a worker, the median of a few: read from the disk, where it does not stay in
    memory, and cropped."""
    times, views = [], fastest_transform(run.views)
    for index in torch.linspace(0, len(dataset) - 1, min(12, len(dataset))).long().tolist():
        width, height = dataset.sizes[index].tolist()
        began = time.perf_counter()
        try:
            image = dataset.read_downscaled(index, run.views.decode_scale(height, width) if not run.cache else 1)
        except BadImage:
            continue
        if run.cache:
            began = time.perf_counter()
        views(image, sample_rng(0, 0, index))
        times.append(time.perf_counter() - began)
    return statistics.median(times) if times else 0.01


def recipe_of(run: Run) -> str:
    """A preset in a line: network, length, method."""
    length = f"{run.optim.epochs} epochs, batch {run.optim.batch_size}"
    return f"{run.backbone.describe()}, {length}, {run.method.summary}"
