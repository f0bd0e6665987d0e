"""lightly's DINO, assembled as in its documentation: head, loss, momentum update and transform, with timm's network.

It starts from the package's weights, so that losses are comparable; they differ slightly for a ViT, because timm
interpolates positions with antialiasing. Each view is a separate forward pass, as in lightly's example.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.models.timm import Timm, create
from dino_ssl.models.vit import ViT
from plain import Setup, StepSettings


def is_installed() -> bool:
    """Return whether lightly can be imported."""
    return importlib.util.find_spec("lightly") is not None


def timm_network(settings: ViT | Timm, drop_path: float) -> Any:
    """Return timm's network for any image size, without a classifier."""
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
    """A baseline with the interface of `plain.PlainDINO`."""

    student: nn.Module

    def __init__(self, setup: Setup, weights: dict[str, Tensor]) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        self.device, self.precision = setup.device, setup.precision
        backbone = timm_network(setup.backbone, setup.drop_path)
        width = backbone.num_features
        head = DINOProjectionHead(width, setup.hidden, 256, setup.out_dim, freeze_last_layer=1)
        for prefix, module in {"backbone.": backbone, "head.": head}.items():
            initial = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            if module is head:
                initial = {key.replace("mlp.", "layers."): value for key, value in initial.items()}
            module.load_state_dict(initial)
        self.student = nn.Sequential(backbone, head).to(self.device)
        teacher = timm_network(setup.backbone, 0.0), DINOProjectionHead(width, setup.hidden, 256, setup.out_dim)
        self.teacher = nn.Sequential(*teacher).requires_grad_(False).to(self.device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.criterion = DINOLoss(setup.out_dim, warmup_teacher_temp_epochs=0).to(self.device)
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def step(self, crops: Sequence[Tensor], settings: StepSettings) -> float:
        from lightly.models.utils import update_momentum

        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = settings.lr, settings.weight_decay
        update_momentum(self.student, self.teacher, m=settings.momentum)
        crops = [crop.to(self.device, non_blocking=True) for crop in crops]
        with torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != "float32"):
            teacher = [self.teacher(crop) for crop in crops[:2]]
            student = [self.student(crop) for crop in crops]
            loss = self.criterion(teacher, student, teacher_temp=settings.teacher_temp)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


def lightly_views(views: MultiCrop) -> Callable[[Any], list[Tensor]]:
    """Return lightly's transform with these sizes, scales and numbers of crops, and its other defaults."""
    from lightly.transforms import DINOTransform

    return DINOTransform(
        global_crop_size=views.global_size,
        global_crop_scale=views.global_scale,
        local_crop_size=views.local_size,
        local_crop_scale=views.local_scale,
        n_local_views=views.local,
    )
