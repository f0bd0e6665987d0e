"""The micro-batch that fits into memory, measured on this machine: `optim.micro_batch` "auto"."""

import math
from typing import Any

import torch
from torch import Tensor

from dino_ssl.config import edit
from dino_ssl.models.sync_bn import has_batch_norm
from dino_ssl.presets.benchmark_step import benchmark_step
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime
from dino_ssl.schedules import Clock
from dino_ssl.state import build_method

MEMORY_FRACTION = 0.7
"""Fraction of the device's memory that a step may use; temporary tensors, workers and evaluations need the rest."""
BATCH_SIZES = (2, 4)
"""Images in the two measured steps: the memory of a step is a constant plus an amount per image."""


def micro_batch(run: Run, machine: Machine, classes: int, world: int) -> tuple[int, str]:
    """Return `optim.micro_batch` and the reason; 0 if the batch of a rank fits, or must not be split."""
    per_rank = run.optim.batch_size // world
    whole = edit(run, optim=dict(micro_batch=0))
    if not run.method.supports_grad_accumulation or has_batch_norm(build_method(whole, classes=classes)):
        return 0, "the whole batch: the method or batch norm compares the images of a batch"
    small, large = (step_memory(whole, machine, count, classes) for count in BATCH_SIZES)
    per_image = max(1.0, (large - small) / (BATCH_SIZES[1] - BATCH_SIZES[0]))
    fit = int((MEMORY_FRACTION * machine.memory - (small - BATCH_SIZES[0] * per_image)) // per_image)
    measured = f"measured: {per_image / 2**20:,.0f} MiB per image, {fit:,} fit"
    if fit >= per_rank:
        return 0, f"the whole batch of {per_rank}; {measured}"
    return math.ceil(per_rank / math.ceil(per_rank / max(1, fit))), measured


def step_memory(run: Run, machine: Machine, count: int, classes: int) -> float:
    """Return the bytes of one training step of `count` images: weights, optimizer state and saved activations.

    The peak that a GPU reports is not used: in a step of few images it is the optimizer's, whatever their number.
    """
    benchmark, saved = benchmark_step(run, Runtime(machine.device, run.precision), count, classes), _SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        benchmark.step(Clock(0, 2, run.optim.epochs))
    weights = sum(4 * p.nbytes if p.requires_grad else p.nbytes for p in benchmark.state.method.parameters())
    return float(weights + saved.bytes)


class _SavedBytes:
    """Bytes of the tensors saved for the backward pass; shared storage counts once."""

    def __init__(self) -> None:
        self.bytes, self._pointers = 0, set[Any]()

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self._pointers:
            self._pointers.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
