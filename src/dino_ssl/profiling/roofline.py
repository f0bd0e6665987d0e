"""The roofline of a training step: its floating point operations and its memory traffic.

One multiply-add is two FLOPs. Matrix products, attention and convolutions are counted; norms, activations, softmax and
the loss are not, so the true cost is higher. The operations are those of a step after the first epoch, when the last
layer is trained. Algorithms with fewer multiplications (Winograd's convolutions, Strassen) can exceed this bound.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dino_ssl.data.batch import Batch
from dino_ssl.methods import MethodConfig
from dino_ssl.methods.method import BuildContext
from dino_ssl.models import BackboneConfig
from dino_ssl.run import Run
from dino_ssl.schedules import Clock

MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Values that an optimizer stores for each parameter."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value in each precision."""
NUM_IMAGES = 2
"""Images of the counted batch: batch norm needs at least two."""
NUM_CLASSES = 1000
PARTS = {
    "predictor": "predictor",
    "last_layer": "last layer",
    "prototypes": "last layer",
    "head": "head MLP",
    "patch_embed": "patch embedding",
    "attn": "query, key, value, projection",
    "mlp": "block MLP",
}
"""Parts of a step by the name of a submodule; the first one that occurs in a module's path counts."""


class Part(NamedTuple):
    """FLOPs of one part of a step, for one image."""

    name: str
    teacher: float
    """Forward pass of the teacher over the global views."""
    student: float
    """Forward pass of the student over all views."""
    backward: float

    @property
    def total(self) -> float:
        """FLOPs of all passes."""
        return self.teacher + self.student + self.backward


def count_flops(run: Run, *, skip_dropped: bool = True) -> list[Part]:
    """Return the FLOPs of a step for one image by part, counted by torch on the meta device.

    The backward pass is counted by kind of operator and distributed over the parts in proportion to their forward pass.
    skip_dropped: leave out the mean share of residual branches that stochastic depth drops.
    """
    method = meta_method(run).train()
    views = tuple(torch.empty(n, NUM_IMAGES, 3, side, side, device="meta") for n, side in run.views.view_shapes)
    batch = Batch(views, torch.empty(NUM_IMAGES, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as counter:
        loss = method(batch, Clock(0, 1, 1)).loss
        forward = {path: _by_kind(counts) for path, counts in counter.get_flop_counts().items()}
        loss.backward()
    backward = _by_kind(counter.get_flop_counts()["Global"]) - forward.pop("Global")
    modules = _without_submodules(forward)
    student = sum((kinds for path, kinds in modules.items() if ".teacher." not in path), Counter[str]())
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for path, kinds in modules.items():
        share = _computed_share(method, path) if skip_dropped else 1.0
        for kind, count in kinds.items():
            flops = parts[_part_name(path, kind)]
            if ".teacher." in path:
                flops[0] += count / NUM_IMAGES
            else:
                flops[1] += share * count / NUM_IMAGES
                flops[2] += share * count / NUM_IMAGES * backward[kind] / student[kind]
    return [Part(name, *flops) for name, flops in parts.items()]


def _by_kind(counts: Mapping[Any, int]) -> Counter[str]:
    """Return FLOPs by kind of operator: convolution, bmm (attention), matmul (linear layers)."""
    kinds = Counter[str]()
    for operator, count in counts.items():
        kinds[next((kind for kind in ("convolution", "bmm") if kind in str(operator)), "matmul")] += count
    return kinds


def _without_submodules(modules: Mapping[str, Counter[str]]) -> dict[str, Counter[str]]:
    """Return the FLOPs of each module without those of its submodules."""
    own = {path: Counter(kinds) for path, kinds in modules.items()}
    for path, kinds in modules.items():
        names = path.split(".")
        parents = (".".join(names[:depth]) for depth in range(len(names) - 1, 0, -1))
        if parent := next((parent for parent in parents if parent in own), None):
            own[parent].subtract(kinds)
    return {path: +kinds for path, kinds in own.items()}  # + removes zeros


def _part_name(path: str, kind: str) -> str:
    names = path.split(".")
    if "attn" in names and kind == "bmm":
        return "attention"
    other = "convolutions" if kind == "convolution" else "other matrix products"
    return next((part for name, part in PARTS.items() if name in names), other)


def _computed_share(method: nn.Module, path: str) -> float:
    """Return the mean share of images for which stochastic depth computes a module."""
    share, module = 1.0, method
    for name in path.split(".")[1:]:  # the first name is the method's class
        module = module.get_submodule(name)
        rate = getattr(module, "drop_path", None)
        share *= 1 - rate if isinstance(rate, float) else 1.0
    return share


def bytes_per_step(run: Run, batch_size: int) -> dict[str, float]:
    """Return the least bytes that a step moves through main memory, by purpose.

    Each pass reads its weights once, in the run's precision (student forward and backward, teacher forward). A gradient
    is written and read once, in float32, because its norm is needed before it is used. Optimizer and EMA read and write
    each value once. Views are read once, as uint8. Not counted: activations and logits, which could stay in the cache,
    copies of the weights in half precision, and communication between ranks.
    """
    method = meta_method(run)
    student = sum(p.numel() for p in method.trainable.parameters() if p.requires_grad)
    teacher = sum(p.numel() for name, p in method.named_parameters() if name.startswith("teacher."))
    center = sum(b.numel() for name, b in method.named_buffers() if name == "center")
    return {
        "views": float(batch_size * sum(n * 3 * side**2 for n, side in run.views.view_shapes)),
        "weights": float(BYTES[run.precision] * (2 * student + teacher)),
        "gradients": float(4 * 2 * student),
        "optimizer": float(4 * 2 * student * (1 + MOMENTS[run.optim.algorithm])),
        "teacher and center": float(4 * 2 * (teacher + center)),
    }


def meta_method(run: Run) -> Any:
    """Return the method of a run on the meta device: shapes without data."""
    return _meta_method(run.method, run.backbone)


@cache
def _meta_method(method: MethodConfig, network: BackboneConfig) -> Any:
    with torch.device("meta"):
        return method.build(BuildContext(network, classes=NUM_CLASSES))
