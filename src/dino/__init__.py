"""DINO: self-distillation with no labels. From a folder of pictures to a trained backbone.

    run = dino.train("photos")              # a plan for these pictures and this machine, then training
    backbone = dino.load(run.folder)        # or "dino_vits16", a file, "timm:resnet50"
    dino.embed(backbone, "photos").features

Names are imported when they are first used, so that `import dino` and `dino --help` are quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dino.api import attention as attention
    from dino.api import embed as embed
    from dino.api import evaluate as evaluate
    from dino.api import train as train
    from dino.config import edit as edit
    from dino.data.folder import Folder as Folder
    from dino.data.scenes import Scenes as Scenes
    from dino.errors import UserError as UserError
    from dino.methods.dino import DINO as DINO
    from dino.models.pretrained import load as load
    from dino.models.timm import Timm as Timm
    from dino.models.vit import ViT as ViT
    from dino.run import Run as Run

_HOMES = {
    "attention": "dino.api",
    "embed": "dino.api",
    "evaluate": "dino.api",
    "train": "dino.api",
    "edit": "dino.config",
    "Folder": "dino.data.folder",
    "Scenes": "dino.data.scenes",
    "UserError": "dino.errors",
    "DINO": "dino.methods.dino",
    "load": "dino.models.pretrained",
    "Timm": "dino.models.timm",
    "ViT": "dino.models.vit",
    "Run": "dino.run",
}
__all__ = [
    "DINO",
    "Folder",
    "Run",
    "Scenes",
    "Timm",
    "UserError",
    "ViT",
    "__version__",
    "attention",
    "edit",
    "embed",
    "evaluate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dino' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
