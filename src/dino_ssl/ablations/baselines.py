"""BYOL, MoCo-v2 and SwAV as configurations: the same changes in every table that compares them.

At the paper's scale they use what the authors reported about their own runs: DINO's learning rate, and for the two
methods that compare features a constant weight decay of 0.05 and no clipping. SwAV keeps DINO's. At scale small their
heads are as narrow as in `small()`, and their EMA teachers as fast.
"""

from typing import Any

from dino_ssl.ablations.bases import NO_MULTI_CROP
from dino_ssl.ablations.table import Changes, Configuration
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.moco import MoCoConfig
from dino_ssl.methods.swav import SwAVConfig

CONSTANT_DECAY = {"weight_decay": 0.05, "weight_decay_end": 0.05, "clip_grad": 0.0}
SMALL_HEAD: dict[str, Any] = {"head_hidden": 512, "head_dim": 128, "momentum": 0.97}


def results(knn: float | None = None, linear: float | None = None) -> dict[str, float]:
    """Return the paper's 20-NN and linear top-1, in percent, by the names of the metrics."""
    return {name: value for name, value in (("20-NN", knn), ("linear", linear)) if value is not None}


def byol(name: str = "byol", title: str = "BYOL", *, predictor: bool = True, **options: Any) -> Configuration:
    """Return BYOL; options as in `_configuration`."""
    change = {"method": BYOLConfig(predictor=predictor), "optim": CONSTANT_DECAY}
    return _configuration(name, title, change, {"method": BYOLConfig(predictor=predictor, **SMALL_HEAD)}, **options)


def moco(name: str = "moco-v2", title: str = "MoCo-v2", **options: Any) -> Configuration:
    """Return MoCo-v2; options as in `_configuration`."""
    change = {"method": MoCoConfig(), "optim": CONSTANT_DECAY}
    return _configuration(name, title, change, {"method": MoCoConfig(queue=4096, **SMALL_HEAD)}, **options)


def swav(name: str = "swav", title: str = "SwAV", *, multi_crop: bool = True, **options: Any) -> Configuration:
    """Return SwAV, with multi-crop by default; options as in `_configuration`."""
    small = {"method": SwAVConfig(out_dim=300, head_hidden=512, freeze_prototypes=0)}
    return _configuration(name, title, {"method": SwAVConfig()}, small, multi_crop=multi_crop, **options)


def _configuration(
    name: str, title: str, change: Changes, small: Changes, *, multi_crop: bool = False, **paper: float
) -> Configuration:
    """multi_crop: add the base's local views. paper: arguments of `results`."""
    views: Changes = {} if multi_crop else NO_MULTI_CROP
    return Configuration(name, title, {**change, **views}, {**small, **views}, results(**paper))
