"""The paper's baselines with ViT-S/16 on ImageNet-1k. Results: 20-NN / linear top-1 on the validation set, in percent.

The authors ran them but did not release them. They reported for MoCo-v2: temperature 0.1, momentum 0.996 to 1, a queue
of 65536, DINO's learning rate, a constant weight decay of 0.05, no clipping, a head of 3 layers with batch norm and 256
outputs. For BYOL: a search over learning rates and weight decays (0.02, 0.05, 0.1) without its result. For SwAV
nothing. Unknown settings are DINO's, except those of the heads, which are from the original publications.
"""

from dino_ssl.config import edit
from dino_ssl.methods import BYOLConfig, MoCoConfig, SwAVConfig
from dino_ssl.presets.paper import vits16_300
from dino_ssl.run import Run


def byol() -> Run:
    """BYOL, 300 epochs, batch 1024, two views: 66.6 / 71.4 (Tables 2, 7, 13). With 6 local crops 59.8 / 64.8."""
    return edit(moco(), method=BYOLConfig())


def moco() -> Run:
    """MoCo-v2, 300 epochs, batch 1024, two views with the authors' scale: 62.0 / 71.6 (Tables 7, 13).

    With 6 local crops 65.4 / 73.4; after 800 epochs 64.4 / 72.7 (Table 2).
    """
    return edit(
        vits16_300(),
        method=MoCoConfig(),
        views=dict(local=0, global_scale=(0.14, 1.0)),
        optim=dict(weight_decay=0.05, weight_decay_end=0.05, clip_grad=0.0),
    )


def swav() -> Run:
    """SwAV, 300 epochs, batch 1024, 6 local crops: 64.7 / 71.8 (Tables 7, 13).

    Without local crops 60.5 / 68.5; after 800 epochs 66.3 / 73.5 (Table 2).
    """
    return edit(vits16_300(), method=SwAVConfig(), views=dict(local=6))
