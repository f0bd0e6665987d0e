"""The baseline of the benchmarks: DINO as published, in plain PyTorch.

It shares no code of the hot path with the package, so that it does not become faster with it. As in the published
code, the crops of one resolution pass as one batch, attention matrices are explicit, each pair of views has its own
log-softmax, and gradient clipping and EMA process one parameter at a time, with a device synchronisation each.
Parameters have the package's names, so that both start from the same weights.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.models.timm import Timm, create
from dino_ssl.models.vit import ViT
from dino_ssl.preprocessing import MEAN, STD

# -- the networks ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with explicit [B, heads, N, N] matrices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width, int(width * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: computed for every image, then multiplied by 0 for some."""
        if not self.drop_path or not self.training:
            return x
        mask = (torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device) + (1 - self.drop_path)).floor_()
        return x / (1 - self.drop_path) * mask


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PlainViT(nn.Module):
    """A ViT that interpolates its position embedding in each forward pass."""

    def __init__(self, settings: ViT, drop_path: float) -> None:
        super().__init__()
        width, depth, heads = settings.shape
        self.patch, self.side = settings.patch, settings.image_size // settings.patch
        self.patch_embed = PatchEmbed(width, settings.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(width, heads, settings.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        tokens = tokens + self.positions(h, w)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def positions(self, h: int, w: int) -> Tensor:
        if (h, w) == (self.side, self.side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class LastLayer(nn.Module):
    """A linear layer with weight normalization, computed in each forward pass; norms fixed at 1."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))  # pyright: ignore[reportPrivateImportUsage]


class Head(nn.Module):
    def __init__(self, width: int, out_dim: int, hidden: int, bottleneck: int = 256) -> None:
        super().__init__()
        first, second, third = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        self.last_layer = LastLayer(bottleneck, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainNetwork(nn.Module):
    """One forward pass of the backbone per resolution, then one of the head on all crops, in their order."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-1])]
        return self.head(torch.cat([self.backbone(torch.cat(group)) for group in groups]))


def plain_backbone(settings: ViT | Timm, drop_path: float) -> tuple[nn.Module, int]:
    """Return the network and its width."""
    if isinstance(settings, ViT):
        return PlainViT(settings, drop_path), settings.shape.width
    net: Any = create(settings.name, drop_path=0.0, pretrained=False, args=dict(settings.args))
    return net, net.num_features


# -- the step --------------------------------------------------------------------------------------------------


@dataclass
class StepSettings:
    """Values of the schedules at one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float = 0.04
    student_temp: float = 0.1
    center_momentum: float = 0.9
    clip: float = 3.0


@dataclass(frozen=True)
class Setup:
    """Network, head, device and precision of a baseline."""

    backbone: ViT | Timm
    out_dim: int
    device: torch.device
    precision: str
    drop_path: float
    hidden: int


class PlainDINO:
    """Student, teacher, center and optimizer. weights: the state dict of the package's student."""

    student: nn.Module

    def __init__(self, setup: Setup, weights: dict[str, Tensor]) -> None:
        self.device, self.precision = setup.device, setup.precision
        backbone, width = plain_backbone(setup.backbone, setup.drop_path)
        self.student = PlainNetwork(backbone, Head(width, setup.out_dim, setup.hidden))
        self.student.load_state_dict(weights)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, Block):
                module.drop_path = 0.0
        self.student.to(self.device)
        self.teacher.to(self.device)
        self.center = torch.zeros(1, setup.out_dim, device=self.device)
        trained = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        no_decay = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")]
        decay = [p for name, p in trained if not (p.ndim == 1 or name.endswith(".bias"))]
        self.optimizer = torch.optim.AdamW([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def step(self, crops: Sequence[Tensor], settings: StepSettings) -> float:
        """Train on float crops [B, 3, H, W], the two global ones first; return the loss."""
        for group, decay in zip(self.optimizer.param_groups, (settings.weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = settings.lr, decay
        crops = [crop.to(self.device, non_blocking=True) for crop in crops]
        with torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != "float32"):
            teacher_out = self.teacher(crops[:2])
            student_out = self.student(crops)
        loss = self.loss(student_out.float(), teacher_out.float(), len(crops), settings)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss of the plain step is {loss.item()}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip_each(self.student, settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                teacher.mul_(settings.momentum).add_((1 - settings.momentum) * student)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def loss(self, student: Tensor, teacher: Tensor, views: int, settings: StepSettings) -> Tensor:
        """Eq. 3 pair by pair, then Eq. 4."""
        student_logits = (student / settings.student_temp).chunk(views)
        targets = F.softmax((teacher - self.center) / settings.teacher_temp, dim=-1).detach().chunk(2)
        total, pairs = torch.zeros((), device=student.device), 0
        for g, target in enumerate(targets):
            for v, logits in enumerate(student_logits):
                if v != g:
                    total = total + (-target * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
                    pairs += 1
        m = settings.center_momentum
        self.center = self.center * m + teacher.mean(dim=0, keepdim=True) * (1 - m)
        return total / pairs


def clip_each(network: nn.Module, max_norm: float) -> None:
    """Scale each gradient to a norm of at most `max_norm`, with a device synchronisation each."""
    for parameter in network.parameters():
        if parameter.grad is not None:
            scale = max_norm / (parameter.grad.norm().item() + 1e-6)
            if scale < 1:
                parameter.grad.mul_(scale)


# -- augmentation -----------------------------------------------------------------------------------------------


def pillow_views(views: MultiCrop) -> Callable[[Any], list[Tensor]]:
    """Return Sec. 3.1's augmentation with torchvision on Pillow images: float crops, the global ones first."""
    import random

    import torchvision.transforms as T
    from PIL import ImageFilter, ImageOps

    def blur(p: float) -> Callable[[Any], Any]:
        def run(image: Any) -> Any:
            if random.random() > p:
                return image
            return image.filter(ImageFilter.GaussianBlur(random.uniform(*views.blur_sigma)))

        return run

    def solarize(image: Any) -> Any:
        return ImageOps.solarize(image) if random.random() < 0.2 else image

    def chain(size: int, scale: tuple[float, float], *last: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
        jitter = T.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(views.flip),
                T.RandomApply([jitter], p=views.jitter),
                T.RandomGrayscale(views.gray),
                *last,
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    first = chain(views.global_size, views.global_scale, blur(1.0))
    second = chain(views.global_size, views.global_scale, blur(0.1), solarize)
    local = chain(views.local_size, views.local_scale, blur(0.5))
    return lambda image: [first(image), second(image), *(local(image) for _ in range(views.local))]
