"""The Runs that the tables' rows are edits of, and the changes that several tables share.

Scale paper: the text gives one protocol for all ablations, "ViT-S/16 on ImageNet", and not every setting. What stands
here is read from the figures themselves. Table 7's first row (72.8 / 76.1 after 300 epochs) is Table 8's row with 10
local crops; the 69.7 of the appendix's tables after 100 epochs is what App. E measured with 6 local crops at the same
scales. All other settings are the authors' recipe of 300 epochs.

Scale small: every row sees SEEN pictures, whatever the data set, which is about ten minutes on one core of a
processor with AVX2. `dino ablate TABLE --minutes` and `--epochs` take another length.
"""

from collections.abc import Callable

from dino_ssl.ablations.table import Changes
from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals.online import OnlineEval
from dino_ssl.presets.paper import vits16_300
from dino_ssl.presets.small import narrow_vit, small
from dino_ssl.run import Run

SEEN = 65_000
"""Pictures that a row of scale small sees, in whole epochs."""
EPOCHS = 10
"""The same for the 6,500 pictures of Imagenette at 128 px; `dino ablate` counts anew for other data."""
MEASURED = 5
"""Times that a row of scale small is measured on its way."""


def vit_300() -> Run:
    """ViT-S/16, 300 epochs, 2 + 10 crops, batch 1024: Tables 7, 13, 14, 15, Figs. 5 and 6."""
    return edit(
        vits16_300(),
        views=MultiCrop(local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)),
        online_eval=OnlineEval(every_epochs=10),
    )


def vit_100() -> Run:
    """ViT-S/16, 100 epochs, 2 + 6 crops, batch 1024: the tables of App. C, D and E."""
    return edit(vit_300(), optim=dict(epochs=100), views=dict(local=6))


def conv() -> Run:
    """`small()` on crops of 48 and 24 pixels: most rows at scale small."""
    run = edit(small(), optim=dict(epochs=100, warmup_epochs=2), views=dict(global_size=48, local_size=24))
    return length(edit(run, online_eval=dict(size=66, every_epochs=100 / MEASURED)), EPOCHS)


def narrow() -> Run:
    """`narrow_vit()` on the same crops, 36 + 9 patches: the tables that are about ViTs, at scale small."""
    vit = narrow_vit()
    return edit(conv(), backbone=vit.backbone, optim=dict(lr=vit.optim.lr), online_eval=dict(size=vit.online_eval.size))


def length(run: Run, epochs: int) -> Run:
    """The run at so many epochs: a warm-up of at most a tenth of them, and as many evaluations as it had."""
    every = run.online_eval.every_epochs * epochs / run.optim.epochs
    return edit(
        run,
        optim=dict(epochs=epochs, warmup_epochs=min(run.optim.warmup_epochs, 0.1 * epochs)),
        online_eval=dict(every_epochs=max(1.0, float(round(every))) if every else 0),
    )


def longer(times: float) -> Callable[[Run], Changes]:
    """So many times the base's epochs; the warm-up stays as it is."""
    return lambda run: {"optim": {"epochs": max(1, round(times * run.optim.epochs))}}


NO_MULTI_CROP = {"views": {"local": 0, "global_scale": (0.14, 1.0)}}
"""The two global views alone; they then cover 14 to 100 % of a picture, as the authors gave it."""
