"""The roofline of a training step: its FLOPs and its bytes, and the rates of this machine.

One multiply-add is two FLOPs. Matrix products, attention and convolutions are counted; norms, activations, softmax and
the loss are not, so the true cost is higher. The operations are those of a step after the first epoch, when the last
layer is trained. Algorithms with fewer multiplications (Winograd's convolutions, Strassen) can exceed this bound.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from dino_ssl.data.batch import Batch
from dino_ssl.methods.method import BuildContext
from dino_ssl.models.blocks import Block
from dino_ssl.run import Run
from dino_ssl.runtime import Precision
from dino_ssl.schedules import Clock

NUM_IMAGES = 2
"""Images of the counted batch: batch norm needs at least two."""
SECONDS = 0.5
"""Duration of the measurement of one operation."""
SIZES = {"cpu": (512, 1024, 2048), "gpu": (2048, 4096, 8192)}
"""Sides of the measured square matrices."""
BUFFER = {"cpu": 2**28, "gpu": 2**30}
"""Bytes of each buffer that is moved: larger than any cache."""


def count_flops(run: Run) -> dict[str, float]:
    """Return the FLOPs of a step for one image by pass, counted by torch on the meta device.

    The mean share of our ViT's residual branches that stochastic depth drops is subtracted; all FLOPs of a block are in
    its branches, and their backward pass has twice as many.
    """
    method = meta_method(run).train()
    views = tuple(torch.empty(n, NUM_IMAGES, 3, side, side, device="meta") for n, side in run.views.view_shapes)
    batch = Batch(views, torch.empty(NUM_IMAGES, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as counter:
        loss = method(batch, Clock(0, 1, 1)).loss
        forward, modules = counter.get_total_flops(), counter.get_flop_counts()
        dropped = sum(
            block.drop_path * sum(modules[f"{type(method).__name__}.{name}"].values())
            for name, block in method.named_modules()
            if isinstance(block, Block)
        )
        loss.backward()
    teacher = 0
    if hasattr(method, "teacher"):
        with FlopCounterMode(display=False) as teacher_counter, torch.no_grad():
            method.teacher(views[:1])
        teacher = teacher_counter.get_total_flops()
    return {
        "teacher forward": teacher / NUM_IMAGES,
        "student forward": (forward - teacher - dropped) / NUM_IMAGES,
        "backward": (counter.get_total_flops() - forward - 2 * dropped) / NUM_IMAGES,
    }


def bytes_per_step(run: Run, batch_size: int) -> dict[str, float]:
    """Return the least bytes that a step moves through main memory, by purpose.

    Views are uint8. Each of the three passes reads its weights once, in the run's precision. A gradient is written and
    read once, in float32, because its norm is needed before it is used. Optimizer and EMA read and write each value
    once. Not counted: activations and logits, which could stay in the cache, and communication between ranks.
    """
    method = meta_method(run)
    student = sum(p.numel() for p in method.trainable.parameters() if p.requires_grad)
    teacher = sum(p.numel() for name, p in method.named_parameters() if name.startswith("teacher."))
    center = sum(b.numel() for name, b in method.named_buffers() if name == "center")
    optimizer = student * (3 if run.optim.algorithm == "adamw" else 2)  # the parameter, and two moments or one
    return {
        "views": float(batch_size * sum(n * 3 * side**2 for n, side in run.views.view_shapes)),
        "weights": float(getattr(torch, run.precision).itemsize * (2 * student + teacher)),
        "gradients": float(4 * 2 * student),
        "optimizer": float(4 * 2 * optimizer),
        "teacher and center": float(4 * 2 * (teacher + center)),
    }


def meta_method(run: Run) -> Any:
    """Return the method of a run on the meta device: shapes without data."""
    with torch.device("meta"):
        return run.method.build(BuildContext(run.backbone, classes=1000))


@torch.no_grad()
def matmul_throughput(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return FLOP/s and shape of the fastest product in this precision (on a GPU, float32 is TF32, as in training)."""
    rates = []
    for size in SIZES["cpu" if device.type == "cpu" else "gpu"]:
        a, b, out = (torch.randn(size, size, device=device).to(getattr(torch, precision)) for _ in range(3))
        rates.append((2 * size**3 / _fastest(partial(torch.mm, a, b.T, out=out)), f"{size} x {size}"))
    return max(rates)


@torch.no_grad()
def memory_bandwidth(device: torch.device, memory: int) -> tuple[float, str]:
    """Return bytes/s and name of the fastest of reading, copying and adding in a main memory of `memory` bytes."""
    size = min(BUFFER["cpu" if device.type == "cpu" else "gpu"], memory // 32)
    a, b, out = (torch.ones(size // 4, device=device) for _ in range(3))
    return max(
        (size / _fastest(a.sum), "read"),
        (2 * size / _fastest(partial(out.copy_, a)), "copy"),
        (3 * size / _fastest(partial(torch.add, a, b, out=out)), "add"),
    )


def _fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest repetition: a roofline must also hold on an idle machine."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=SECONDS).times)
