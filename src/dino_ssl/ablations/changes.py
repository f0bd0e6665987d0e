"""Changes of the tables; BYOL, MoCo-v2 and SwAV as rows: the same in every table that compares them.

At the paper's scale the three use what the authors reported about their own runs: DINO's learning rate, and for the two
methods that compare features a constant weight decay of 0.05 and no clipping. SwAV keeps DINO's. At scale small their
heads are as narrow as in `small()`, and their EMA teachers as fast. The learning rates of the rows of Table 7 at scale
small were chosen on held-out training images (docs/ablations/learning_rates-table7*.json). Rows of other tables have
the factor of the row of Table 7 that is closest; they are not tuned.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dino_ssl.ablations.bases import Changes, conv, learning_rate
from dino_ssl.ablations.table import Configuration, Scale, row
from dino_ssl.config import edit
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.method import MethodConfig
from dino_ssl.methods.moco import MoCoConfig
from dino_ssl.methods.swav import SwAVConfig
from dino_ssl.presets.paper import resnet50_800
from dino_ssl.run import Run

NO_MULTI_CROP: Changes = {"views": {"local": 0, "global_scale": (0.14, 1.0)}}
"""Two global views only; they then cover 14 to 100 % of the image area, as in the authors' code."""
CONSTANT_DECAY: Changes = {"optim": {"weight_decay": 0.05, "weight_decay_end": 0.05, "clip_grad": 0.0}}
NO_MULTI_CROP_LR = MOCO_LR = SWAV_LR = 0.5
NO_MOMENTUM_LR, SINKHORN_LR = 0.25, 2.0
"""Learning rates at scale small, divided by the base's."""
SMALL_HEAD: dict[str, Any] = {"head_hidden": 512, "head_dim": 128, "momentum": 0.97}


def method(**changes: Any) -> Changes:
    """Return a change of the method's settings."""
    return {"method": changes}


def backbone(**changes: Any) -> Changes:
    """Return a change of the network's settings."""
    return {"backbone": changes}


def views(**changes: Any) -> Changes:
    """Return a change of the augmentation's settings."""
    return {"views": changes}


def temperature(start: float, end: float, warmup: float = 0.0) -> Callable[[Run], Changes]:
    """Return a warm-up of the teacher's temperature over this fraction of the epochs."""
    temperatures = {"warmup_teacher_temp": start, "teacher_temp": end}
    return lambda run: method(**temperatures, warmup_teacher_temp_epochs=round(warmup * run.optim.epochs))


def no_momentum(name: str, title: str, *paper: float) -> Configuration:
    """Return DINO whose teacher is a copy of the student."""
    return row(name, title, method(teacher="student"), *paper, small_lr=NO_MOMENTUM_LR)


def no_multi_crop(name: str, title: str, *paper: float) -> Configuration:
    """Return DINO with two global views only."""
    return row(name, title, NO_MULTI_CROP, *paper, small_lr=NO_MULTI_CROP_LR)


def sinkhorn(name: str, title: str, *paper: float) -> Configuration:
    """Return DINO whose targets are balanced by Sinkhorn-Knopp instead of centered."""
    return row(name, title, method(targets="sinkhorn"), *paper, small_lr=SINKHORN_LR)


def predictor(name: str, title: str, *paper: float) -> Configuration:
    """Return DINO with a predictor on the student's bottleneck."""
    return row(name, title, method(predictor=True), *paper)


def byol(name: str, title: str, *paper: float, multi_crop: bool = False, predictor: bool = True) -> Configuration:
    """Return BYOL; `multi_crop` keeps the base's local views."""
    config, small = BYOLConfig(predictor=predictor), BYOLConfig(predictor=predictor, **SMALL_HEAD).for_few_steps()
    return _row(name, title, {"method": config, **CONSTANT_DECAY}, small, paper, multi_crop)


def moco(name: str, title: str, *paper: float, multi_crop: bool = False) -> Configuration:
    """Return MoCo-v2; `multi_crop` keeps the base's local views."""
    small = MoCoConfig(queue=4096, **SMALL_HEAD).for_few_steps()
    return _row(name, title, {"method": MoCoConfig(), **CONSTANT_DECAY}, small, paper, multi_crop, small_lr=MOCO_LR)


def swav(name: str, title: str, *paper: float, multi_crop: bool = True) -> Configuration:
    """Return SwAV; `multi_crop` keeps the base's local views."""
    small = SwAVConfig(out_dim=300, head_hidden=512, freeze_prototypes=0)
    return _row(name, title, {"method": SwAVConfig()}, small, paper, multi_crop, small_lr=SWAV_LR)


def _row(
    name: str,
    title: str,
    change: Changes,
    small: MethodConfig,
    paper: tuple[float, ...],
    multi_crop: bool,
    small_lr: float = 1.0,
) -> Configuration:
    crops = {} if multi_crop else NO_MULTI_CROP
    return row(name, title, {**change, **crops}, *paper, small={"method": small, **crops}, small_lr=small_lr)


def _resnet(run: Run) -> Changes:
    """Return the settings of the released ResNet-50 at the base's length: batch norm in the head, K 60000."""
    released = resnet50_800()
    optim = edit(released.optim, epochs=run.optim.epochs)
    return {"backbone": released.backbone, "method": released.method, "optim": optim, "views": released.views}


def on_resnet(item: Configuration) -> Configuration:
    """Return a method on a ResNet: its method and views, with the optimizer of the network."""

    def small_resnet(run: Run) -> Changes:
        base = conv()
        rate = learning_rate(item.small_lr * base.optim.lr)
        return {"backbone": base.backbone, "online_eval": {"size": base.online_eval.size}, **rate(run)}

    def change(scale: Scale, network: Callable[[Run], Changes]) -> Callable[[Run], Changes]:
        kept = ("method", "views")
        return lambda run: {**network(run), **{k: v for k, v in item.changes(scale, run).items() if k in kept}}

    return replace(item, change=change("paper", _resnet), small=change("small", small_resnet), small_lr=1.0)
