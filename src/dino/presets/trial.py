"""A run's step, taken on noise and forgotten: what plans, counts of memory and `dino bench` measure."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from dino.data.views import Batch
from dino.run import Run
from dino.runtime import Runtime, wait
from dino.schedules import Clock
from dino.training import State, build_method, train_step


@dataclass(frozen=True)
class Trial:
    run: Run
    rt: Runtime
    state: State
    model: nn.Module
    batch: Batch

    def step(self, clock: Clock) -> float:
        """Takes one training step; its seconds, until the device has done it."""
        began = time.perf_counter()
        train_step(self.state, self.model, self.batch, clock, self.run, self.rt)
        wait(self.rt.device)
        return time.perf_counter() - began


def trial(run: Run, rt: Runtime, count: int, classes: int) -> Trial:
    """The run's method with fresh weights, and a batch of `count` pictures of noise, of so many classes in turn."""
    method = build_method(run, classes=classes)
    model = rt.prepare(method)
    state = State(method, run.optim.build(method.trained), rt.scaler())
    noise = [torch.randint(0, 256, (n, count, 3, side, side), dtype=torch.uint8) for n, side in run.views.stacks]
    return Trial(run, rt, state, model, Batch(tuple(noise), torch.arange(count) % max(1, classes)))
