"""One training step: images/s and peak memory of our step, the published one and lightly's.

    python benchmarks/train_step.py [--network vit_small] [--views 2x224+8x96] [--k 65536] [--batch 8] [--json F]

`plain:float32` is the published step (`benchmarks/plain.py`: explicit attention matrices, a log-softmax for each pair
of views, gradient clipping and EMA one parameter at a time), `plain:bfloat16` and `plain:float16` the same under
autocast, `dino:...` is `dino_ssl.training.train_step`, `compiled:...` the same with the blocks of a ViT compiled by
torch.compile, `lightly:...` combines lightly's parts with timm's network.
All start from the same weights and use the same images, in pinned memory as from a loader. Our step normalizes them
itself; the others get normalized ones, because their loaders do it. Each version runs in its own process and reports
the growth of that process's memory. Blocks of different drop-path are compiled one by one: compare `compiled:...` with
`--drop-path 0`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common import Memory
from dino_ssl.data.batch import Batch
from dino_ssl.kernels import optimized
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.blocks import Block
from dino_ssl.preprocessing import normalize
from dino_ssl.runtime import machine, start, synchronize
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step
from workload import CLOCK, Workload, add_options, compare, workload_of


def random_views(workload: Workload) -> tuple[Tensor, ...]:
    """Return uint8 views of random images, the same for all versions."""
    rng, shapes = torch.Generator().manual_seed(0), workload.run("float32").views.view_shapes
    return tuple(
        torch.randint(0, 256, (n, workload.batch, 3, side, side), dtype=torch.uint8, generator=rng)
        for n, side in shapes
    )


def child(version: str, workload: Workload, steps: int) -> dict:
    """Return times, losses and peak memory of one version in this process."""
    kind, _, precision = version.partition(":")
    device, views = machine().device, random_views(workload)
    is_ours = kind in ("dino", "compiled")
    inputs = views if is_ours else tuple(crop for stack in views for crop in normalize(stack))
    if device.type == "cuda":
        inputs = tuple(stack.pin_memory() for stack in inputs)
    torch.manual_seed(1)
    memory = Memory(device)
    if is_ours:
        result = run_dino(workload, precision, inputs, steps, compiled=kind == "compiled")
    else:
        baseline, settings = workload.baseline(kind, precision, device), workload.step_settings()
        result = time_steps(lambda _: baseline.step(inputs, settings), steps, device)
    return result | {"peak": memory.peak()}


def run_dino(workload: Workload, precision: str, views: tuple[Tensor, ...], steps: int, *, compiled: bool) -> dict:
    """Return times and losses of our step; compiled: one pass per resolution, with the blocks of a ViT compiled."""
    run = workload.run(precision)
    with start(run.precision) as rt:
        method = build_method(run)
        if compiled:
            compile_blocks(method)
        model = prepare_model(method, rt)
        state = State(method, run.optim.build(method.trainable), rt.scaler())

        def step(number: int) -> Tensor:
            rt.seed_step(run.seed, number)
            return train_step(state, model, Batch(views), CLOCK, run, rt)["loss"]

        return time_steps(step, steps, rt.device)


def compile_blocks(method: nn.Module) -> None:
    """Compile the blocks of every ViT, and pass its resolutions one by one: their shapes are then fixed."""
    kernels = optimized()
    for module in method.modules():
        if isinstance(module, Backbone):
            module.use_kernels(
                attention=kernels["attention"], forward_views=Backbone.forward_views, conv2d=kernels["conv2d"]
            )
        elif isinstance(module, Block):
            module.compile()


def time_steps(step: Callable[[int], Tensor | float], steps: int, device: torch.device) -> dict:
    """Return the median of several steps after a warm-up step, which may compile and is reported separately."""
    seconds, cpu_seconds, losses = [], [], []
    for number in range(steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(step(number))
        synchronize(device)
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    on_cpu = {} if device.type == "cuda" else {"cpu_seconds": statistics.median(cpu_seconds[1:])}
    return {
        "seconds": statistics.median(seconds[1:]),
        **on_cpu,
        "step_seconds": seconds[1:],
        "first_step_seconds": seconds[0],
        "losses": [float(loss) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, network="vit_small", views="2x224+8x96", k=65536, batch=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each turn, after a warm-up step")
    options = parser.parse_args()
    if options.child:
        return print(json.dumps(child(options.child, workload_of(options), options.steps)))
    compare(__file__, options, ["--steps", str(options.steps)], options.batch, {"peak": "GiB"})


if __name__ == "__main__":
    main()
