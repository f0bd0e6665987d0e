"""How the student moves: AdamW, SGD or LARS, two groups of parameters, clipping per tensor, and the schedules."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dino.errors import UserError
from dino.schedules import Constant, Cosine, Schedule, Warmup, scaled


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its schedules. Defaults: the published code's, for ViTs (Sec. 3.2)."""

    algorithm: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW for ViTs; SGD or LARS for ResNets."""
    epochs: int = 100
    """Times that every picture is seen."""
    batch_size: int = 1024
    """Pictures in one step, over all ranks together."""
    lr: float = 5e-4
    """Peak learning rate for a batch of 256; the batch scales it linearly."""
    min_lr: float = 1e-6
    """Learning rate in the last step; not scaled by the batch."""
    warmup_epochs: float = 10
    """Epochs in which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.04
    """Weight decay in the first step; biases and norms have none."""
    weight_decay_end: float = 0.4
    """Weight decay in the last step, reached by a cosine."""
    clip: float = 3.0
    """Largest norm of the gradient of each parameter tensor; 0 does not clip."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"optim.{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} must be 0 or more; got {getattr(self, name)}.")

    def lr_schedule(self) -> Schedule:
        """Sec. 3.2: linear warm-up to lr * batch / 256, then a cosine to min_lr; a value per step."""
        return scaled(Warmup(self.warmup_epochs, Cosine(self.lr, self.min_lr)), self.batch_size / 256)

    def weight_decay_schedule(self) -> Schedule:
        """Sec. 3.2: a cosine from 0.04 to 0.4 (a slip in some summaries gives this range to the learning rate)."""
        if self.weight_decay == self.weight_decay_end:
            return Constant(self.weight_decay)
        return Cosine(self.weight_decay, self.weight_decay_end)

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over a module's parameters; set_hyper gives it its rates at every step."""
        groups = parameter_groups(module)
        match self.algorithm:
            case "adamw":
                return torch.optim.AdamW(groups, lr=0.0, fused=True)
            case "sgd":
                return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
            case "lars":
                return LARS(groups)


def group_of(name: str, parameter: Tensor) -> Literal["decayed", "not_decayed", "frozen"]:
    """Which group a parameter belongs to, by the published code's rule: biases and 1-d tensors are not decayed.

    So the positions, the CLS token and a free last layer's weight_g (all more than 1-d) are.
    """
    if not parameter.requires_grad:
        return "frozen"
    return "not_decayed" if name.endswith(".bias") or parameter.ndim == 1 else "decayed"


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups, decayed first; each remembers in `decayed` which it is."""
    groups: dict[str, list[Tensor]] = {"decayed": [], "not_decayed": [], "frozen": []}
    for name, parameter in module.named_parameters():
        groups[group_of(name, parameter)].append(parameter)
    return [
        {"params": groups["decayed"], "decayed": True, "weight_decay": 0.0},
        {"params": groups["not_decayed"], "decayed": False, "weight_decay": 0.0},
    ]


def set_hyper(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """This step's rates; the weight decay goes to the decayed group alone."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


@torch.no_grad()
def clip_grad_norms_(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scales each tensor's own gradient by max_norm / (norm + 1e-6) where that is below 1; 0 leaves all as they are.

    Per tensor, as the published code does, not one norm over all. Nothing waits for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if max_norm > 0 and gradients:
        norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
        scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))  # pyright: ignore[reportPrivateImportUsage]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., 2017), as the authors train ResNet-50 with large batches.

    Every tensor that is not 1-d has weight decay added to its gradient, which is then scaled to trust times the
    tensor's own norm; 1-d tensors take plain steps. mu <- momentum mu + g; p <- p - lr mu.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None, "LARS takes no closure"
        for group, parameter in self._moving():
            step = parameter.grad
            if parameter.ndim > 1:
                step = step + group["weight_decay"] * parameter
                own, its = parameter.norm(), step.norm()
                rate = torch.where((own > 0) & (its > 0), group["trust"] * own / its, torch.ones_like(own))
                step = step * rate
            mu = self.state[parameter].setdefault("mu", torch.zeros_like(parameter))
            mu.mul_(group["momentum"]).add_(step)
            parameter.add_(mu, alpha=-group["lr"])

    def _moving(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group, parameter
