"""Fine-tuning of a trained backbone with labels (Sec. 4.2.3, Tables 6 and 11): DeiT's recipe.

`dino eval finetune CHECKPOINT TRAIN VAL --preset finetune-cifar10` replaces the preset's network by the checkpoint's.
The paper only says "the protocol of DeiT". Numbers of epochs, batch sizes and learning rates are from the authors'
later answers; other settings are DeiT's defaults, if known. DeiT's learning rates are for a batch of 512, those
of this project for 256, so `optim.lr` is half of DeiT's. Two differences: the learning rate follows its cosine per
step, not per epoch, and positions and the [CLS] token have weight decay, as in the authors' pretraining.

Results: top-1 of ViT-S/16 and ViT-B/16 after pretraining with DINO (Table 6), in percent.
"""

from dino_ssl.config import edit
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run

DEIT = Optim(warmup_epochs=5, weight_decay=0.05, weight_decay_end=0.05)
"""The settings that all recipes share."""


def finetune() -> Run:
    """Any dataset with class folders: 50 epochs, layer-wise learning rate decay. A recipe of this project."""
    return Run(
        backbone=ViT(size="small", patch=16),
        method=SupervisedConfig(),
        views=Augment(scale=(0.3, 1.0)),
        optim=edit(DEIT, epochs=50, batch_size=64, lr=1e-3, clip_grad=1.0, layer_decay=0.75),
    )


def imagenet() -> Run:
    """ImageNet-1k: 81.5 / 82.8 (Tables 6, 11; supervised from random weights 79.9 / 81.8). 300 epochs, peak lr 1e-3."""
    return edit(
        finetune(),
        views=Augment(repeats=3),
        optim=edit(DEIT, epochs=300, batch_size=1024, lr=2.5e-4, min_lr=1e-5, warmup_lr=1e-6, clip_grad=0.0),
        online_eval=dict(every_epochs=10),
        precision="float16",
        workers=10,
    )


def cifar10() -> Run:
    """CIFAR-10 at 224 px: 99.0 / 99.1. 1000 epochs, batch 768, DeiT's lr 7.5e-6; the final lr is our choice."""
    optim = dict(epochs=1000, batch_size=768, lr=3.75e-6, min_lr=1e-6)
    return edit(imagenet(), views=dict(erase=0.0), optim=optim)


def cifar100() -> Run:
    """CIFAR-100 at 224 px: 90.5 / 91.7. As CIFAR-10, with DeiT's lr 5e-6 (stated for ViT-B)."""
    return edit(cifar10(), optim=dict(lr=2.5e-6))


def flowers() -> Run:
    """Oxford Flowers-102: 98.5 / 98.8. As CIFAR-10: DeiT's lr 7.5e-6, 1000 epochs (iBOT's script for this table)."""
    return cifar10()


def cars() -> Run:
    """Stanford Cars: 93.0 / 93.0. As Flowers, with DeiT's lr 7.5e-5 (iBOT's script for this table)."""
    return edit(cifar10(), optim=dict(lr=3.75e-5))


def inat18() -> Run:
    """For iNaturalist 2018: 72.0 / 72.6. 300 epochs, 128 images on each of 8 GPUs, DeiT's lr 5e-5, erasing 0.25."""
    return edit(imagenet(), optim=dict(lr=2.5e-5))


def inat19() -> Run:
    """For iNaturalist 2019: 78.2 / 78.6. As 2018 (iBOT's script uses DeiT's lr 2.5e-5 for ViT-S and 360 epochs)."""
    return inat18()
