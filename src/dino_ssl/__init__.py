"""DINO: self-distillation with no labels. From a folder of images to a trained backbone.

    run = dino_ssl.train("photos")              # plan settings for dataset and machine, then train
    backbone = dino_ssl.load(run.folder)        # or "dino_vits16", a file, "timm:resnet50"
    dino_ssl.embed(backbone, "photos").features

Names are imported when they are first used, so that `import dino_ssl` and `dino --help` are quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dino_ssl.api.calls import attention as attention
    from dino_ssl.api.calls import embed as embed
    from dino_ssl.api.calls import evaluate as evaluate
    from dino_ssl.api.classify import classify as classify
    from dino_ssl.api.segment import segment as segment
    from dino_ssl.api.training import train as train
    from dino_ssl.config import edit as edit
    from dino_ssl.data.folder import Folder as Folder
    from dino_ssl.data.synthetic.scenes import Scenes as Scenes
    from dino_ssl.errors import UserError as UserError
    from dino_ssl.methods.dino import DINO as DINO
    from dino_ssl.models.pretrained import load as load
    from dino_ssl.models.timm import Timm as Timm
    from dino_ssl.models.vit import ViT as ViT
    from dino_ssl.preprocessing import Preprocessing as Preprocessing
    from dino_ssl.run import Run as Run
    from dino_ssl.search.index import Index as Index

__all__ = ["DINO", "Folder", "Index", "Preprocessing", "Run", "Scenes", "Timm", "UserError", "ViT", "__version__"]
__all__ += ["attention", "classify", "edit", "embed", "evaluate", "load", "segment", "train"]
_MODULES = {
    "api.calls": ("attention", "embed", "evaluate"),
    "api.classify": ("classify",),
    "api.segment": ("segment",),
    "api.training": ("train",),
    "config": ("edit",),
    "data.folder": ("Folder",),
    "data.synthetic.scenes": ("Scenes",),
    "errors": ("UserError",),
    "methods.dino": ("DINO",),
    "models.pretrained": ("load",),
    "models.timm": ("Timm",),
    "models.vit": ("ViT",),
    "preprocessing": ("Preprocessing",),
    "run": ("Run",),
    "search.index": ("Index",),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
