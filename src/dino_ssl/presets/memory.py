"""How many pictures pass through the networks at once: `--optim.micro-batch auto`, counted on the machine itself."""

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

SHARE = 0.7
"""Of the device's memory that a step may fill; the rest is for what lies between blocks, workers and evaluations."""
COUNTED = (2, 4)
"""Pictures in the two steps that are counted: a step's memory is a constant and so much for each picture."""


def micro_batch(run: Run, here: Machine, classes: int, world: int) -> tuple[int, str]:
    """(the value for `optim.micro_batch`, why): 0 where the whole batch of a rank fits, or must stay together."""
    own = run.optim.batch_size // world
    whole = edit(run, optim=dict(micro_batch=0))
    if not run.method.supports_grad_accumulation or has_batch_norm(build_method(whole, classes=classes)):
        return 0, "the whole batch: method or batch norm bring its pictures together"
    few, more = (step_memory(whole, here, count, classes) for count in COUNTED)
    each = max(1.0, (more - few) / (COUNTED[1] - COUNTED[0]))
    fit = int((SHARE * here.memory - (few - COUNTED[0] * each)) // each)
    counted = f"counted: {each / 2**20:,.0f} MiB for each picture, {fit:,} fit"
    if fit >= own:
        return 0, f"the whole batch of {own}; {counted}"
    size = math.ceil(own / math.ceil(own / max(1, fit)))
    return size, counted


def step_memory(run: Run, here: Machine, count: int, classes: int) -> float:
    """Bytes that one real step of `count` pictures needs: the weights with what the optimizer keeps for each, and all
    that is kept for the backward pass.

    Not the peak that a card reports: in a step of a few pictures that is the optimizer's, whatever their number.
    """
    tried, kept = benchmark_step(run, Runtime(here.device, run.precision), count, classes), _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        tried.step(Clock(0, 2, run.optim.epochs))
    weights = sum(4 * p.nbytes if p.requires_grad else p.nbytes for p in tried.state.method.parameters())
    return float(weights + kept.bytes)


class _Kept:
    """Bytes of what is kept for the backward pass; a tensor that is kept twice counts once."""

    def __init__(self) -> None:
        self.bytes, self._seen = 0, set[Any]()

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
