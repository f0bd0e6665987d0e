"""A run's step, taken on noise and forgotten: what plans, counts of memory and `dino bench` measure."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from dino_ssl.data.batch import Batch
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, synchronize
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step


@dataclass(frozen=True)
class BenchmarkStep:
    run: Run
    rt: Runtime
    state: State
    model: nn.Module
    batch: Batch

    def step(self, clock: Clock) -> float:
        """Takes one training step; its seconds, until the device has done it."""
        began = time.perf_counter()
        train_step(self.state, self.model, self.batch, clock, self.run, self.rt)
        synchronize(self.rt.device)
        return time.perf_counter() - began


def benchmark_step(run: Run, rt: Runtime, count: int, classes: int) -> BenchmarkStep:
    """The run's method with fresh weights, and a batch of `count` pictures of noise, of so many classes in turn."""
    method = build_method(run, classes=classes, optimized=rt.optimized)
    model = prepare_model(method, rt)
    state = State(method, run.optim.build(method.trainable), rt.scaler())
    noise = [torch.randint(0, 256, (n, count, 3, side, side), dtype=torch.uint8) for n, side in run.views.view_shapes]
    return BenchmarkStep(run, rt, state, model, Batch(tuple(noise), torch.arange(count) % max(1, classes)))
