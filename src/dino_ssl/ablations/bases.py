"""Base Runs of the tables.

Scale paper: the paper gives one protocol for all ablations, "ViT-S/16 on ImageNet", but not every setting. The rest is
inferred from the results. The first line of Table 7 (72.8 / 76.1 after 300 epochs) equals the line of Table 8 with 10
local crops. The 69.7 after 100 epochs in the appendix is the result of App. E with 6 local crops at the same scales.
All other settings are the authors' recipe of 300 epochs.

Scale small: every run sees IMAGES_SEEN images, whatever the size of the dataset: about ten minutes on one core of a CPU
with AVX2. `dino ablate TABLE --minutes` and `--epochs` change the length.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals.online import OnlineEval
from dino_ssl.presets.paper import vits16_300
from dino_ssl.presets.plan import fit_schedule, short_schedule
from dino_ssl.presets.small import narrow_vit, small
from dino_ssl.run import Run

Changes = Mapping[str, Any]
"""Keyword arguments of `edit`: fields of a Run; a nested mapping changes fields of a nested value."""

IMAGES_SEEN = 65_000
"""Training images per run at scale small, rounded to complete epochs."""
NUM_EVALS = 5
"""Evaluations during a run at scale small."""


def vit_300(local: int = 10) -> Run:
    """Return the base of Tables 7, 13, 14, 15, Figs. 5 and 6: ViT-S/16, 300 epochs, 2 + 10 crops, batch 1024."""
    return edit(
        vits16_300(),
        views=MultiCrop(local=local, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)),
        online_eval=OnlineEval(every_epochs=10),
    )


def vit_100(local: int = 6) -> Run:
    """Return the base of the tables of App. C, D and E: ViT-S/16, 100 epochs, 2 + 6 crops, batch 1024."""
    return edit(vit_300(local), optim=dict(epochs=100))


def conv() -> Run:
    """Return the base of most tables at scale small: `small()` with the schedules of short runs, whatever its length.

    Twice the learning rate is better for 65,000 images: 53.8 instead of 50.6 % on held-out training images
    (docs/ablations/learning_rates-table7.json).
    """
    run = edit(small(), optim=dict(lr=8e-3))
    run = short_schedule(run, IMAGES_SEEN // run.optim.batch_size)
    return scale_length(edit(run, online_eval=dict(every_epochs=run.optim.epochs / NUM_EVALS)), 10)  # of Imagenette


def narrow() -> Run:
    """Return the base of the tables about ViTs at scale small: `conv()` with a ViT and the paper's patch embedding."""
    vit = narrow_vit()
    backbone = edit(vit.backbone, stem="patch")
    run = edit(conv(), backbone=backbone, online_eval=dict(size=vit.online_eval.size))
    return edit(run, **learning_rate(vit.optim.lr)(run))


def learning_rate(rate: float) -> Callable[[Run], Changes]:
    """Return a change of the peak of the learning rate, per 256 images, and of its final value by the same factor."""
    return lambda run: {"optim": {"lr": rate, "min_lr": run.optim.min_lr * rate / run.optim.lr}}


def scale_length(run: Run, epochs: int) -> Run:
    """Return the run with another number of epochs, a shorter warm-up if needed, and as many evaluations as before."""
    every = run.online_eval.every_epochs * epochs / run.optim.epochs
    return edit(fit_schedule(run, epochs), online_eval=dict(every_epochs=max(1.0, float(round(every))) if every else 0))


def longer(factor: float, changes: Changes) -> Callable[[Run], Changes]:
    """Return these changes with a multiple of the base's epochs; the warm-up stays the same."""
    optim = changes.get("optim", {})
    return lambda run: {**changes, "optim": {**optim, "epochs": max(1, round(factor * run.optim.epochs))}}
