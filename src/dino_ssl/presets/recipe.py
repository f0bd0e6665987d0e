"""The Run that is recommended for a dataset: network, method, crops, batch size, learning rate and epochs."""

import math
from typing import Any

from dino_ssl.config import edit
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.formatting import plural
from dino_ssl.methods import MethodConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.vit import ViT
from dino_ssl.presets.small import small, small_vit
from dino_ssl.run import Run
from dino_ssl.runtime import Machine

PROTOTYPES = ((35, 32), (284, 128), (20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))
"""(largest number of images, K): at most four prototypes per training image, since most would stay unused otherwise.
App. C: 65536 for ImageNet."""
LARGE_DATASET = 200_000
"""Images from which on the paper's settings are used, on a GPU."""
CPU_IMAGES, MAX_CPU_EPOCHS = 400_000, 600
"""Training images, counted in every epoch, on a CPU, and the most epochs. At 145 images/s, as on two cores, they take
45 minutes. `small` reached 63 % on 6,500 photos after 250,000 images (docs/results.md)."""
GPU_EPOCHS = ((100_000, 400), (500_000, 200))
"""(largest number of images, epochs) on a GPU; 100, as the paper's shortest run, for more."""

Rows = dict[str, tuple[str, str]]
"""Value and reason of each choice by its name; every function that chooses adds its own."""


def recipe_for(dataset: ImageDataset, machine: Machine, world: int, kind: type[MethodConfig], rows: Rows) -> Run:
    """Choose network, method, crops, batch size and learning rate."""
    count, on_cpu = len(dataset), machine.device.type == "cpu"
    large = count >= LARGE_DATASET and not on_cpu
    if on_cpu:
        run = small()
        reason = "20-NN 63 % on 6,500 photos after 30 minutes of two AVX2 cores, the best measured (docs/results.md)"
    else:
        run = edit(small_vit(), backbone=ViT(size="small", patch=16), views=MultiCrop())
        reason = "the paper's main network"
    rows["images"] = f"{count:,}", f"median short side {dataset.short_side} px"
    rows["network"] = run.backbone.describe(), reason
    if kind is not DINOConfig:
        run = edit(run, method=kind() if large else kind.for_small_data(count))
        settings = "defaults" if run.method == kind() else "settings for thousands of images"
        rows["method"] = run.method.summary, f"chosen by you, with its {settings}"
    else:
        run = _with_prototypes(run, count, large, rows)
    run = _with_crops(run, dataset.short_side, on_cpu, rows)
    size = _batch_size(run, count, machine, world)
    rows["batch"] = f"{size}", "images per step over all ranks; fits into memory and gives many steps"
    run = edit(run, optim=dict(batch_size=size, epochs=_num_epochs(count, on_cpu)))
    run = edit(run, optim=dict(lr=5e-4, weight_decay_end=0.4)) if large else run
    rows["learning rate"] = f"{run.optim.lr:g} per 256", "the paper's" if large else "tuned on 6,500 photos"
    return run


def _with_prototypes(run: Run, count: int, large: bool, rows: Rows) -> Run:
    """Choose K and the teacher of DINO."""
    prototypes = next((k for limit, k in PROTOTYPES if count <= limit), 65536)
    rows["K"] = f"{prototypes}", f"prototypes for {plural(count, 'image')} (65536 for ImageNet's 1.3 million)"
    if large:
        teacher, reason = dict(momentum=0.996, teacher_temp=0.07, warmup_teacher_temp_epochs=30), "the paper's"
    else:
        teacher, reason = {}, "a fast teacher: with few steps, the paper's 0.996 would stay close to its random start"
    run = edit(run, method=dict(out_dim=prototypes, **teacher))
    rows["teacher"] = describe_teacher(run), reason
    return run


def describe_teacher(run: Run) -> str:
    """Return the momentum of the teacher and, of DINO's, the temperature as text."""
    method: Any = run.method
    momentum = f"momentum {method.momentum:g} to {method.momentum_end:g}"
    return f"{momentum}, temperature {method.teacher_temp:g}" if hasattr(method, "teacher_temp") else momentum


def _with_crops(run: Run, short_side: int, on_cpu: bool, rows: Rows) -> Run:
    """Choose global and local crops that are multiples of the patch size and fit into the images."""
    views: Any = run.views
    multiple, largest = run.backbone.patch_multiple, views.global_size
    size = max(2 * multiple, min(largest, short_side) // multiple * multiple)
    local_size = max(multiple, round(size * views.local_size / largest / multiple) * multiple)
    reason = f"multiples of {multiple} px within images of {short_side} px"
    if size == largest:
        reason += "; with 64 px, the accuracy was lower after the same time" if on_cpu else "; the paper's size"
    views = edit(views, global_size=size, local_size=local_size)
    if not run.method.local_views:
        views = edit(views, local=0, global_scale=(0.14, 1.0))  # the authors' scale without local views
        reason += "; local crops do not help this method"
    rows["crops"] = " + ".join(f"{number}x{side}" for number, side in views.view_shapes), reason
    return edit(fit_to_size(run, size), views=views)


def fit_to_size(run: Run, size: int) -> Run:
    """Return the run with a network for views of this size; the size of evaluations keeps its ratio to the views."""
    eval_size = run.online_eval.size and round(run.online_eval.size * size / run.views.size)
    return edit(run, backbone=run.backbone.with_image_size(size), online_eval=dict(size=eval_size))


def _batch_size(run: Run, count: int, machine: Machine, world: int) -> int:
    """Return a power of two that is divisible by the ranks, fits into memory, and gives 25 steps per epoch if possible.

    A tenth of the images may be held out.
    """
    fits = 0.5 * machine.memory / run.backbone.activation_bytes(run.views.size) * world
    largest = 64 if machine.device.type == "cpu" else 1024
    size = min(fits, largest, max(8, count / 25), 0.9 * count)
    return max(1, 2 ** int(math.log2(max(1, size))) // world) * world


def _num_epochs(count: int, on_cpu: bool) -> int:
    """Return the epochs for this many images: more for fewer images."""
    if on_cpu:
        return max(1, min(MAX_CPU_EPOCHS, round(CPU_IMAGES / count)))
    return next((epochs for limit, epochs in GPU_EPOCHS if count <= limit), 100)
