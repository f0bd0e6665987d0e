"""From JPEG files to updated weights: images/s of training as it is, against the plain loop and lightly's.

    python benchmarks/end_to_end.py [--network vit_tiny] [--views 2x128+6x64] [--k 4096] [--batch 64] [--workers 2]
                                    [--folder PHOTOS] [--json end.json]

`dino:...` is `dino_ssl.training.train`: its loader, its step, its lines of metrics. `plain:...` is the published way:
Pillow and torchvision in a DataLoader with the same number of workers, then the published step (`benchmarks/plain.py`).
`lightly:...` is lightly's transform in the same DataLoader, then its parts. Each version runs in a process of its own;
it trains for `--steps` steps to fill its queues, then for as many that are timed. `wait` is the share of that time in
which the step waited for pictures; `peak` is of the training process alone. Without a folder, JPEG files are drawn.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dino_ssl.config import edit
from dino_ssl.data.folder import Folder
from dino_ssl.events import Logged
from dino_ssl.runtime import machine, start
from dino_ssl.training import train
from lightly_dino import lightly_views
from plain import pillow_views
from turns import Memory, about, available, in_turns, rows, save, show, usual_versions
from work import Work, add_options, crops_of, matrix_rate, with_shares, work_of

SIZES = {"500": (500, 375), "128": (128, 128)}
"""Width and height of the files that are drawn."""


class Files(Dataset):
    """The views of each picture that ours would see, by Pillow."""

    def __init__(self, folder: Path, views: Callable[[Any], list[Tensor]]) -> None:
        self.files = [folder / name for name in Folder(path=str(folder)).open().names]
        self.views = views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with self.files[index].open("rb") as file:
            return self.views(Image.open(file).convert("RGB"))


def child(version: str, work: Work, folder: Path, steps: int, workers: int) -> dict:
    """One version in this process: what the second half of its steps took."""
    kind, _, precision = version.partition(":")
    memory = Memory(machine().device)
    if kind == "dino":
        found = ours(work, precision, folder, steps, workers)
    else:
        found = others(kind, work, precision, folder, steps, workers)
    return found | {"peak": memory.peak()}


def ours(work: Work, precision: str, folder: Path, steps: int, workers: int) -> dict:
    """A run that logs after `steps` steps, and at each epoch's end; it is left when the timed ones are done."""
    dataset = Folder(path=str(folder)).open()
    with tempfile.TemporaryDirectory() as out, start(edit(work.run(precision)).precision) as rt:
        run = edit(
            work.run(precision),
            data=Folder(path=str(folder)),
            method=dict(freeze_last_layer=0),  # as in all epochs but the first
            optim=dict(epochs=1 + 2 * steps),
            workers=workers,
            log_every=steps,
            out=out,
        )
        events = train(run, rt, dataset)
        began = before = time.perf_counter()
        waited, losses = 0.0, []
        for event in events:
            if not isinstance(event, Logged):
                continue
            now, step = time.perf_counter(), event.clock.step
            losses.append(event.metrics["loss"])
            if step > steps:
                waited += event.metrics["wait"] * (now - before)
            if step == steps:
                began = now
            if step >= 2 * steps:
                break
            before = now
        events.close()
        return {"seconds": now - began, "wait": waited / (now - began), "losses": losses}


def others(kind: str, work: Work, precision: str, folder: Path, steps: int, workers: int) -> dict:
    device = machine().device
    peer, rates = work.peer(kind, precision, device), work.rates()
    batches = loaded(kind, work, folder, 2 * steps, workers, pin=device.type == "cuda")
    began, waited, losses = time.perf_counter(), 0.0, []
    for step in range(2 * steps):
        asked = time.perf_counter()
        if step == steps:
            began, waited = asked, 0.0
        crops = next(batches)
        waited += time.perf_counter() - asked
        losses.append(peer.step(crops, rates))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "wait": waited / seconds, "losses": losses}


def loaded(kind: str, work: Work, folder: Path, steps: int, workers: int, pin: bool) -> Iterator[list[Tensor]]:
    """So many batches of views, the files in random order: as one long epoch, so that workers start once."""
    views = {"plain": pillow_views, "lightly": lightly_views}[kind](crops_of(work.views))
    files = Files(folder, views)
    sampler = RandomSampler(files, replacement=True, num_samples=steps * work.batch)
    return iter(DataLoader(files, work.batch, sampler=sampler, num_workers=workers, pin_memory=pin, drop_last=True))


def drawn(folder: Path, count: int, width: int, height: int) -> Path:
    """JPEG files as large as photos of this size."""
    before = dict(os.environ)
    from data import draw  # it sets one thread for everybody; our children may have more

    os.environ.clear()
    os.environ.update(before)
    draw(folder, count, width, height)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, network="vit_tiny", views="2x128+6x64", k=4096, batch=64)
    parser.add_argument("--folder", type=Path, help="JPEG files to take instead of drawn ones")
    parser.add_argument("--size", choices=list(SIZES), default="500", help="width of the files that are drawn")
    parser.add_argument("--files", type=int, default=256, help="how many are drawn")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode and crop")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each turn, after as many to warm up")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = work_of(options)
    if options.child:
        return print(json.dumps(child(options.child, work, options.folder, options.steps, options.workers)))
    console, here = Console(), machine()
    versions = available(options.versions or usual_versions(here), console)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or drawn(Path(scratch), options.files, *SIZES[options.size])
        told = [*work.arguments(), "--folder", str(folder)]
        told += ["--steps", str(options.steps), "--workers", str(options.workers)]
        found = rows(in_turns(__file__, versions, options.turns, told), work.batch * options.steps)
    if rate := matrix_rate(here):  # after the turns: nothing else is on the card
        found = with_shares(found, work, rate)
    share = {"rate_share": "% of the matrix rate"} if rate else {}
    said = about(vars(options))
    title = (
        f"{work.network}, {work.views}, K {work.k}, batch {work.batch}, {options.workers} workers: {said['machine']}"
    )
    show(found, title, console, wait="% waiting for data", peak="GiB", **share)
    save(options.json, {"benchmark": "end_to_end", **said, "matrix_rate": rate, "rows": found})


if __name__ == "__main__":
    main()
