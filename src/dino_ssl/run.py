"""A run's settings, whole: one value that says what a training run does, is saved with it, and can be read back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dino_ssl import __version__
from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.online import OnlineEval
from dino_ssl.evals.scheduled import ScheduledEval, must_differ
from dino_ssl.methods import AnyMethod
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.runtime import Precision
from dino_ssl.schedules import Schedule

EXECUTION_FIELDS = (
    "data.path",
    "val.path",
    "online_eval.batch_size",
    "evals",
    "optim.micro_batch",
    "precision",
    "grad_checkpointing",
    "workers",
    "cache",
    "log_every",
    "save_minutes",
    "keep_every",
    "on_collapse",
    "out",
)
"""Fields that do not change what a run learns: where and how fast it runs, what it measures and saves."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides what a training run does. It is saved with every checkpoint."""

    data: Folder | Scenes = field(default_factory=lambda: Folder(path="photos"))
    """The pictures."""
    val: Folder | Scenes | None = None
    """Pictures with labels to be asked about while training; None: a share of every class is held back for that."""
    backbone: ViT | Timm = field(default_factory=ViT)
    """The network that is trained."""
    init: str | None = None
    """The backbone to begin with: a run's folder, a file, a released name, timm:NAME; None: random weights."""
    method: AnyMethod = field(default_factory=DINOConfig)
    """How it learns."""
    views: MultiCrop | Augment = field(default_factory=MultiCrop)
    """What the method sees of a picture."""
    optim: Optim = field(default_factory=Optim)
    """How the student moves."""
    online_eval: OnlineEval = field(default_factory=OnlineEval)
    """The accuracy measured while training, where the pictures have labels."""
    evals: tuple[ScheduledEval, ...] = ()
    """Evaluations of the network while it trains, each in quotes, as behind `dino eval` without CHECKPOINT:
    --evals "linear train/ val/" "retrieval roxford5k/ --every-epochs 10". Asked at the end; with --every-epochs before
    the first step too, and each time so many epochs have passed."""
    precision: Precision = "float32"
    """Precision of the matrix products; on cards that have TF32, float32 is that."""
    workers: int = 2
    """Processes that decode and crop, per rank; 0 does it in the training process."""
    grad_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: far less memory, a third more
    time."""
    cache: bool = False
    """Keep decoded images in memory. Worth it if they fit and decoding is the bottleneck."""
    seed: int = 0
    """Decides the weights at the start, the order of the pictures and every augmentation."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    save_minutes: float = 10
    """Minutes between two saves of checkpoints/last.pt; the end and Ctrl-C save too."""
    keep_every: int = 0
    """Epochs between two checkpoints that are kept for good; 0 keeps only the last and the best."""
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """What happens where the curves show a collapse: a warning; the end; or back to the last healthy checkpoint, and on
    from there with milder settings (docs/collapse.md)."""
    out: str = "runs/dino"
    """Folder of everything the run writes."""

    def __post_init__(self) -> None:
        check_range(self, "workers", "seed", "save_minutes", "keep_every", least=0)
        check_range(self, "log_every", least=1)
        given, needed = self.views.view_shapes[0][0], self.method.global_views
        if given < needed:
            raise UserError(
                f"{type(self.method).__name__} compares {needed} views of a picture, and {type(self.views).__name__} "
                f"gives {given}: expected views=MultiCrop(...)."
            )
        must_differ(self.evals)
        if self.optim.micro_batch and not self.method.supports_grad_accumulation:
            raise UserError(
                f"{type(self.method).__name__} brings the pictures of a batch together, so that parts of it would be "
                "another method: expected --optim.micro-batch 0, and a smaller --optim.batch-size."
            )

    def schedules(self) -> dict[str, Schedule]:
        """Return every scheduled value by the name under which it is logged."""
        rates = {"lr": self.optim.lr_schedule(), "weight_decay": self.optim.weight_decay_schedule()}
        return rates | dict(self.method.schedules())


def describe(
    run: Run,
    dataset: ImageDataset,
    rest: ImageDataset,
    baselines: Mapping[str, Mapping[str, float]],
    prototypes: int | None = None,
) -> dict[str, Any]:
    """What run.json holds: the complete Run, and what it ran on. prototypes: the method's K, where its loss has one."""
    return {
        "run": to_dict(run),
        "backbone": to_dict(run.backbone),
        "learning": run.method.about,
        "prototypes": prototypes,
        "data": {
            "images": len(dataset),
            "trained_on": len(rest),
            "classes": dataset.classes,
            "skipped": len(dataset.skipped),
            "fingerprint": rest.fingerprint,
        },
        "baselines": baselines,
        "versions": {"dino": __version__, "torch": str(torch.__version__)},
    }


def read_run(folder: Path) -> Run:
    """The Run of a run's folder. Raises UserError where there is none."""
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"No run in {folder}: it has no run.json. Expected a folder that `dino train` made.")
    try:
        return from_dict(Run, json.loads(path.read_text())["run"])
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a run's description: {error}.") from error
    except KeyError as error:
        raise UserError(f"{path} is not a run's description: it lacks {error}.") from error
