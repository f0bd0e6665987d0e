"""Optimizers (AdamW, SGD, LARS), parameter groups, gradient clipping, and their schedules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dino_ssl.errors import UserError, check_range
from dino_ssl.models.backbone import Backbone
from dino_ssl.schedules import Cosine, Schedule, Warmup


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its schedules. The defaults are the published code's for ViTs (Sec. 3.2)."""

    algorithm: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW for ViTs; SGD or LARS for ResNets."""
    epochs: int = 100
    """Number of passes over the training images."""
    batch_size: int = 1024
    """Images per optimizer step, over all ranks together."""
    micro_batch: int | Literal["auto"] = 0
    """Images per forward and backward pass on each rank (gradient accumulation): less memory, equal results. 0: the
    whole batch; auto: as many as fit in memory, measured once before the first step."""
    lr: float = 5e-4
    """Peak learning rate for a batch of 256; scaled linearly with the batch."""
    min_lr: float = 1e-6
    """Final learning rate; not scaled with the batch."""
    warmup_epochs: float = 10
    """Epochs of linear learning rate warm-up."""
    warmup_lr: float = 0.0
    """Initial learning rate of the warm-up; not scaled with the batch."""
    weight_decay: float = 0.04
    """Initial weight decay; biases and norms have none."""
    weight_decay_end: float = 0.4
    """Final weight decay, reached by a cosine schedule."""
    clip_grad: float = 3.0
    """Maximum gradient norm of each parameter tensor; 0 disables clipping."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay for fine-tuning: factor per block; 1 disables it."""

    def __post_init__(self) -> None:
        check_range(self, "epochs", "batch_size", prefix="optim.", least=1)
        check_range(self, "layer_decay", prefix="optim.", above=0, most=1)
        nonnegative = ["lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad"]
        nonnegative += ["micro_batch"] if self.micro_batch != "auto" else []
        check_range(self, *nonnegative, prefix="optim.", least=0)

    def lr_schedule(self) -> Schedule:
        """Sec. 3.2: linear warm-up to lr * batch / 256, then a cosine to min_lr, per step."""
        return Warmup(self.warmup_epochs, Cosine(self.lr * (self.batch_size / 256), self.min_lr), self.warmup_lr)

    def weight_decay_schedule(self) -> Schedule:
        """Sec. 3.2: a cosine from 0.04 to 0.4, per step."""
        return Cosine(self.weight_decay, self.weight_decay_end)

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a module's parameters; `set_lr_and_weight_decay` sets its rates at every step."""
        groups = parameter_groups(module, self.layer_decay)
        match self.algorithm:
            case "adamw":
                return torch.optim.AdamW(groups, lr=0.0, fused=True)
            case "sgd":
                return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
            case "lars":
                return LARS(groups)


def group_name(name: str, parameter: Tensor) -> Literal["decayed", "not_decayed", "frozen"]:
    """Return the group of a parameter by the published code's rule: biases and 1-d tensors have no weight decay.

    Position embeddings, the [CLS] token and a trainable weight_g of the last layer are not 1-d, so they have it.
    """
    if not parameter.requires_grad:
        return "frozen"
    return "not_decayed" if name.endswith(".bias") or parameter.ndim == 1 else "decayed"


def parameter_groups(module: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return two groups, decayed and not decayed, or two per learning rate scale if `layer_decay` is not 1.

    A group has two further keys: `decayed` (bool) and `lr_scale`, a factor on the learning rate.
    """
    scales = lr_scales(module, layer_decay)
    groups: dict[tuple[str, float], list[Tensor]] = {}
    for scale in sorted({1.0, *scales.values()}, reverse=True):
        groups |= {("decayed", scale): [], ("not_decayed", scale): []}
    for name, parameter in module.named_parameters():
        if (group := group_name(name, parameter)) != "frozen":
            groups[group, scales.get(name, 1.0)].append(parameter)
    return [
        {"params": parameters, "decayed": group == "decayed", "lr_scale": scale, "weight_decay": 0.0}
        for (group, scale), parameters in groups.items()
    ]


def lr_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return layer_decay ** (blocks + 1 - layer) for each parameter of the backbone in `module`, by name.

    Layer-wise learning rate decay as in ELECTRA and BEiT: the last block has `layer_decay`, the stem
    layer_decay ** (blocks + 1). Parameters outside the backbone (a head) have 1 and are not listed.
    """
    if layer_decay == 1:
        return {}
    for prefix, submodule in module.named_modules():
        if isinstance(submodule, Backbone):
            layers = {f"{prefix}.{name}".lstrip("."): layer for name, layer in submodule.layer_ids().items()}
            top = 1 + max(layers.values())
            return {name: layer_decay ** (top - layer) for name, layer in layers.items()}
    raise UserError(f"Expected `optim.layer_decay` 1 for a network without a backbone, got {layer_decay}.")


def set_lr_and_weight_decay(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the rates of one step: the scaled learning rate of each group, and weight decay of the decayed groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


@torch.no_grad()
def clip_grad_norm_per_tensor_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each tensor's gradient to a norm of at most `max_norm` in place; return the total norm before that.

    Per tensor as in the published code, unlike `torch.nn.utils.clip_grad_norm_`. max_norm 0 disables clipping. Does
    not synchronize with the device.
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
    """Layer-wise adaptive rate scaling (You et al., 2017), with which the authors train ResNet-50 in large batches.

    Weight decay is added to the gradient of each tensor that is not 1-d; the sum is scaled to a norm of trust * |p|.
    1-d tensors take plain steps. mu <- momentum mu + g; p <- p - lr mu.
    """

    def __init__(
        self, params: Any, lr: float = 0.0, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one step; closures are not supported."""
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    norm, update_norm = parameter.norm(), update.norm()
                    adapted = group["trust"] * norm / update_norm
                    update = update * torch.where((norm > 0) & (update_norm > 0), adapted, torch.ones_like(norm))
                mu = self.state[parameter].setdefault("mu", torch.zeros_like(parameter))
                mu.mul_(group["momentum"]).add_(update)
                parameter.add_(mu, alpha=-group["lr"])
