"""One training step: images/s and peak memory, against a plain step written straight from the paper.

    python benchmarks/train_step.py [--batch 8] [--networks vit_tiny vit_small resnet50] [--json step.json]

Ours is `dino.training.train_step`. The plain step does the same arithmetic the way Algorithm 1 reads: each crop passes
alone, each pair of views has a loss of its own, the teacher follows parameter by parameter, all in float32.
Crops are the paper's 2x224 + 8x96. Each version runs in a process of its own, so that peak memory is its own; the
versions take turns, and the medians of the turns are compared.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from dino.config import edit
from dino.data.views import Batch
from dino.models.timm import Timm
from dino.models.vit import ViT
from dino.runtime import Runtime, machine
from dino.schedules import Clock
from dino.training import Run, State, build_method, train_step

NETWORKS = {
    "vit_tiny": ViT(size="tiny", patch=16),
    "vit_small": ViT(size="small", patch=16),
    "resnet50": Timm(name="resnet50"),
}
CLOCK = Clock(0, 1000, 100)


def plain_step(method, optimizer, batch: Batch) -> None:
    """Algorithm 1 as it reads."""
    crops = [crop[None] for view in batch.views for crop in view]
    student = [method.student([crop])[0] for crop in crops]
    with torch.no_grad():
        teacher = [method.teacher([crop])[0] for crop in crops[:2]]
        targets = [F.softmax((out - method.center) / 0.04, dim=-1) for out in teacher]
    losses = [
        -(target * F.log_softmax(out / 0.1, dim=-1)).sum(-1).mean()
        for g, target in enumerate(targets)
        for v, out in enumerate(student)
        if v != g
    ]
    loss = sum(losses) / len(losses)
    optimizer.zero_grad()
    loss.backward()
    for parameter in method.student.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm().item()
            if norm > 3.0:
                parameter.grad.mul_(3.0 / (norm + 1e-6))
    optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
            slow.mul_(0.996).add_(fast, alpha=0.004)
        method.center.mul_(0.9).add_(torch.cat(teacher).mean(0), alpha=0.1)
    loss.item()


def child(network: str, version: str, batch: int, steps: int) -> None:
    """One version in this process: prints its seconds a step and its peak memory as JSON."""
    here = machine()
    rt = Runtime(here.device, version if version != "plain" else "float32")
    run = edit(Run(backbone=NETWORKS[network]), optim=dict(batch_size=batch), precision=rt.precision)
    method = build_method(run)
    rt.prepare(method)
    state = State(method, run.optim.build(method.trained), rt.scaler())
    for group in state.optimizer.param_groups:
        group["lr"] = 1e-6
    noise = (
        torch.randint(0, 256, (2, batch, 3, 224, 224), dtype=torch.uint8),
        torch.randint(0, 256, (8, batch, 3, 96, 96), dtype=torch.uint8),
    )
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        placed = rt.place(Batch(noise))
        if version == "plain":
            plain_step(method, state.optimizer, placed)
        else:
            train_step(state, method, placed, CLOCK, run, rt)
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    if here.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(times[1:]), "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each turn, after one to warm up")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("NETWORK", "VERSION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child, options.batch, options.steps)
    here, console = machine(), Console()
    versions = ["plain", "float32"] + ["bfloat16"] * (here.precision == "bfloat16")
    if "bfloat16" not in versions:
        console.print(f"bfloat16 is left out: {here.why}")
    rows = []
    for network in options.networks:
        results: dict[str, list[dict]] = {version: [] for version in versions}
        for _ in range(options.turns):
            for version in versions:
                command = [sys.executable, __file__, "--child", network, version]
                command += ["--batch", str(options.batch), "--steps", str(options.steps)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[version].append(json.loads(out.splitlines()[-1]))
        for version, turns in results.items():
            seconds = statistics.median(turn["seconds"] for turn in turns)
            ratio = statistics.median(
                plain["seconds"] / turn["seconds"] for plain, turn in zip(results["plain"], turns, strict=True)
            )
            peak = statistics.median(turn["peak"] for turn in turns)
            row = dict(network=network, version=version, images_per_s=options.batch / seconds, ratio=ratio, peak=peak)
            rows.append(row)
    table = Table("network", "step", "images/s", "times plain", "peak GiB", title=f"{here.name}, {here.cores} cores")
    for row in rows:
        table.add_row(
            row["network"],
            "plain, float32" if row["version"] == "plain" else f"dino, {row['version']}",
            f"{row['images_per_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['peak'] / 2**30:.2f}",
        )
    console.print(table)
    if options.json:
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        result = {"machine": f"{here.name}, {here.cores} cores", "batch": options.batch, "rows": rows}
        options.json.write_text(json.dumps(result | {"versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
