"""Training methods, one per file: a frozen dataclass of settings that builds its `Method`."""

from typing import Literal

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.methods.byol import BYOLConfig as BYOLConfig
from dino_ssl.methods.dino import DINOConfig as DINOConfig
from dino_ssl.methods.method import MethodConfig as MethodConfig
from dino_ssl.methods.moco import MoCoConfig as MoCoConfig
from dino_ssl.methods.supervised import SupervisedConfig as SupervisedConfig
from dino_ssl.methods.swav import SwAVConfig as SwAVConfig

MethodName = Literal["dino", "byol", "moco", "swav", "supervised"]

METHODS: dict[str, type[MethodConfig]] = {
    "dino": DINOConfig,
    "byol": BYOLConfig,
    "moco": MoCoConfig,
    "swav": SwAVConfig,
    "supervised": SupervisedConfig,
}
"""Settings of the package's own methods by the name on the command line."""


def method_named(name: str) -> type[MethodConfig]:
    """Return the settings' class of a method. Raise UserError with the closest names if it is unknown."""
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}{did_you_mean(name, METHODS)}\nMethods: {', '.join(METHODS)}.")
    return METHODS[name]
