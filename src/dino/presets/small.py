"""Recipes of this project for a laptop: thousands of pictures, a few cores, minutes to hours."""

from dino.config import edit
from dino.data.scenes import Scenes
from dino.data.views import MultiCrop
from dino.evals.knn import KNN
from dino.methods.dino import DINOConfig
from dino.models.vit import ViT
from dino.optim import Optim
from dino.training import Run


def small() -> Run:
    """A small ViT for thousands of pictures on a CPU. `dino train` starts from it there."""
    return Run(
        backbone=ViT(size="tiny", patch=16, image_size=96, drop_path=0.0, depth=6),
        method=DINOConfig(out_dim=1024, momentum=0.99, head_hidden=1024),
        views=MultiCrop(global_size=96, local_size=48, local=4),
        optim=Optim(epochs=100, batch_size=64, lr=1e-3, warmup_epochs=5, weight_decay=0.04, weight_decay_end=0.04),
        workers=1,
        out="runs/small",
    )


def demo() -> Run:
    """`make demo`: drawn pictures, a few minutes on two cores."""
    return edit(
        small(),
        data=Scenes(count=2000, size=96),
        knn=KNN(every_epochs=5),
        out="runs/demo",
    )
