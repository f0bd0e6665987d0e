"""Networks: backbones with a common interface, and projection heads."""

import re

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.models.backbone import Attentive as Attentive
from dino_ssl.models.backbone import Backbone as Backbone
from dino_ssl.models.backbone import BackboneConfig as BackboneConfig
from dino_ssl.models.backbone import Features as Features
from dino_ssl.models.heads import DINOHead as DINOHead
from dino_ssl.models.heads import MLPHead as MLPHead
from dino_ssl.models.heads import Network as Network
from dino_ssl.models.timm import Timm as Timm
from dino_ssl.models.vit import VisionTransformer as VisionTransformer
from dino_ssl.models.vit import ViT as ViT


def backbone_named(name: str) -> ViT | Timm:
    """Return the settings for a name, `vit_tiny/16` or `timm:resnet18`. Raise UserError if it is unknown."""
    if name.startswith("timm:"):
        return Timm(name=name.removeprefix("timm:"))
    match = re.fullmatch(r"(?:vit[_-])?(tiny|small|base)[/_-]?(\d+)", name.lower())
    if match is None:
        known = ("vit_tiny/16", "vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8")
        raise UserError(f"Unknown network {name!r}{did_you_mean(name, known)}\nExpected vit_SIZE/PATCH or timm:NAME.")
    return ViT(size=match[1], patch=int(match[2]))  # pyright: ignore[reportArgumentType]
