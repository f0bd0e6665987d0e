"""The workloads of the training benchmarks, and the comparison of all versions of a training step.

A version is KIND:PRECISION, e.g. `plain:float32` or `dino:bfloat16`. `dino` is this package, `compiled` the same with
compiled blocks (`train_step.py`), `plain` the published step (`plain.py`), `lightly` the package of that name
(`lightly_dino.py`).
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

import lightly_dino
from common import about, print_rows, run_in_turns, save, summarize
from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods.dino import DINO, DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.presets.small import small
from dino_ssl.profiling.roofline import count_flops, matmul_throughput
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, machine
from dino_ssl.schedules import Clock
from dino_ssl.state import build_method
from lightly_dino import LightlyDINO
from plain import PlainDINO, Setup, StepSettings

NETWORKS: dict[str, ViT | Timm] = {
    "vit_tiny": ViT(size="tiny", patch=16),
    "vit_small": ViT(size="small", patch=16),
    "vit_small_8": ViT(size="small", patch=8),
    "vit_base": ViT(size="base", patch=16),
    "resnet50": Timm(name="resnet50"),
    "small": cast(Timm, small().backbone),
    "narrow": ViT(patch=8, width=16, depth=2, heads=2, image_size=56),
    "resnet_narrow": Timm(name="resnet10t", args=(("channels", "(8, 8, 16, 16)"), ("stem_width", "4"))),
}
"""The last two are for tests of the benchmarks."""
CLOCK = Clock(10_000, 1_000, 100)
"""After warm-up and after the epochs in which the last layer is frozen."""


@dataclass(frozen=True)
class Workload:
    """Network, views, prototypes and batch of a training step."""

    network: str
    views: str
    k: int
    batch: int
    drop_path: float
    hidden: int = 2048
    """Width of the head's hidden layers."""
    micro_batch: int = 0
    """Images per micro-batch of our step; 0: the whole batch."""

    def run(self, precision: Any) -> Run:
        """Return the settings of our training run."""
        backbone = NETWORKS[self.network]
        if self.is_vit:
            backbone = edit(backbone, drop_path=self.drop_path)
        optim = dict(batch_size=self.batch, epochs=CLOCK.epochs, micro_batch=self.micro_batch)
        run = Run(backbone=backbone, method=self.method, views=parse_views(self.views), precision=precision)
        return edit(run, optim=optim, online_eval=dict(every_epochs=0))

    @property
    def method(self) -> DINOConfig:
        return DINOConfig(out_dim=self.k, head_hidden=self.hidden)

    @property
    def is_vit(self) -> bool:
        return isinstance(NETWORKS[self.network], ViT)

    def baseline(self, kind: str, precision: str, device: torch.device) -> PlainDINO | LightlyDINO:
        """Return the plain or lightly's version, with our initial weights."""
        method = build_method(self.run("float32"))
        assert isinstance(method, DINO)
        setup = Setup(NETWORKS[self.network], self.k, device, precision, self.drop_path, self.hidden)
        return {"plain": PlainDINO, "lightly": LightlyDINO}[kind](setup, method.student.state_dict())

    def step_settings(self) -> StepSettings:
        """Return the values of our schedules at CLOCK."""
        optim = self.run("float32").optim
        return StepSettings(
            lr=optim.lr_schedule()(CLOCK),
            weight_decay=optim.weight_decay_schedule()(CLOCK),
            momentum=self.method.momentum_schedule()(CLOCK),
            teacher_temp=self.method.teacher_temp_schedule()(CLOCK),
        )

    def arguments(self) -> list[str]:
        """Return the command line of a child process."""
        options = {"--network": self.network, "--views": self.views, "--k": self.k, "--batch": self.batch}
        options |= {"--drop-path": self.drop_path, "--hidden": self.hidden, "--micro-batch": self.micro_batch}
        return [str(word) for pair in options.items() for word in pair]


def compare(
    script: str, options: argparse.Namespace, arguments: Sequence[str], num_images: int, columns: dict[str, str]
) -> None:
    """Run all versions interleaved, print the table and save the JSON.

    arguments: of the child process besides the workload's. num_images: images in an entry's `seconds`.
    """
    workload, console, device_info = workload_of(options), Console(), machine()
    versions = available(options.versions or default_versions(device_info), console)
    entries = run_in_turns(script, versions, options.turns, [*workload.arguments(), *arguments])
    rows, peak = summarize(entries, num_images), None
    if device_info.device.type == "cuda":  # after the turns, when nothing else runs on the GPU
        peak = matmul_throughput(device_info.device, device_info.precision)[0]
        rows = with_matmul_share(rows, workload, peak)
        columns = columns | {"matmul_share": "% of matmul throughput"}
    description = about(vars(options))
    title = f"{workload.network}, {workload.views}, K {workload.k}, batch {workload.batch}: {description['machine']}"
    print_rows(rows, title, console, **columns)
    result = {"benchmark": Path(script).stem, **description, "matmul_flops_per_s": peak, "rows": rows}
    save(options.json, result)


@cache
def flops_per_image(workload: Workload) -> float:
    """Return the FLOPs of a step for one image; counting takes a second, and `gpu.py` asks after every version."""
    return sum(count_flops(workload.run("float32")).values())


def with_matmul_share(rows: Sequence[dict[str, Any]], workload: Workload, flops_per_s: float) -> list[dict[str, Any]]:
    """Return the rows with `matmul_share`: FLOP/s of the step (`count_flops`) over the device's matmul throughput."""
    flops = flops_per_image(workload)
    return [
        row
        if "failed" in row or row["version"] == "loader"
        else row | {"matmul_share": row["images_per_s"] * flops / flops_per_s}
        for row in rows
    ]


def default_versions(device_info: Machine) -> list[str]:
    """Return the versions that are compared by default, in the precisions of this machine; plain first."""
    match device_info.device.type, device_info.precision:
        case "cuda", precision:
            bfloat16 = ["bfloat16"] if precision == "bfloat16" else []
            plain = ["plain:float16", "plain:float32", *(f"plain:{name}" for name in bfloat16)]
            return [*plain, f"dino:{precision}", "lightly:float16", *(f"lightly:{name}" for name in bfloat16)]
        case _, "bfloat16":
            return ["plain:float32", "plain:bfloat16", "dino:float32", "dino:bfloat16", "lightly:bfloat16"]
    return ["plain:float32", "dino:float32", "lightly:float32"]


def available(versions: Sequence[str], console: Console) -> list[str]:
    """Return the versions that are installed."""
    if any(version.startswith("lightly") for version in versions) and not lightly_dino.is_installed():
        console.print("lightly is skipped: it is not installed (pip install lightly)")
        versions = [version for version in versions if not version.startswith("lightly")]
    return list(versions)


def parse_views(text: str) -> MultiCrop:
    """Return `2x224+8x96` as two global views of 224 pixels and eight local ones of 96; `2x224` has no local views."""
    match = re.fullmatch(r"2x(\d+)(?:\+(\d+)x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected views like 2x224+8x96, got {text!r}")
    size, local, local_size = match.groups()
    return MultiCrop(global_size=int(size), local=int(local or 0), local_size=int(local_size or 96))


def views_text(text: str) -> str:
    """Return the text if it describes views."""
    parse_views(text)
    return text


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of `Workload` and of `compare`."""
    parser.add_argument("--network", choices=list(NETWORKS), default=defaults["network"])
    parser.add_argument("--views", type=views_text, default=defaults["views"], help="e.g. 2x224+8x96")
    parser.add_argument("--k", type=int, default=defaults["k"], help="prototypes")
    parser.add_argument("--batch", type=int, default=defaults["batch"], help="images per step")
    parser.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of a ViT student")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the head's hidden layers")
    parser.add_argument("--micro-batch", type=int, default=0, help="images per micro-batch of our step; 0: all")
    parser.add_argument(
        "--versions", nargs="+", metavar="KIND:PRECISION", help="plain, dino, compiled or lightly : float32, ..."
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--child", metavar="VERSION", help=argparse.SUPPRESS)


def workload_of(options: argparse.Namespace) -> Workload:
    """Return the workload of parsed options."""
    names = ("network", "views", "k", "batch", "drop_path", "hidden", "micro_batch")
    return Workload(**{name: getattr(options, name) for name in names})
