"""A run's settings, whole: one value that says what a training run does, is saved with it, and can be read back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dino import __version__
from dino.config import from_dict, to_dict
from dino.data.augment import Augment
from dino.data.folder import Folder
from dino.data.pictures import Pictures
from dino.data.scenes import Scenes
from dino.data.views import MultiCrop
from dino.errors import UserError, must_lie
from dino.evals.ask import Ask, must_differ
from dino.evals.watch import Watch
from dino.methods import AnyMethod
from dino.methods.dino import DINOConfig
from dino.models.timm import Timm
from dino.models.vit import ViT
from dino.optim import Optim
from dino.runtime import Cache, Precision


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
    knn: Watch = field(default_factory=Watch)
    """The accuracy measured while training, where the pictures have labels."""
    evals: tuple[Ask, ...] = ()
    """Evaluations of the network while it trains, each in quotes, as behind `dino eval` without CHECKPOINT:
    --evals "linear train/ val/" "retrieval roxford5k/ --every-epochs 10". Asked at the end; with --every-epochs before
    the first step too, and each time so many epochs have passed."""
    precision: Precision = "float32"
    """Precision of the matrix products; on cards that have TF32, float32 is that."""
    workers: int = 2
    """Processes that decode and crop, per rank; 0 does it in the training process."""
    recompute: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: far less memory, a third more
    time."""
    cache: Cache = "no"
    """Where the decoded pictures stay: no: they are read anew each time; memory: worth it where they fit and reading
    one is slow; device: in memory and on the device that trains, which then makes the views itself, many at once."""
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
        must_lie(self, "workers", "seed", "save_minutes", "keep_every", least=0)
        must_lie(self, "log_every", least=1)
        if self.cache not in get_args(Cache):
            raise UserError(f"cache: expected one of {', '.join(get_args(Cache))}; got {self.cache!r}.")
        if self.cache == "device" and not isinstance(self.views, MultiCrop):
            raise UserError(
                f"cache device makes the views of MultiCrop alone, and this run has {type(self.views).__name__}: "
                "expected --cache memory or --cache no."
            )
        given, needed = self.views.stacks[0][0], self.method.global_views
        if given < needed:
            raise UserError(
                f"{type(self.method).__name__} compares {needed} views of a picture, and {type(self.views).__name__} "
                f"gives {given}: expected views=MultiCrop(...)."
            )
        must_differ(self.evals)
        if self.optim.micro_batch and not self.method.in_parts:
            raise UserError(
                f"{type(self.method).__name__} brings the pictures of a batch together, so that parts of it would be "
                "another method: expected --optim.micro-batch 0, and a smaller --optim.batch-size."
            )

    @staticmethod
    def from_older(fields: dict[str, Any]) -> dict[str, Any]:
        """Older runs kept their pictures in memory or did not."""
        cache = fields.get("cache")
        return fields | {"cache": "memory" if cache else "no"} if isinstance(cache, bool) else fields


def describe(
    run: Run,
    pictures: Pictures,
    rest: Pictures,
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
            "pictures": len(pictures),
            "trained_on": len(rest),
            "classes": pictures.classes,
            "skipped": len(pictures.skipped),
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
