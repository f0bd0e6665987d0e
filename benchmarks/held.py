"""Views of small pictures: the plain loader's, one worker's work, against the device's of the same draws.

Three ways take turns on the same pictures, which are decoded already: `plain` draws, crops and colours with OpenCV and
sends the batch to the device; `device` has the draws (its workers' part, made outside the clock) and makes the views
where the pictures are; `draws` is that part alone, on one core. Up to uint8 views on the device, without `normalize`.

    python benchmarks/held.py [--sides 32 96] [--batch 64] [--turns 9] [--json held.json]

A GPU is taken where there is one. In the JSON, `seconds` are of the wall and `processor_seconds` of this process.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console

import turns
from dino.data.loader import Job, train_batches
from dino.data.pictures import Pictures
from dino.data.views import MultiCrop
from dino.fast import held
from dino.runtime import machine, wait


class Drawn(Pictures):
    """Smooth coloured noise, in memory."""

    def __init__(self, count: int, side: int) -> None:
        super().__init__(names=[f"{n}" for n in range(count)], sizes=[(side, side)] * count)
        rng = np.random.default_rng(0)
        noise = (rng.normal(120, 50, (8, 8, 3)) for _ in range(count))
        smooth = (cv2.resize(one, (side, side), interpolation=cv2.INTER_CUBIC) for one in noise)
        self.images = [image.clip(0, 255).astype(np.uint8) for image in smooth]

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


def ways(side: int, batch: int, device: torch.device) -> dict[str, Callable[[int], Callable[[], object]]]:
    """By name: epoch -> what is timed. Views as the small presets have them: globals of the side, locals of half."""
    pictures = Drawn(batch, side)
    views = MultiCrop(global_size=side, local_size=side // 2, local=4)
    there = held.hold(pictures, device, 2**40)
    plain = train_batches(pictures, views, batch_size=batch, seed=0, epochs=10**6)
    draws = held.Draws(pictures.sizes, {}, {}, views, 0)

    def job(epoch: int) -> Job:
        return Job(epoch, 0, np.arange(batch), np.zeros(batch, np.int64))

    def on_device(epoch: int) -> Callable[[], object]:
        drawn = draws(job(epoch))
        return lambda: held.make_views(there.pixels, drawn.used, drawn.draws, views)

    return {
        "plain": lambda epoch: lambda: [view.to(device) for view in next(plain).batch.views],
        "device": on_device,
        "draws": lambda epoch: lambda: draws(job(epoch)),
    }


def measure(side: int, batch: int, rounds: int, device: torch.device) -> dict[str, list[dict]]:
    """One entry a turn; the first turn warms up and is not kept."""
    candidates = ways(side, batch, device)
    found: dict[str, list[dict]] = {name: [] for name in candidates}
    for epoch in range(-1, rounds):
        for name, prepare in candidates.items():
            timed = prepare(epoch + 1)
            wait(device)
            began, spent = time.perf_counter(), time.process_time()
            timed()
            wait(device)
            if epoch >= 0:
                clocks = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - spent}
                found[name].append(clocks)
    return found


def rows_of(side: int, found: dict[str, list[dict]], batch: int) -> list[dict[str, Any]]:
    """`processor_ratio`: the same ratio of the processor's time, which is steadier beside other work."""
    base = [turn["processor_seconds"] for turn in found["plain"]]
    rows = turns.rows(found, batch)
    for row in rows:
        pairs = zip(base, row["processor_seconds"], strict=True)
        row |= {"side": side, "processor_ratio": statistics.median(b / max(own, 1e-9) for b, own in pairs)}
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 96], help="sides of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    here, console, rows = machine(), Console(), []
    for side in options.sides:
        found = rows_of(side, measure(side, options.batch, options.turns, here.device), options.batch)
        title = f"pictures of {side} px to 2x{side} + 4x{side // 2}, batch {options.batch}, {here.name}"
        turns.show(found, title, console, processor_ratio="times first, processor, %")
        rows += found
    turns.save(options.json, {"benchmark": "held", **turns.about(vars(options)), "rows": rows})


if __name__ == "__main__":
    main()
