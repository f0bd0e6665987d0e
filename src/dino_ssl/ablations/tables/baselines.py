"""BYOL, MoCo-v2 and SwAV as rows: the same changes in every table that has them.

At the paper's scale they have what the authors told of their own runs: the same learning rate, a constant weight decay
of 0.05 and no clipping for the two that compare features; SwAV keeps DINO's. At scale small their heads are as narrow
as `small()`'s, and their teachers as quick.
"""

from collections.abc import Mapping
from typing import Any

from dino_ssl.ablations.bases import NO_MULTI_CROP
from dino_ssl.ablations.table import Changes, Row
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.moco import MoCoConfig
from dino_ssl.methods.swav import SwAVConfig

PLAIN = {"weight_decay": 0.05, "weight_decay_end": 0.05, "clip_grad": 0.0}

BYOL: Changes = {"method": BYOLConfig(), "optim": PLAIN}
BYOL_SMALL: Changes = {"method": BYOLConfig(head_hidden=512, head_dim=128, momentum=0.97)}
BYOL_NO_PREDICTOR: Changes = {"method": BYOLConfig(predictor=False), "optim": PLAIN}
BYOL_NO_PREDICTOR_SMALL: Changes = {
    "method": BYOLConfig(predictor=False, head_hidden=512, head_dim=128, momentum=0.97),
}
MOCO: Changes = {"method": MoCoConfig(), "optim": PLAIN}
MOCO_SMALL: Changes = {"method": MoCoConfig(queue=4096, head_hidden=512, head_dim=128, momentum=0.97)}
SWAV: Changes = {"method": SwAVConfig()}
SWAV_SMALL: Changes = {"method": SwAVConfig(out_dim=300, head_hidden=512, freeze_prototypes=0)}


def row(name: str, what: str, change: Changes, small: Changes, *, crops: bool, paper: Mapping[str, float]) -> Row:
    """A row of one of these methods, with multi-crop or without."""
    views: dict[str, Any] = {} if crops else NO_MULTI_CROP
    return Row(name, what, {**change, **views}, {**small, **views}, paper=paper)


def byol(paper: Mapping[str, float], *, crops: bool = False, name: str = "byol", what: str = "BYOL") -> Row:
    return row(name, what, BYOL, BYOL_SMALL, crops=crops, paper=paper)


def moco(paper: Mapping[str, float], *, crops: bool = False, name: str = "moco-v2", what: str = "MoCo-v2") -> Row:
    return row(name, what, MOCO, MOCO_SMALL, crops=crops, paper=paper)


def swav(paper: Mapping[str, float], *, crops: bool = True, name: str = "swav", what: str = "SwAV") -> Row:
    return row(name, what, SWAV, SWAV_SMALL, crops=crops, paper=paper)
