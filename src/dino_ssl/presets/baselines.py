"""The paper's baselines at ViT-S/16, for ImageNet-1k. Figures: 20-NN / linear top-1 on its validation part, in percent.

The authors ran them themselves and did not release them. What they said of MoCo-v2: temperature 0.1, momentum 0.996 to
1, a queue of 65536, DINO's learning rate, a constant weight decay of 0.05, no clipping, a head of 3 layers with batch
norm and 256 outputs. Of BYOL: a search over rates and decays (0.02, 0.05, 0.1), whose choice is not known; of SwAV
nothing. What is not known is DINO's here, and in the heads the publications' own.
"""

from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods import BYOLConfig, MoCoConfig, SwAVConfig
from dino_ssl.presets.paper import vits16_300
from dino_ssl.run import Run

TWO_VIEWS = MultiCrop(local=0, global_scale=(0.14, 1.0))
"""The authors' crops where there are no local ones."""


def byol() -> Run:
    """BYOL, ViT-S/16, 300 epochs, batch 1024, two views: 66.6 / 71.4 (Tables 2, 7, 13); with 6 local crops 59.8 /
    64.8."""
    return edit(moco(), method=BYOLConfig(), out="runs/byol")


def moco() -> Run:
    """MoCo-v2, ViT-S/16, 300 epochs, batch 1024, two views: 62.0 / 71.6 (Tables 7, 13); with 6 local crops 65.4 / 73.4;
    800 epochs 64.4 / 72.7 (Table 2)."""
    return edit(
        vits16_300(),
        method=MoCoConfig(),
        views=TWO_VIEWS,
        optim=dict(weight_decay=0.05, weight_decay_end=0.05, clip_grad=0.0),
        out="runs/moco",
    )


def swav() -> Run:
    """SwAV, ViT-S/16, 300 epochs, batch 1024, 6 local crops: 64.7 / 71.8 (Tables 7, 13); without them 60.5 / 68.5; 800
    epochs 66.3 / 73.5 (Table 2)."""
    return edit(vits16_300(), method=SwAVConfig(), views=dict(local=6), out="runs/swav")
