"""What people call a network, and the settings that it names."""

import re

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT


def network_name(backbone: ViT | Timm) -> str:
    """What a person calls it: `ViT-small/16`, or timm's own name."""
    return backbone.name if isinstance(backbone, Timm) else f"ViT-{backbone.size}/{backbone.patch}"


def typed_network(backbone: ViT | Timm) -> str:
    """The name that `named` reads."""
    return f"timm:{backbone.name}" if isinstance(backbone, Timm) else f"vit_{backbone.size}/{backbone.patch}"


def named(name: str) -> ViT | Timm:
    """`vit_tiny/16` or `timm:resnet18` as settings."""
    if name.startswith("timm:"):
        return Timm(name=name.removeprefix("timm:"))
    match = re.fullmatch(r"(?:vit[_-])?(tiny|small|base)[/_-]?(\d+)", name.lower())
    if match is None:
        known = ("vit_tiny/16", "vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8")
        raise UserError(
            f"There is no network {name!r}{did_you_mean(name, known)}\nExpected vit_SIZE/PATCH or timm:NAME."
        )
    return ViT(size=match[1], patch=int(match[2]))  # pyright: ignore[reportArgumentType]
