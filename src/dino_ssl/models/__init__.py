"""Networks: backbones with a common interface, and projection heads."""

import re

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.models.backbone import Attentive, Backbone, BackboneConfig, Features
from dino_ssl.models.heads import DINOHead, MLPHead, Network
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import VisionTransformer, ViT

BACKBONES: dict[str, type[BackboneConfig]] = {"ViT": ViT, "Timm": Timm}
"""Settings of the package's own backbones by class name."""


def backbone_named(name: str) -> ViT | Timm:
    """Return the settings for a name, `vit_tiny/16` or `timm:resnet18`. Raise UserError if it is unknown."""
    if name.startswith("timm:"):
        return Timm(name=name.removeprefix("timm:"))
    match = re.fullmatch(r"(?:vit[_-])?(tiny|small|base)[/_-]?(\d+)", name.lower())
    if match is None:
        known = ("vit_tiny/16", "vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8")
        raise UserError(f"Unknown network {name!r}{did_you_mean(name, known)}\nExpected vit_SIZE/PATCH or timm:NAME.")
    return ViT(size=match[1], patch=int(match[2]))  # pyright: ignore[reportArgumentType]


__all__ = [
    "BACKBONES",
    "Attentive",
    "Backbone",
    "BackboneConfig",
    "DINOHead",
    "Features",
    "MLPHead",
    "Network",
    "Timm",
    "ViT",
    "VisionTransformer",
    "backbone_named",
]
