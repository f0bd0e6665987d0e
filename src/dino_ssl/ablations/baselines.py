"""Changes that several tables share; BYOL, MoCo-v2 and SwAV as rows: the same in every table that compares them.

At the paper's scale the three use what the authors reported about their own runs: DINO's learning rate, and for the two
methods that compare features a constant weight decay of 0.05 and no clipping. SwAV keeps DINO's. At scale small their
heads are as narrow as in `small()`, and their EMA teachers as fast.
"""

from typing import Any

from dino_ssl.ablations.bases import Changes
from dino_ssl.ablations.table import Configuration, row
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.moco import MoCoConfig
from dino_ssl.methods.swav import SwAVConfig

NO_MULTI_CROP: Changes = {"views": {"local": 0, "global_scale": (0.14, 1.0)}}
"""Two global views only; they then cover 14 to 100 % of the image area, as in the authors' code."""
CONSTANT_DECAY: Changes = {"optim": {"weight_decay": 0.05, "weight_decay_end": 0.05, "clip_grad": 0.0}}
SMALL_HEAD: dict[str, Any] = {"head_hidden": 512, "head_dim": 128, "momentum": 0.97}


def method(**changes: Any) -> Changes:
    """Return a change of the method's settings."""
    return {"method": changes}


def byol(name: str, title: str, *paper: float, multi_crop: bool = False, predictor: bool = True) -> Configuration:
    """Return BYOL; `multi_crop` keeps the base's local views."""
    views = {} if multi_crop else NO_MULTI_CROP
    change = {"method": BYOLConfig(predictor=predictor), **CONSTANT_DECAY, **views}
    return row(name, title, change, *paper, small={"method": BYOLConfig(predictor=predictor, **SMALL_HEAD), **views})


def moco(name: str, title: str, *paper: float, multi_crop: bool = False) -> Configuration:
    """Return MoCo-v2; `multi_crop` keeps the base's local views."""
    views = {} if multi_crop else NO_MULTI_CROP
    change = {"method": MoCoConfig(), **CONSTANT_DECAY, **views}
    return row(name, title, change, *paper, small={"method": MoCoConfig(queue=4096, **SMALL_HEAD), **views})


def swav(name: str, title: str, *paper: float, multi_crop: bool = True) -> Configuration:
    """Return SwAV; `multi_crop` keeps the base's local views."""
    views = {} if multi_crop else NO_MULTI_CROP
    small = SwAVConfig(out_dim=300, head_hidden=512, freeze_prototypes=0)
    return row(name, title, {"method": SwAVConfig(), **views}, *paper, small={"method": small, **views})
