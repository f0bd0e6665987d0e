"""Measured limits of this machine: matmul throughput and memory bandwidth.

The best of many repetitions counts, not the mean, because a roofline must also hold on an idle machine.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dino_ssl.runtime import Precision, synchronize

SECONDS = 2.0
"""Duration of each measurement."""
SHAPES = {
    "cpu": ((512, 512, 512), (1024, 1024, 1024), (4096, 384, 1536), (2048, 1024, 1024)),
    "gpu": ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (32768, 1024, 4096)),
}
"""(m, k, n) of the measured products [m, k] x [k, n]."""
BUFFER = {"cpu": 2**28, "gpu": 2**30}
"""Bytes of each buffer that is moved: larger than any cache."""


class Throughput(NamedTuple):
    """The best measured rate, and the operation that reached it."""

    per_second: float
    operation: str


@torch.no_grad()
def matmul_throughput(device: torch.device, precision: Precision) -> Throughput:
    """Measure FLOP/s of matrix products in this precision (on a GPU, float32 is TF32, as in training)."""
    dtype, kernels = getattr(torch, precision), []
    for m, k, n in SHAPES["cpu" if device.type == "cpu" else "gpu"]:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        kernels.append((f"{m} x {k} x {n}", 2 * m * k * n, lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out)))
    return _best(kernels, device)


@torch.no_grad()
def memory_bandwidth(device: torch.device, memory: int) -> Throughput:
    """Measure the bandwidth of a main memory of `memory` bytes, in bytes/s: reading, copying, adding."""
    size = min(BUFFER["cpu" if device.type == "cpu" else "gpu"], memory // 32)
    a, b, out = (torch.ones(size // 4, device=device) for _ in range(3))
    kernels = [
        ("read", size, a.sum),
        ("copy", 2 * size, lambda: out.copy_(a)),
        ("add", 3 * size, lambda: torch.add(a, b, out=out)),
    ]
    return _best(kernels, device)


def _best(kernels: Sequence[tuple[str, int, Callable[[], object]]], device: torch.device) -> Throughput:
    """Run each (name, FLOPs or bytes, call) alternately for SECONDS after a warm-up round, at least once."""
    best, rounds, start = Throughput(0.0, ""), 0, time.perf_counter()
    while rounds < 2 or time.perf_counter() - start < SECONDS:
        for name, amount, call in kernels:
            before = time.perf_counter()
            call()
            synchronize(device)
            if rounds:
                best = max(best, Throughput(amount / (time.perf_counter() - before), name))
        rounds += 1
    return best
