"""One training step: images/s and peak memory, against the plain step as published, and lightly's DINO.

    python benchmarks/train_step.py [--network vit_small] [--views 2x224+8x96] [--k 65536] [--batch 8] [--json F]

Versions: `plain:float32` is the published step (`benchmarks/plain.py`: attention written out, a log-softmax for every
pair of views, clipping and teacher parameter by parameter), `plain:bfloat16` and `plain:float16` the same under
autocast, `dino:...` is `dino_ssl.training.train_step`, `lightly:...` lightly's parts with timm's network. All begin with
the same weights and see the same pictures. Ours normalises them inside the step; the others get them normalised, since
their loaders do it. Each version runs in a process of its own, so that peak memory is its own: by how much the process
grows from before the networks are built. The versions take turns, and the medians of the turns are compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from dino_ssl.data.batch import Batch
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.runtime import machine, start, synchronize
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step
from turns import Memory, about, available, in_turns, rows, save, show, usual_versions
from work import CLOCK, Work, add_options, matrix_rate, with_shares, work_of


def noise(work: Work) -> tuple[Tensor, ...]:
    """uint8 views, the same for everybody."""
    rng = torch.Generator().manual_seed(0)
    stacks = work.run("float32").views.view_shapes
    return tuple(torch.randint(0, 256, (n, work.batch, 3, s, s), dtype=torch.uint8, generator=rng) for n, s in stacks)


def child(version: str, work: Work, steps: int) -> dict:
    """One version in this process: what its steps took."""
    kind, _, precision = version.partition(":")
    here = machine()
    views = noise(work)
    crops = [] if kind == "dino" else [crop for stack in views for crop in normalize(stack)]
    torch.manual_seed(1)
    memory = Memory(here.device)
    if kind == "dino":
        found = ours(work, precision, views, steps)
    else:
        peer, rates = work.peer(kind, precision, here.device), work.rates()
        found = timed(lambda _: peer.step(crops, rates), steps, here.device)
    return found | {"peak": memory.peak()}


def ours(work: Work, precision: str, views: tuple[Tensor, ...], steps: int) -> dict:
    run = work.run(precision)
    with start(run.precision) as rt:
        method = build_method(run)
        model = prepare_model(method, rt)
        state = State(method, run.optim.build(method.trainable), rt.scaler())

        def step(number: int) -> Tensor:
            rt.seed_step(run.seed, number)
            return train_step(state, model, Batch(views), CLOCK, run, rt)["loss"]

        return timed(step, steps, rt.device)


def timed(step: Callable[[int], Tensor | float], steps: int, device: torch.device) -> dict:
    """The median of so many steps after one to warm up, which is told apart: it may have compiled."""
    seconds, work, losses = [], [], []
    for number in range(steps + 1):
        began, worked = time.perf_counter(), time.process_time()
        losses.append(step(number))
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        work.append(time.process_time() - worked)
    processor = {} if device.type == "cuda" else {"processor_seconds": statistics.median(work[1:])}
    return {
        "seconds": statistics.median(seconds[1:]),
        **processor,
        "first_step_seconds": seconds[0],
        "losses": [float(loss) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, network="vit_small", views="2x224+8x96", k=65536, batch=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each turn, after one to warm up")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = work_of(options)
    if options.child:
        return print(json.dumps(child(options.child, work, options.steps)))
    console, here = Console(), machine()
    versions = available(options.versions or usual_versions(here), console)
    told = [*work.arguments(), "--steps", str(options.steps)]
    found = rows(in_turns(__file__, versions, options.turns, told), work.batch)
    if rate := matrix_rate(here):  # after the turns: nothing else is on the card
        found = with_shares(found, work, rate)
    share = {"rate_share": "% of the matrix rate"} if rate else {}
    said = about(vars(options))
    title = f"{work.network}, {work.views}, K {work.k}, batch {work.batch}: {said['machine']}"
    show(found, title, console, peak="GiB", **share)
    save(options.json, {"benchmark": "train_step", **said, "matrix_rate": rate, "rows": found})


if __name__ == "__main__":
    main()
