"""How the student moves: AdamW, SGD or LARS, groups of parameters, clipping per tensor, and the schedules."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dino_ssl.errors import UserError, check_range
from dino_ssl.models.backbone import Backbone
from dino_ssl.schedules import Constant, Cosine, Schedule, Warmup, scaled


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its schedules. Defaults: the published code's, for ViTs (Sec. 3.2)."""

    algorithm: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW for ViTs; SGD or LARS for ResNets."""
    epochs: int = 100
    """Times that every picture is seen."""
    batch_size: int = 1024
    """Pictures in one step, over all ranks together."""
    micro_batch: int | Literal["auto"] = 0
    """Pictures that pass through the networks at once, on each rank: less memory, and nothing else changes. 0: the
    whole batch; auto: as many as fit, counted once before the first step."""
    lr: float = 5e-4
    """Peak learning rate for a batch of 256; the batch scales it linearly."""
    min_lr: float = 1e-6
    """Learning rate in the last step; not scaled by the batch."""
    warmup_epochs: float = 10
    """Epochs in which the learning rate rises to its peak."""
    warmup_lr: float = 0.0
    """Learning rate in the first step of the warm-up; not scaled by the batch."""
    weight_decay: float = 0.04
    """Weight decay in the first step; biases and norms have none."""
    weight_decay_end: float = 0.4
    """Weight decay in the last step, reached by a cosine."""
    clip: float = 3.0
    """Largest norm of the gradient of each parameter tensor; 0 does not clip."""
    layer_decay: float = 1.0
    """Each block of the backbone learns this many times as fast as the one after it. For fine-tuning; 1: all alike."""

    def __post_init__(self) -> None:
        if self.micro_batch != "auto" and self.micro_batch < 0:
            raise UserError(f"optim.micro_batch must be 0 (the whole batch) or more; got {self.micro_batch}.")
        check_range(self, "epochs", "batch_size", prefix="optim.", least=1)
        check_range(self, "layer_decay", prefix="optim.", above=0, most=1)
        rates = ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip")
        check_range(self, *rates, prefix="optim.", least=0)

    def lr_schedule(self) -> Schedule:
        """Sec. 3.2: linear warm-up to lr * batch / 256, then a cosine to min_lr; a value per step."""
        peak = Cosine(self.lr, self.min_lr)
        return scaled(Warmup(self.warmup_epochs, peak, self.warmup_lr), self.batch_size / 256)

    def weight_decay_schedule(self) -> Schedule:
        """Sec. 3.2: a cosine from 0.04 to 0.4 (a slip in some summaries gives this range to the learning rate)."""
        if self.weight_decay == self.weight_decay_end:
            return Constant(self.weight_decay)
        return Cosine(self.weight_decay, self.weight_decay_end)

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over a module's parameters; set_hyper gives it its rates at every step."""
        groups = parameter_groups(module, self.layer_decay)
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


def parameter_groups(module: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Two groups, decayed first, or two for each layer of a backbone whose layers learn at rates of their own.

    Each group remembers in `decayed` whether weight decay is for it, and in `scale` its share of the learning rate.
    """
    scales = lr_scales(module, layer_decay)
    groups: dict[tuple[str, float], list[Tensor]] = {}
    for scale in sorted({1.0, *scales.values()}, reverse=True):
        groups |= {("decayed", scale): [], ("not_decayed", scale): []}
    for name, parameter in module.named_parameters():
        if (kind := group_of(name, parameter)) != "frozen":
            groups[kind, scales.get(name, 1.0)].append(parameter)
    return [
        {"params": parameters, "decayed": kind == "decayed", "scale": scale, "weight_decay": 0.0}
        for (kind, scale), parameters in groups.items()
    ]


def lr_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Share of the learning rate of each parameter in a backbone inside `module`: decay ** (blocks + 1 - depth).

    Layer-wise decay as in ELECTRA and BEiT: the last block has `layer_decay`, the stem decay ** (blocks + 1); what
    stands outside, a head, has 1 and is not listed. Empty where nothing decays.
    """
    if layer_decay == 1:
        return {}
    scales = {}
    for prefix, part in module.named_modules():
        if isinstance(part, Backbone):
            layer_ids = part.layer_ids()
            top = 1 + max(layer_ids.values())
            scales |= {
                f"{prefix}.{name}".lstrip("."): layer_decay ** (top - depth) for name, depth in layer_ids.items()
            }
    if not scales:
        raise UserError(f"optim.layer_decay is {layer_decay}, and there is no backbone whose layers it could mean.")
    return scales


def set_hyper(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """This step's rates: each group its share of the learning rate; weight decay for the decayed groups alone."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)  # files of before have no scale
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


@torch.no_grad()
def clip_grad_norm_per_tensor_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales each tensor's own gradient by max_norm / (norm + 1e-6) where that is below 1; 0 leaves all as they are.

    Per tensor, as the published code does, not one norm over all. Gives the norm of all gradients together as it was
    before. Nothing waits for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    if max_norm > 0:
        scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))  # pyright: ignore[reportPrivateImportUsage]
    return norms.norm()


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
