"""What the training benchmarks train: networks, crops and K by name, and whoever does the step."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods.dino import DINO, DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.profiling.roofline import roofline
from dino_ssl.run import Run
from dino_ssl.runtime import Machine
from dino_ssl.schedules import Clock
from dino_ssl.state import build_method
from lightly_dino import LightlyDINO
from plain import BuildContext, PlainDINO, Rates

NETWORKS: dict[str, ViT | Timm] = {
    "vit_tiny": ViT(size="tiny", patch=16),
    "vit_small": ViT(size="small", patch=16),
    "vit_small_8": ViT(size="small", patch=8),
    "vit_base": ViT(size="base", patch=16),
    "resnet50": Timm(name="resnet50"),
    "narrow": ViT(patch=8, width=16, depth=2, heads=2, image_size=56),
    "resnet_narrow": Timm(name="resnet10t", args=(("channels", "(8, 8, 16, 16)"), ("stem_width", "4"))),
}
"""The last two are for tests of the benchmarks."""
CLOCK = Clock(10_000, 1_000, 100)
"""Past the warm-up, and past the epoch in which the prototypes stand still: every parameter moves."""


@dataclass(frozen=True)
class Work:
    """One line of a benchmark, but for who does it."""

    network: str
    views: str
    k: int
    batch: int
    drop_path: float
    hidden: int = 2048
    """Width of the head's hidden layers."""
    micro_batch: int = 0
    """Pictures that pass at once in ours; 0: all of a batch."""

    def run(self, precision: Any) -> Run:
        """The settings of ours, complete."""
        backbone = edit(NETWORKS[self.network], drop_path=self.drop_path) if self.is_vit else NETWORKS[self.network]
        optim = dict(batch_size=self.batch, epochs=CLOCK.epochs, micro_batch=self.micro_batch)
        run = Run(backbone=backbone, method=self.method, views=crops_of(self.views), precision=precision)
        return edit(run, optim=optim, online_eval=dict(every_epochs=0))

    @property
    def method(self) -> DINOConfig:
        return DINOConfig(out_dim=self.k, head_hidden=self.hidden)

    @property
    def is_vit(self) -> bool:
        return isinstance(NETWORKS[self.network], ViT)

    def peer(self, kind: str, precision: str, device: torch.device) -> PlainDINO | LightlyDINO:
        """The plain version or lightly's, with the weights that ours begins with."""
        method = build_method(self.run("float32"))
        assert isinstance(method, DINO)
        begin = BuildContext(NETWORKS[self.network], self.k, device, precision, self.drop_path, self.hidden)
        return {"plain": PlainDINO, "lightly": LightlyDINO}[kind](begin, method.student.state_dict())

    def throughput(self) -> Rates:
        """What ours has at `CLOCK`, for the others."""
        optim = self.run("float32").optim
        return Rates(
            lr=optim.lr_schedule()(CLOCK),
            weight_decay=optim.weight_decay_schedule()(CLOCK),
            momentum=self.method.momentum_schedule()(CLOCK),
            teacher_temp=self.method.teacher_temp_schedule()(CLOCK),
        )

    def arguments(self) -> list[str]:
        """What a child process is told."""
        told = {"--network": self.network, "--views": self.views, "--k": self.k, "--batch": self.batch}
        told |= {"--drop-path": self.drop_path, "--hidden": self.hidden, "--micro-batch": self.micro_batch}
        return [str(word) for pair in told.items() for word in pair]


def with_shares(rows: Sequence[dict[str, Any]], work: Work, rate: float) -> list[dict[str, Any]]:
    """The rows with `rate_share`: the operations a second that the step cannot do without (`dino_ssl.profiling.roofline`), over
    `rate`, those that the device does in matrix products alone."""
    flops = roofline(work.run("float32"), work.batch).flops
    return [row if "failed" in row else row | {"rate_share": row["images_per_s"] * flops / rate} for row in rows]


def matrix_rate(here: Machine) -> float | None:
    """Operations a second in products of bfloat16 (float16 where there is none), measured now; None on a CPU."""
    if here.device.type != "cuda":
        return None
    from dino_ssl.profiling import throughput

    return throughput.matrix_rate(here, here.precision, lambda done, total: None).per_second


def crops_of(text: str) -> MultiCrop:
    """`2x224+8x96`: two global views of 224 pixels, eight local ones of 96; `2x224` has no local ones."""
    found = re.fullmatch(r"2x(\d+)(?:\+(\d+)x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected views like 2x224+8x96, got {text!r}")
    size, local, local_size = found.groups()
    return MultiCrop(global_size=int(size), local=int(local or 0), local_size=int(local_size or 96))


def views_text(text: str) -> str:
    crops_of(text)
    return text


def add_options(parser: argparse.ArgumentParser, **usual: Any) -> None:
    """The options of `Work`, with these defaults."""
    parser.add_argument("--network", choices=list(NETWORKS), default=usual["network"])
    parser.add_argument("--views", type=views_text, default=usual["views"], help="like 2x224+8x96")
    parser.add_argument("--k", type=int, default=usual["k"], help="prototypes")
    parser.add_argument("--batch", type=int, default=usual["batch"], help="pictures a step")
    parser.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of a ViT's student")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the head's hidden layers")
    parser.add_argument("--micro-batch", type=int, default=0, help="pictures that pass at once in ours; 0: all")
    parser.add_argument("--versions", nargs="+", metavar="KIND:PRECISION", help="plain, dino or lightly : float32, ...")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", metavar="VERSION", help=argparse.SUPPRESS)


def work_of(options: argparse.Namespace) -> Work:
    names = ("network", "views", "k", "batch", "drop_path", "hidden", "micro_batch")
    return Work(**{name: getattr(options, name) for name in names})
