"""Ways to learn: one file, one method. Each is a frozen dataclass of settings that builds its `Method`."""

from typing import Literal

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.methods.moco import MoCoConfig
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.methods.swav import SwAVConfig

AnyMethod = DINOConfig | BYOLConfig | MoCoConfig | SwAVConfig | SupervisedConfig
"""Every method that a Run can name."""

MethodName = Literal["dino", "byol", "moco", "swav", "supervised"]

METHODS: dict[str, type[AnyMethod]] = {
    "dino": DINOConfig,
    "byol": BYOLConfig,
    "moco": MoCoConfig,
    "swav": SwAVConfig,
    "supervised": SupervisedConfig,
}
"""The methods by the names that a person types."""


def method_named(name: str) -> type[AnyMethod]:
    """The settings of a method by its name. Raises UserError with the nearest names."""
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}{did_you_mean(name, METHODS)}\nMethods: {', '.join(METHODS)}.")
    return METHODS[name]
