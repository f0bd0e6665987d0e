"""Cost of the collapse monitor: a training step with and without it, interleaved.

    python benchmarks/monitor.py [--networks NAME ...] [--turns 9] [--json monitor.json]

With: what `dino train` does. Without: the same step with only the loss, which needs no entropies, no prototype usage
and no norm of all gradients, and log lines without feature statistics and without a `Monitor`. Both train in this
process, alternating after each log line (`log_every` steps and the line itself), so that other processes on the machine
affect both. The ratio is the median over the ratios of neighbouring turns; `parts` times the added work separately,
which is less noisy. On a CPU, CPU time is measured, which excludes waiting for a core.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import about, save
from dino_ssl.collapse.monitor import Monitor
from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.feature_stats import FeatureStats
from dino_ssl.methods.dino import DINO, Carry, DINOConfig
from dino_ssl.methods.method import Outputs
from dino_ssl.metrics import Meter
from dino_ssl.objectives import P, cross_entropy_over_pairs, h, log_P
from dino_ssl.optim import clip_grad_norm_per_tensor_, set_lr_and_weight_decay
from dino_ssl.presets import resolve
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine, synchronize
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import batch_to_device, train_step

NETWORKS = {"vits16": "vits16", "vit_tiny": "dino_ssl.presets.small:vit_tiny", "small": "small", "demo": "demo"}
"""Presets whose network, crops and K are measured."""
CLOCK = Clock(1, 100, 100)


def bare_step(state: State, batch: Batch, run: Run, rt: Runtime) -> dict[str, Tensor]:
    """`train_step` with only the loss as metric."""
    method, optim = state.method, run.optim
    assert isinstance(method, DINO)
    set_lr_and_weight_decay(
        state.optimizer, lr=optim.lr_schedule()(CLOCK), weight_decay=optim.weight_decay_schedule()(CLOCK)
    )
    with rt.autocast():
        out = bare_forward(method, batch)
    state.scaler.scale(out.loss).backward()
    state.scaler.unscale_(state.optimizer)
    clip_grad_norm_per_tensor_(method.trainable.parameters(), optim.clip_grad)
    method.before_step(CLOCK)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    method.after_step(out.carry, CLOCK)
    return out.metrics


def bare_forward(method: DINO, batch: Batch) -> Outputs:
    """`DINO.forward` with only the loss as metric."""
    with torch.no_grad():
        teacher = method.teacher(batch.views[:1])
        carry = Carry(teacher.float().sum((0, 1)), torch.full((), teacher.shape[0] * teacher.shape[1]))
        targets = P(teacher, method.config.teacher_temp, method.center)
    loss = cross_entropy_over_pairs(targets, log_P(method.student(batch.views), method.config.student_temp))
    return Outputs(loss, carry, {"loss": loss.detach()})


@dataclass
class Version:
    """A training step with or without the monitor; a turn is the steps of a log line, and the line."""

    turn: Callable[[], None]
    method: DINO


def versions(run: Run, rt: Runtime) -> dict[str, Version]:
    noise = [
        torch.randint(0, 256, (n, run.optim.batch_size, 3, side, side), dtype=torch.uint8)
        for n, side in run.views.view_shapes
    ]
    return {name: _version(run, rt, Batch(tuple(noise)), name == "with") for name in ("with", "without")}


def _version(run: Run, rt: Runtime, batch: Batch, monitored: bool) -> Version:
    method = build_method(run)
    assert isinstance(method, DINO)
    model = prepare_model(method, rt)
    state = State(method, run.optim.build(method.trainable), rt.scaler())
    monitor = Monitor(run.method.num_prototypes, run, CLOCK.steps_per_epoch)
    stats = FeatureStats(method.backbone)
    meter = Meter(run.schedules(), 1, (lambda: stats.measure() | method.diagnostics()) if monitored else dict)
    line = 0

    def turn() -> None:
        nonlocal line
        line += 1
        for item in meter.timed(iter([batch] * run.log_every)):
            if monitored:
                stats.next_step()
                metrics = train_step(state, model, item, CLOCK, run, rt)
            else:
                metrics = bare_step(state, batch_to_device(item, rt), run, rt)
            meter.add(metrics, run.optim.batch_size)
        line_metrics = meter.close(CLOCK)
        if monitored:
            monitor.update({"step": line * run.log_every, **line_metrics})

    return Version(turn, method)


def parts(run: Run, rt: Runtime, repeats: int = 20) -> dict[str, float]:
    """Return the seconds of each part of the added work: the first two per step, the others per log line."""
    method = build_method(run).to(rt.device)
    assert isinstance(method, DINO)
    batch, K = run.optim.batch_size, method.config.out_dim
    targets = torch.softmax(torch.randn(2, batch, K, device=rt.device), -1)
    features = torch.randn(2 * batch, method.backbone.embed_dim, device=rt.device)
    norms = torch.rand(300, device=rt.device)
    stats, monitor = FeatureStats(method.backbone), Monitor(K, run, CLOCK.steps_per_epoch)
    usage, row = targets.mean((0, 1)), dict.fromkeys(("loss", "teacher_entropy", "kl", "marginal_entropy"), 1.0)

    def measure() -> None:
        stats._features = features
        stats.measure()

    jobs: dict[str, Callable[[], object]] = {
        "entropies and prototype usage": lambda: (h(targets).mean(), h(targets.mean((0, 1))), usage.add_(usage)),
        "gradient norm": norms.norm,
        "feature statistics": measure,
        "findings": lambda: monitor.update({"step": 500, **row}),
    }
    seconds = {}
    for name, job in jobs.items():
        job()
        times = []
        for _ in range(repeats):
            began = _now(rt)
            job()
            times.append(_now(rt) - began)
        seconds[name] = statistics.median(times)
    return seconds


def compare(run: Run, rt: Runtime, turns: int) -> dict[str, Any]:
    """Return seconds per step with and without, their ratio, and the sum of the parts as a fraction of a step."""
    by_name, seconds = versions(run, rt), {"with": [], "without": []}
    for version in by_name.values():
        version.turn()
    for number in range(turns):
        for name in ("with", "without") if number % 2 else ("without", "with"):
            began = _now(rt)
            by_name[name].turn()
            seconds[name].append((_now(rt) - began) / run.log_every)
    pieces = parts(run, rt)
    names = list(pieces)
    added = sum(pieces[name] for name in names[:2]) + sum(pieces[name] for name in names[2:]) / run.log_every
    without = statistics.median(seconds["without"])
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "with": statistics.median(seconds["with"]),
        "without": without,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "parts": pieces,
        "share": added / without,
    }


def _now(rt: Runtime) -> float:
    """Return processor time on a CPU, wall time after synchronization on other devices; in seconds."""
    if rt.device.type == "cpu":
        return time.process_time()
    synchronize(rt.device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["vit_tiny", "small", "demo"])
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--turns", type=int, default=9, help="measured log lines of each version")
    parser.add_argument("--log-every", type=int, default=10, help="steps per log line")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, console = machine(), Console()
    rt = Runtime(device.device, device.precision)
    clock = "processor time" if device.device.type == "cpu" else "time"
    table = Table("network", "K", "ms per step without", "with", "ratio (lowest .. highest)", "parts, of a step",
                  title=f"{device.name}, {device.cores} cores, {clock}, batch {options.batch}")  # fmt: skip
    rows = []
    for network in options.networks:
        run = edit(resolve(NETWORKS[network]), optim=dict(batch_size=options.batch), precision=rt.precision)
        run = edit(run, log_every=options.log_every)
        assert isinstance(run.method, DINOConfig)
        measured = compare(run, rt, options.turns)
        rows.append({"network": network, "prototypes": run.method.out_dim, **measured})
        ratio = f"{measured['ratio']:.3f} ({measured['lowest']:.3f} .. {measured['highest']:.3f})"
        times = [f"{1e3 * measured[name]:.1f}" for name in ("without", "with")]
        table.add_row(network, str(run.method.out_dim), *times, ratio, f"{measured['share']:.2%}")
    console.print(table)
    save(options.json, {"benchmark": "monitor", **about(vars(options)), "clock": clock, "rows": rows})


if __name__ == "__main__":
    main()
