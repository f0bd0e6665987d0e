"""lightly's DINO, as its documentation puts the parts together: its head, its loss, its momentum update, its transform.

The network is timm's, and begins with the package's weights, so that losses can be compared: they differ a little
for a ViT, since timm interpolates positions with antialiasing. Each view passes alone, as in lightly's example.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.models.timm import Timm, create
from dino_ssl.models.vit import ViT
from plain import BuildContext, Rates


def installed() -> bool:
    return importlib.util.find_spec("lightly") is not None


def timm_network(settings: ViT | Timm, drop_path: float) -> Any:
    """timm's network of these settings, of any image size, without a classifier."""
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(settings, Timm):
        return create(settings.name, drop_path=0.0, pretrained=False, args=dict(settings.args))
    width, depth, heads = settings.shape
    return VisionTransformer(
        img_size=settings.image_size,
        patch_size=settings.patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=settings.mlp_ratio,
        num_classes=0,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
    )


class LightlyDINO:
    """The same construction and the same `step` as `plain.PlainDINO`."""

    student: nn.Module

    def __init__(self, start: BuildContext, weights: dict[str, Tensor]) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        self.device, self.precision = start.device, start.precision
        backbone = timm_network(start.settings, start.drop_path)
        width = backbone.num_features
        head = DINOProjectionHead(width, start.hidden, 256, start.out_dim, freeze_last_layer=1)
        part = {"backbone": backbone, "head": head}
        for name, module in part.items():
            begun = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
            module.load_state_dict(
                {key.replace("mlp.", "layers.") if module is head else key: begun[key] for key in begun}
            )
        self.student = nn.Sequential(backbone, head).to(self.device)
        slow = timm_network(start.settings, 0.0), DINOProjectionHead(width, start.hidden, 256, start.out_dim)
        self.teacher = nn.Sequential(*slow).requires_grad_(False).to(self.device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.criterion = DINOLoss(start.out_dim, warmup_teacher_temp_epochs=0).to(self.device)
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def step(self, crops: Sequence[Tensor], rates: Rates) -> float:
        from lightly.models.utils import update_momentum

        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rates.lr, rates.weight_decay
        update_momentum(self.student, self.teacher, m=rates.momentum)
        crops = [crop.to(self.device, non_blocking=True) for crop in crops]
        with torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != "float32"):
            teacher = [self.teacher(crop) for crop in crops[:2]]
            student = [self.student(crop) for crop in crops]
            loss = self.criterion(teacher, student, teacher_temp=rates.teacher_temp)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


def lightly_views(views: MultiCrop) -> Callable[[Any], list[Tensor]]:
    """Its transform at these sizes and numbers of crops, all else at its defaults."""
    from lightly.transforms import DINOTransform

    return DINOTransform(
        global_crop_size=views.global_size,
        global_crop_scale=views.global_scale,
        local_crop_size=views.local_size,
        local_crop_scale=views.local_scale,
        n_local_views=views.local,
    )
