"""Presets of this project for a laptop: thousands of images, a few cores, minutes to hours.

With few steps, DINO has one main failure: the student cannot predict the teacher yet and outputs the mean, the teacher
converges to the same output, and the loss stays at ln K. Many small crops instead of few large ones, a low EMA
momentum, and batch norm in the head prevent this (experiments in LOG.md).
"""

from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import SIMPLE_SCENES
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run


def small_vit() -> Run:
    """ViT-tiny with 6 blocks for thousands of images: attention maps, at several times the cost of `small`."""
    return Run(
        backbone=ViT(size="tiny", patch=16, image_size=96, drop_path=0.0, depth=6),
        method=DINOConfig(out_dim=1024, momentum=0.99, head_hidden=1024),
        views=MultiCrop(global_size=96, local_size=48, local=4),
        optim=Optim(epochs=100, batch_size=64, lr=1e-3, warmup_epochs=5, weight_decay=0.04, weight_decay_end=0.04),
        workers=1,
    )


def small() -> Run:
    """ResNet-10-T of half the width on crops of 48 and 24 pixels: the base of `dino train` on a CPU.

    20-NN on ten classes of 6,500 photos: 63 % after half an hour of two AVX2 cores, 72 % after a million images
    (random weights 35 to 37; docs/results.md). It finds cropped copies of images, but raw pixels are better for copies
    with other strong edits (mAP 55, `small` 43; docs/evaluations.md): `dino duplicates` compares hashes first.

    With batch norm in the head the teacher's outputs differ between images from the first step on. With momentum 0.97
    the teacher catches up with the student within a hundred steps. Images are evaluated at 80 pixels: objects are
    larger in crops than in whole images (20-NN with half the color jitter after 123,000 images: 46 % at 66 pixels, 50 %
    at 80; LOG.md). The shortcuts of the -T variant average before they reduce the resolution, instead of sampling with
    a stride of 2: 44 % instead of 39 after 26,000 images. Its stem of three small convolutions is 1.15 times as fast.
    """
    crops = dict(global_size=48, local_size=24, global_scale=(0.3, 1.0), local_scale=(0.08, 0.4))
    head = dict(head_norm="batch", head_hidden=512, head_bottleneck=128)
    return edit(
        small_vit(),
        backbone=Timm(name="resnet10t", args=(("channels", "(32, 64, 128, 256)"), ("stem_width", "16"))),
        method=dict(momentum=0.97, freeze_last_layer=0, **head),
        views=dict(blur_sigma=(0.03, 0.5), **crops),
        optim=dict(lr=4e-3, min_lr=1e-5, warmup_epochs=2),
        online_eval=dict(size=80),
    )


def narrow_vit() -> Run:
    """ViT of 4 blocks and width 128, patches of 8 px: attention maps on a CPU, 61 % 20-NN after 323,000 images.

    On the images of `small`, the mean of three seeds (random weights 32 %; docs/results.md). Its stem of convolutions
    is not the paper's: with linear patches it had 40 % after 149,000.
    """
    return edit(
        small(),
        backbone=ViT(size="tiny", patch=8, image_size=48, drop_path=0.0, width=128, heads=4, depth=4, stem="conv"),
        views=dict(local_scale=(0.05, 0.3)),
        optim=dict(lr=3e-3),
        online_eval=dict(size=64),
    )


def demo() -> Run:
    """ViT of 2 blocks on simple synthetic scenes, minutes on two cores: 87 to 90 % 20-NN over five seeds.

    For `make demo`; raw pixels have 34 %, random weights 28 to 35 (docs/benchmarks). All images have the same two
    colors, so that colors are augmented little. Final learning rate and momentum are for less than a thousand steps.
    """
    crops = dict(global_size=32, local_size=16, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))
    jitter = dict(
        jitter=1.0, brightness=0.0, contrast=0.1, saturation=0.1, hue=0.02, gray=0.0, solarize=(0.0, 0.0, 0.0)
    )
    return edit(
        narrow_vit(),
        data=edit(SIMPLE_SCENES, count=3000),
        backbone=ViT(size="tiny", patch=4, image_size=32, drop_path=0.0, width=64, heads=2, depth=2),
        method=dict(out_dim=256, head_hidden=256, head_bottleneck=64, momentum_end=0.99),
        views=dict(**crops, **jitter),
        optim=dict(epochs=21, lr=4e-3, min_lr=2.5e-4, warmup_epochs=1),
        online_eval=dict(every_epochs=3, size=None),
        cache=True,
    )


def vit_tiny() -> Run:
    """ViT-tiny/16 at 2x128 + 6x64 with K 4096: the fixed network and crops of the benchmarks."""
    return edit(
        small_vit(),
        backbone=ViT(size="tiny", patch=16, image_size=128, drop_path=0.0),
        method=dict(out_dim=4096, momentum=0.98, head_norm="batch", head_hidden=1024, freeze_last_layer=0),
        views=MultiCrop(global_size=128, local_size=64, local=6),
        optim=dict(batch_size=32, lr=4e-3, warmup_epochs=0.5),
    )
