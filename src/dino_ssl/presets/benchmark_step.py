"""Measurements of a run on this machine: a training step on random images, and loading real ones."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.loader import sample_rng
from dino_ssl.kernels import fastest_transform
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime, synchronize
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step

NUM_TIMED_IMAGES = 12


@dataclass(frozen=True)
class BenchmarkStep:
    """A training step of a run on one batch of random images."""

    run: Run
    rt: Runtime
    state: State
    model: nn.Module
    batch: Batch

    def step(self, clock: Clock) -> float:
        """Take one training step; return its seconds, including those of the device."""
        began = time.perf_counter()
        train_step(self.state, self.model, self.batch, clock, self.run, self.rt)
        synchronize(self.rt.device)
        return time.perf_counter() - began


def benchmark_step(run: Run, rt: Runtime, count: int, classes: int) -> BenchmarkStep:
    """Return a step of the run's method with initial weights on `count` random images of `classes` classes."""
    method = build_method(run, classes=classes, optimized=rt.optimized)
    model = prepare_model(method, rt)
    state = State(method, run.optim.build(method.trainable), rt.scaler())
    noise = [torch.randint(0, 256, (n, count, 3, side, side), dtype=torch.uint8) for n, side in run.views.view_shapes]
    return BenchmarkStep(run, rt, state, model, Batch(tuple(noise), torch.arange(count) % max(1, classes)))


@dataclass(frozen=True)
class Speed:
    """Seconds per image on this machine: in the training step, and for decoding and augmentation by one worker."""

    step: float
    data: float

    def seconds(self, run: Run, machine: Machine, num_images: int) -> float:
        """Return the expected time to train on this many images.

        On a GPU training and loading overlap; on a CPU they share the cores.
        """
        if machine.device.type == "cpu":
            return num_images * (self.step + self.data / max(1, machine.cores_per_rank))
        return num_images * max(self.step, self.data / max(1, run.workers))


def measure(run: Run, machine: Machine, dataset: ImageDataset, *, steps: int = 3) -> Speed:
    """Measure a few training steps and the loading of a few images; some seconds."""
    batch_size = min(run.optim.batch_size, 32 if machine.device.type == "cpu" else 128)
    benchmark = benchmark_step(run, Runtime(machine.device, run.precision), batch_size, len(dataset.classes))
    times = [benchmark.step(Clock(step, steps + 1, run.optim.epochs)) for step in range(steps + 1)]
    return Speed(statistics.median(times[1:]) / batch_size, time_loading(run, dataset))


def time_loading(run: Run, dataset: ImageDataset) -> float:
    """Return the median seconds of one worker to load and augment an image; without decoding if images are cached."""
    times, views = [], fastest_transform(run.views)
    count = min(NUM_TIMED_IMAGES, len(dataset))
    for index in torch.linspace(0, len(dataset) - 1, count).long().tolist():
        width, height = dataset.sizes[index].tolist()
        began = time.perf_counter()
        try:
            image = dataset.read_downscaled(index, run.views.decode_scale(height, width) if not run.cache else 1)
        except BadImage:
            continue
        if run.cache:
            began = time.perf_counter()
        views(image, sample_rng(0, 0, index))
        times.append(time.perf_counter() - began)
    return statistics.median(times) if times else 0.01
