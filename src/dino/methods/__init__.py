"""Ways to learn: one file, one method. Each is a frozen dataclass of settings that builds its `Method`."""

from dino.methods.byol import BYOLConfig
from dino.methods.dino import DINOConfig
from dino.methods.moco import MoCoConfig
from dino.methods.supervised import SupervisedConfig
from dino.methods.swav import SwAVConfig

AnyMethod = DINOConfig | BYOLConfig | MoCoConfig | SwAVConfig | SupervisedConfig
"""Every method that a Run can name."""

METHODS: dict[str, type[AnyMethod]] = {
    "dino": DINOConfig,
    "byol": BYOLConfig,
    "moco": MoCoConfig,
    "swav": SwAVConfig,
    "supervised": SupervisedConfig,
}
"""The methods by the names that a person types."""
