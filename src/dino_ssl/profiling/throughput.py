"""What this machine can do at most, measured: operations a second in matrix products, bytes a second through memory.

The best of many tries counts, not the mean: a floor must hold on a quiet machine too.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dino_ssl.progress import Progress
from dino_ssl.runtime import Machine, Precision, synchronize

SECONDS = 2.0
"""Spent on each rate."""
SHAPES = {
    "cpu": ((512, 512, 512), (1024, 1024, 1024), (4096, 384, 1536), (2048, 1024, 1024)),
    "card": ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (32768, 1024, 4096)),
}
"""Rows, inner width and columns of the products that are tried."""
BUFFER = {"cpu": 2**28, "card": 2**30}
"""Bytes of each buffer that is moved: more than any cache holds."""


class Rate(NamedTuple):
    """So much a second, at best, and what reached it."""

    per_second: float
    what: str
    had: float = 1.0
    """Share of its threads' time that a processor gave this process meanwhile: less than 1 where others use it too."""


class Work(NamedTuple):
    what: str
    amount: float
    do: Callable[[], object]


@torch.no_grad()
def matrix_rate(
    here: Machine, precision: Precision, progress: Progress, shapes: Sequence[tuple[int, int, int]] | None = None
) -> Rate:
    """Operations a second of a product, in the run's precision; on a card, float32 means what training has: TF32."""
    dtype = getattr(torch, precision)
    works = []
    for rows, inner, columns in shapes or SHAPES[_kind(here.device)]:
        a = torch.randn(rows, inner, device=here.device).to(dtype)
        b = torch.randn(columns, inner, device=here.device).to(dtype)
        out = torch.empty(rows, columns, device=here.device, dtype=dtype)
        name = f"{rows} x {inner} x {columns}"
        works.append(Work(name, 2.0 * rows * inner * columns, lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out)))
    return _best(works, here.device, progress)


@torch.no_grad()
def memory_rate(here: Machine, progress: Progress, size: int | None = None) -> Rate:
    """Bytes a second through the main memory: reading, copying or adding, whichever moves most."""
    size = size or min(BUFFER[_kind(here.device)], here.memory // 32)
    a, b, out = (torch.ones(size // 4, device=here.device) for _ in range(3))
    works = [
        Work("read", 1.0 * size, a.sum),
        Work("copy", 2.0 * size, lambda: out.copy_(a)),
        Work("add", 3.0 * size, lambda: torch.add(a, b, out=out)),
    ]
    return _best(works, here.device, progress)


def _best(works: Sequence[Work], device: torch.device, progress: Progress) -> Rate:
    """The works take turns for SECONDS; the first turn warms up, the second always counts."""
    best, turn = Rate(0.0, ""), 0
    began, used = time.perf_counter(), time.process_time()
    while turn < 2 or time.perf_counter() - began < SECONDS:
        for work in works:
            start = time.perf_counter()
            work.do()
            synchronize(device)
            if turn:
                best = max(best, Rate(work.amount / (time.perf_counter() - start), work.what))
        turn += 1
        progress(min(99, int(100 * (time.perf_counter() - began) / max(SECONDS, 1e-9))), 100)
    if device.type != "cpu":
        return best
    had = (time.process_time() - used) / (time.perf_counter() - began) / torch.get_num_threads()
    return best._replace(had=min(1.0, had))


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "card"
