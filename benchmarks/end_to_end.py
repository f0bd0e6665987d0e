"""From JPEG files to updated weights: images/s of our training loop, the published one and lightly's.

    python benchmarks/end_to_end.py [--network vit_tiny] [--views 2x128+6x64] [--k 4096] [--batch 64] [--workers 2]
                                    [--folder PHOTOS] [--json F]

`dino:...` is `dino_ssl.training.train` with its loader, step and logging. `plain:...` is Pillow and torchvision in a
DataLoader with the same number of workers, then the published step (`benchmarks/plain.py`). `lightly:...` is
lightly's transform in the same DataLoader, then its parts. Each version runs in its own process, first for `--steps`
steps of warm-up, then for as many timed steps. `wait` is the share of that time in which the step waited for data;
`peak` is the memory of the training process only. `loader` is our data path alone: batches that nothing trains on.
Without a folder, JPEG files are generated.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from common import SIZES, Memory, PillowImages, write_images
from dino_ssl.config import edit
from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import train_batches
from dino_ssl.events import Logged
from dino_ssl.kernels import fastest_transform
from dino_ssl.runtime import machine, start
from dino_ssl.training import train
from lightly_dino import lightly_views
from plain import pillow_views
from workload import Workload, add_options, compare, parse_views, workload_of


def child(version: str, workload: Workload, folder: Path, steps: int, workers: int) -> dict:
    """Return time, waiting time, losses and peak memory of one version in this process."""
    kind, _, precision = version.partition(":")
    memory = Memory(machine().device)
    if kind == "loader":
        result = run_loader(workload, folder, steps, workers)
    elif kind == "dino":
        result = run_dino(workload, precision, folder, steps, workers)
    else:
        result = run_baseline(kind, workload, precision, folder, steps, workers)
    return result | {"peak": memory.peak()}


def run_dino(workload: Workload, precision: str, folder: Path, steps: int, workers: int) -> dict:
    """Train until the timed steps are done; the run logs every `steps` steps and at the end of each epoch."""
    run, data = workload.run(precision), Folder(path=str(folder))
    with tempfile.TemporaryDirectory() as out, start(run.precision) as rt:
        run = edit(
            run,
            data=data,
            method=dict(freeze_last_layer=0),  # as in all epochs but the first
            optim=dict(epochs=1 + 2 * steps),
            workers=workers,
            log_every=steps,
            out=out,
        )
        events = train(run, rt, data.open())
        timed_from = previous = now = time.perf_counter()
        waited, losses = 0.0, []
        for event in events:
            if not isinstance(event, Logged):
                continue
            now, step = time.perf_counter(), event.clock.step
            losses.append(event.metrics["loss"])
            if step > steps:
                waited += event.metrics["wait"] * (now - previous)
            if step == steps:
                timed_from = now
            if step >= 2 * steps:
                break
            previous = now
        events.close()
        return {"seconds": now - timed_from, "wait": waited / (now - timed_from), "losses": losses}


def run_loader(workload: Workload, folder: Path, steps: int, workers: int) -> dict:
    """Load batches until the timed ones are done."""
    run, pin = workload.run("float32"), machine().device.type == "cuda"
    options = dict(batch_size=workload.batch, seed=0, epochs=1 + 2 * steps, workers=workers, pin_memory=pin)
    batches = train_batches(Folder(path=str(folder)).open(), fastest_transform(run.views), **options)
    for _ in islice(batches, steps):  # warm-up
        pass
    timed_from = time.perf_counter()
    for _ in islice(batches, steps):
        pass
    return {"seconds": time.perf_counter() - timed_from, "wait": 1.0}


def run_baseline(kind: str, workload: Workload, precision: str, folder: Path, steps: int, workers: int) -> dict:
    """Train the plain or lightly's version until the timed steps are done."""
    device = machine().device
    baseline, settings = workload.baseline(kind, precision, device), workload.step_settings()
    batches = load(kind, workload, folder, 2 * steps, workers, pin=device.type == "cuda")
    timed_from, waited, losses = time.perf_counter(), 0.0, []
    for step in range(2 * steps):
        before = time.perf_counter()
        if step == steps:
            timed_from, waited = before, 0.0
        crops = next(batches)
        waited += time.perf_counter() - before
        losses.append(baseline.step(crops, settings))
    seconds = time.perf_counter() - timed_from
    return {"seconds": seconds, "wait": waited / seconds, "losses": losses}


def load(kind: str, workload: Workload, folder: Path, steps: int, workers: int, pin: bool) -> Iterator[list[Tensor]]:
    """Return batches of views of random images; a single long epoch, so that workers start once."""
    images = PillowImages(folder, {"plain": pillow_views, "lightly": lightly_views}[kind](parse_views(workload.views)))
    sampler = RandomSampler(images, replacement=True, num_samples=steps * workload.batch)
    return iter(
        DataLoader(images, workload.batch, sampler=sampler, num_workers=workers, pin_memory=pin, drop_last=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, network="vit_tiny", views="2x128+6x64", k=4096, batch=64)
    parser.add_argument("--folder", type=Path, help="JPEG files; generated by default")
    parser.add_argument("--size", choices=list(SIZES), default="500", help="width of generated files")
    parser.add_argument("--files", type=int, default=256, help="number of generated files")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each turn, after as many of warm-up")
    options = parser.parse_args()
    if options.child:
        work = child(options.child, workload_of(options), options.folder, options.steps, options.workers)
        return print(json.dumps(work))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or write_images(Path(scratch), options.files, *SIZES[options.size])
        arguments = ["--folder", str(folder), "--steps", str(options.steps), "--workers", str(options.workers)]
        columns = {"wait": "% waiting for data", "peak": "GiB"}
        compare(__file__, options, arguments, options.batch * options.steps, columns)


if __name__ == "__main__":
    main()
