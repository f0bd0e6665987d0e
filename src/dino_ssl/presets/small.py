"""Recipes of this project for a laptop: thousands of pictures, a few cores, minutes to hours.

With few steps DINO fails in one way above all: the student cannot predict the teacher yet, answers the mean of
everything, the teacher follows, and the loss stays at ln K. What helped (LOG.md has the trials): many cheap pictures
instead of few dear ones, a teacher that follows quickly, and batch norm in the head.
"""

from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import HERDS
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals.online import OnlineEval
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run


def small() -> Run:
    """A ResNet-10 of half the width on small crops; `dino train` starts from it on a CPU.

    On 6,500 photos of ten classes (Imagenette at 128 px), from nothing, one thread: 20-NN accuracy 52 % after 30
    minutes, 62 % after 60, 65 % after 110; random weights 26 %, raw pixels 36 %. Batch norm in the head makes the
    teacher's answers differ from the first step on; at momentum 0.97 it passes on within a hundred steps what the
    student learns.
    """
    return Run(
        backbone=Timm(name="resnet18", args=(("channels", "(32, 64, 128, 256)"), ("layers", "(1, 1, 1, 1)"))),
        method=DINOConfig(
            out_dim=1024,
            momentum=0.97,
            head_norm="batch",
            head_hidden=512,
            head_bottleneck=128,
            freeze_last_layer=0,
        ),
        views=MultiCrop(
            global_size=64,
            local_size=32,
            local=4,
            global_scale=(0.3, 1.0),
            local_scale=(0.05, 0.3),
            blur_sigma=(0.03, 0.5),
        ),
        optim=Optim(
            epochs=100,
            batch_size=64,
            lr=4e-3,
            min_lr=1e-5,
            warmup_epochs=2,
            weight_decay=0.04,
            weight_decay_end=0.04,
        ),
        online_eval=OnlineEval(size=88),
        workers=1,
        out="runs/small",
    )


FULL_SCHEDULE_STEPS = 8000
"""Steps that the usual ends of rate and momentum are for: two hours on two cores."""


def short_schedule(run: Run, steps: int) -> Run:
    """`small`, or a run like it, for fewer steps than that: it has no time to settle in.

    The rate sinks to a half, and the teacher goes on following: 53.4 % of the photos above after half an hour and 180
    thousand pictures, where the usual ends give 44.9 (LOG.md).
    """
    method = run.method.for_few_steps()
    if steps >= FULL_SCHEDULE_STEPS or method is None:
        return run
    peak = run.optim.lr * run.optim.batch_size / 256
    return edit(run, method=method, optim=dict(min_lr=peak / 2))


def small_vit() -> Run:
    """A ViT-tiny of 6 blocks for thousands of pictures: attention maps, at several times the ConvNet's cost."""
    return Run(
        backbone=ViT(size="tiny", patch=16, image_size=96, drop_path=0.0, depth=6),
        method=DINOConfig(out_dim=1024, momentum=0.99, head_hidden=1024),
        views=MultiCrop(global_size=96, local_size=48, local=4),
        optim=Optim(epochs=100, batch_size=64, lr=1e-3, warmup_epochs=5, weight_decay=0.04, weight_decay_end=0.04),
        workers=1,
        out="runs/small-vit",
    )


def narrow_vit() -> Run:
    """A ViT of 4 blocks, 128 wide, patches of 8 on crops of 48: attention maps from a CPU, at the ConvNet's cost.

    On the same photos and from less than one core: 37 % after 30 minutes and 40 % after 50; random weights 29 %.
    """
    return edit(
        small(),
        backbone=ViT(size="tiny", patch=8, image_size=48, drop_path=0.0, width=128, heads=4, depth=4),
        views=dict(global_size=48, local_size=24),
        optim=dict(lr=3e-3),
        online_eval=dict(size=64),
        out="runs/narrow-vit",
    )


def demo() -> Run:
    """Drawn herds, four minutes on two cores: what `make demo` trains.

    20-NN rises above raw pixels: to 35 to 54 %, by chance, where they have 26. Hues are turned freely, so that the
    coats are what crops share; rate and momentum stay far from their usual ends, since a few hundred steps are no time
    to settle in.
    """
    return edit(
        narrow_vit(),
        data=edit(HERDS, count=3000),
        backbone=ViT(size="tiny", patch=4, image_size=32, drop_path=0.0, width=96, heads=3, depth=3),
        method=dict(out_dim=256, head_hidden=256, head_bottleneck=64, momentum_end=0.99),
        views=MultiCrop(
            global_size=32,
            local_size=16,
            local=4,
            global_scale=(0.4, 1.0),
            local_scale=(0.1, 0.4),
            blur_sigma=(0.03, 0.5),
            jitter=1.0,
            brightness=0.4,
            contrast=0.2,
            saturation=0.1,
            hue=0.5,
            solarize=(0.0, 0.0, 0.0),
        ),
        optim=dict(epochs=11, lr=4e-3, min_lr=2.5e-4),
        online_eval=OnlineEval(every_epochs=2),
        cache=True,
        out="runs/demo",
    )


def vit_tiny() -> Run:
    """ViT-tiny/16 at 2x128 + 6x64 with K 4096: the benchmark's fixed network and crops."""
    return edit(
        small_vit(),
        backbone=ViT(size="tiny", patch=16, image_size=128, drop_path=0.0),
        method=dict(out_dim=4096, momentum=0.98, head_norm="batch", head_hidden=1024, freeze_last_layer=0),
        views=MultiCrop(global_size=128, local_size=64, local=6),
        optim=dict(batch_size=32, lr=4e-3, warmup_epochs=0.5),
        out="runs/vit-tiny",
    )


RECIPES = {"vit-tiny": vit_tiny, "small": small, "small-vit": small_vit, "narrow-vit": narrow_vit}
"""What benchmarks/time_to_accuracy.py compares."""
