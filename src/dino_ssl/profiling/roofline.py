"""The floor of a training step: operations that must be done, bytes that must move, and so the speed nobody can pass.

Conventions. One multiply-add is two operations. Matrix products and convolutions are counted, each as its equation
reads; norms, activations, softmax and the loss are not, so the true cost is above. A product's backward pass is two
products of its size, one for its input and one for its weights; pictures need no gradient, so the patch embedding's is
one. What the loss does not depend on is not counted: in a ViT's last block the [CLS] token alone asks and is passed on,
and stochastic depth leaves branches out. `as_written` counts those too, as plain code does them. Reassociated products
(Strassen, Winograd's convolutions) could pass a floor so counted; ours does not use them, libraries may for 3x3
convolutions.

Bytes are those that must come from or go to the device's main memory in one step, caches being smaller than the
weights: see `bytes_per_step`. Activations are not among them: in principle they stay in the cache, picture by picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dino_ssl.data.batch import Batch
from dino_ssl.methods import MethodConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.methods.method import BuildContext
from dino_ssl.models import BackboneConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.run import Run
from dino_ssl.schedules import Clock

MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Numbers that an optimizer keeps beside each parameter."""
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number in each precision."""


PICTURES = 2
"""Counted together, since a batch norm takes no fewer."""
CLASSES = 1000
"""Of the pictures, where a method learns their labels and nobody says how many there are."""


class Passes(NamedTuple):
    """Operations of one part of a network."""

    forward: float
    backward: float


class Part(NamedTuple):
    """A part of the step, and its operations for one picture."""

    name: str
    teacher: float
    """The teacher's forward pass over the global views."""
    student: float
    """The student's forward pass over all views."""
    backward: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.backward


@dataclass(frozen=True)
class Roofline:
    """The least that a step costs for one picture of it, and the speeds that follow from two rates."""

    flops: float
    bytes: float

    def by_products(self, rate: float) -> float:
        """Images/s at so many operations a second."""
        return rate / self.flops

    def by_memory(self, bandwidth: float) -> float:
        """Images/s at so many bytes a second."""
        return bandwidth / self.bytes

    def images_per_s(self, rate: float, bandwidth: float) -> float:
        """What no code can pass: products and memory at once, neither waiting for the other."""
        return min(self.by_products(rate), self.by_memory(bandwidth))


def roofline(run: Run, batch: int) -> Roofline:
    """The floor of a run's step with so many pictures on this device."""
    return Roofline(sum(part.total for part in flops(run)), sum(bytes_per_step(run, batch).values()) / batch)


# -- operations --------------------------------------------------------------------------------------------


def flops(run: Run, *, as_written: bool = False) -> list[Part]:
    """Operations of one picture's step by part: the least, or as plain code does them.

    DINO's are counted by formula, with the network's by formula for a ViT and by torch's counter for timm's; other
    methods are counted whole. They are those of a step after the first epoch, in which the prototypes stand still.
    """
    if not isinstance(run.method, DINOConfig):
        return counted_method(run)
    looked = network_operations(run, "teacher", as_written=as_written)
    learnt = network_operations(run, "student", as_written=as_written)
    parts = [Part(name, looked[name].forward, *passes) for name, passes in learnt.items()]
    given, views = run.method.global_views, sum(n for n, _ in run.views.view_shapes)
    in_dim = run.backbone.shape.width if isinstance(run.backbone, ViT) else meta_method(run).backbone.embed_dim
    for name, ops in head_operations(run.method, in_dim).items():
        parts.append(Part(name, given * ops, views * ops, 2 * views * ops))
    if run.method.predictor:
        ops = views * linear_operations([run.method.out_dim, run.method.head_hidden, run.method.out_dim])
        parts.append(Part("predictor", 0.0, ops, 2 * ops))
    return parts


def network_operations(
    run: Run, whose: Literal["teacher", "student"], *, as_written: bool = False
) -> dict[str, Passes]:
    """Operations of the teacher's or the student's backbone over its views of one picture, by part."""
    stacks = run.views.view_shapes[:1] if whose == "teacher" else run.views.view_shapes
    total: dict[str, Passes] = {}
    for views, side in stacks:
        if isinstance(run.backbone, ViT):
            drop = run.backbone.drop_path if whose == "student" and not as_written else 0.0
            ops = vit_operations(run.backbone, side, drop_path=drop)
        else:
            ops = timm_operations(run.backbone, side)
        for name, (forward, backward) in ops.items():
            before = total.get(name, Passes(0.0, 0.0))
            total[name] = Passes(before.forward + views * forward, before.backward + views * backward)
    return total


def vit_operations(vit: ViT, side: int, *, drop_path: float = 0.0, whole: bool = False) -> dict[str, Passes]:
    """Operations of a ViT for one view of `side` pixels, by part.

    Block i is left out with probability drop_path * i / (depth - 1): the mean is counted. Nothing but the [CLS] token
    leaves the last block: keys and values of every token are needed there, the rest for one alone; `whole` counts it
    for all, as where the patches are asked for.
    """
    width, depth, _ = vit.shape
    places = (side // vit.patch) ** 2
    tokens = 1 + vit.registers + places
    kept = (1 - torch.linspace(0, drop_path, depth, dtype=torch.float64)).tolist()
    asked = [tokens] * (depth - 1) + [tokens if whole else 1]
    entering = tokens * sum(kept)  # tokens, over all blocks
    leaving = sum(share * n for share, n in zip(kept, asked, strict=True))
    patches = 2.0 * places * 3 * vit.patch**2 * width
    forward = {
        "queries, keys, values, projection": 2 * width * (2 * width * entering + 2 * width * leaving),
        "attention": 2 * width * (tokens * leaving + tokens * leaving),
        "blocks' MLP": 2 * width * 2 * int(width * vit.mlp_ratio) * leaving,
    }
    return {"patch embedding": Passes(patches, patches)} | {name: Passes(f, 2 * f) for name, f in forward.items()}


def head_operations(method: DINOConfig, in_dim: int) -> dict[str, float]:
    """Forward operations of DINO's head for one view: the MLP, and the layer of K prototypes."""
    hidden = [in_dim, *[method.head_hidden] * (method.head_layers - 1)]
    widths = [*hidden, method.head_bottleneck] if method.head_bottleneck else hidden
    return {
        "head's MLP": linear_operations(widths),
        "last layer": linear_operations([widths[-1], method.out_dim]),
    }


def linear_operations(widths: list[int]) -> float:
    """Operations of linear layers from each width to the next, for one row."""
    return float(sum(2 * before * after for before, after in pairwise(widths)))


@cache
def timm_operations(network: Timm, side: int) -> dict[str, Passes]:
    """Operations of a timm network for one view, by torch's counter on shapes alone."""
    with torch.device("meta"):
        net = network.build(drop_path=0.0).train()
    images = torch.empty(PICTURES, 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = net(images)
        forward = by_kind(counter)
        out.sum().backward()
    return {name: Passes(forward[name], both - forward[name]) for name, both in by_kind(counter).items()}


def counted_method(run: Run) -> list[Part]:
    """A whole step of any method by torch's counter, on shapes alone: forward as one part, and backward.

    As written: nothing is known of what its loss would not need.
    """
    method = meta_method(run).train()
    views = tuple(torch.empty(n, PICTURES, 3, side, side, device="meta") for n, side in run.views.view_shapes)
    batch = Batch(views, torch.empty(PICTURES, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as counter:
        loss = method(batch, Clock(0, 1, 1)).loss
        forward = by_kind(counter)
        loss.backward()
    return [Part(name, 0.0, forward[name], both - forward[name]) for name, both in by_kind(counter).items()]


def by_kind(counter: FlopCounterMode) -> dict[str, float]:
    """What a counter has seen so far, for one of the pictures."""
    counts: Mapping[Any, int] = counter.get_flop_counts().get("Global", {})
    convolved = sum(count for operator, count in counts.items() if "convolution" in str(operator))
    return {"convolutions": convolved / PICTURES, "matrix products": (sum(counts.values()) - convolved) / PICTURES}


# -- bytes -------------------------------------------------------------------------------------------------


def bytes_per_step(run: Run, batch: int) -> dict[str, float]:
    """The least bytes that a step of `batch` pictures moves between the processor and its main memory, by purpose.

    Weights are read once by each pass that uses them, in the run's precision (the student's forward and backward, the
    teacher's forward). A gradient is written once and read once, in float32: its norm must be known before it is used.
    The optimizer reads and writes the parameter and its moments; the teacher follows at that moment, so that the
    student is not read again. Views are read once, as uint8. Not counted: activations, logits and probabilities (they
    could stay in the cache), the weights' copy in bfloat16, and what several ranks tell each other.
    """
    trained, followed, center = parameter_counts(run)
    read = WIDTH[run.precision]
    moments = MOMENTS[run.optim.algorithm]
    return {
        "views": float(batch * sum(n * 3 * side**2 for n, side in run.views.view_shapes)),
        "weights, read by the passes": float(read * (2 * trained + followed)),
        "gradients": float(4 * 2 * trained),
        "optimizer": float(4 * 2 * trained * (1 + moments)),
        "teacher and center": float(4 * 2 * (followed + center)),
    }


def parameter_counts(run: Run) -> tuple[int, int, int]:
    """(parameters that move, parameters that follow them, numbers of the center)."""
    method = meta_method(run)
    trained = sum(p.numel() for p in method.trainable.parameters() if p.requires_grad)
    teacher: Any = getattr(method, "teacher", None)
    center: Any = getattr(method, "center", None)
    followed = sum(p.numel() for p in teacher.parameters()) if isinstance(teacher, nn.Module) else 0
    return trained, followed, center.numel() if isinstance(center, Tensor) else 0


def meta_method(run: Run) -> Any:
    """The method of a run as shapes without numbers."""
    return _meta_method(run.method, run.backbone)


@cache
def _meta_method(method: MethodConfig, network: BackboneConfig) -> Any:
    with torch.device("meta"):
        return method.build(BuildContext(network, classes=CLASSES))
