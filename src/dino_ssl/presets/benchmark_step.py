"""Measurements of a run on this machine: time and memory of a training step on random images, and loading real ones."""

import math
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino_ssl import distributed
from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import BadImage, ImageDataset, spaced_indices
from dino_ssl.data.loader import sample_rng
from dino_ssl.kernels import fastest_transform
from dino_ssl.models.sync_bn import has_batch_norm
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime, synchronize
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step

NUM_TIMED_STEPS, NUM_TIMED_IMAGES = 3, 12
STEP_SECONDS = 2.0
"""Longest timed step, which bounds the measurement: a large network on a CPU takes a minute for a batch."""
MEMORY_FRACTION = 0.7
"""Fraction of the device's memory that a step may use; temporary tensors, workers and evaluations need the rest."""


class BenchmarkStep:
    """A training step of a run with initial weights on one batch of `count` random images of `classes` classes."""

    def __init__(self, run: Run, rt: Runtime, count: int, classes: int) -> None:
        self.run, self.rt = run, rt
        method = build_method(run, classes=classes, optimized=rt.optimized)
        self.model = prepare_model(method, rt)
        self.state = State(method, run.optim.build(method.trainable), rt.scaler())
        shapes = [(n, count, 3, side, side) for n, side in run.views.view_shapes]
        noise = tuple(torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes)
        self.batch = Batch(noise, torch.arange(count) % max(1, classes))

    def take(self, clock: Clock, batch: Batch | None = None) -> float:
        """Take one training step, of all images or of another batch; return its seconds, with those of the device."""
        began = time.perf_counter()
        train_step(self.state, self.model, batch or self.batch, clock, self.run, self.rt)
        synchronize(self.rt.device)
        return time.perf_counter() - began


class Speed(NamedTuple):
    """Seconds per image on this machine: in the training step, and for decoding and augmentation by one worker."""

    step: float
    data: float
    num_images: int = 0
    """Images of the timed step; 0 if unknown."""

    def seconds(self, run: Run, machine: Machine, num_images: int) -> float:
        """Return the expected time to train on this many images.

        On a GPU training and loading overlap; on a CPU they share the cores.
        """
        if machine.device.type == "cpu":
            return num_images * (self.step + self.data / max(1, machine.cores_per_rank))
        return num_images * max(self.step, self.data / max(1, run.workers))


def measure(run: Run, machine: Machine, dataset: ImageDataset, progress: Progress = lambda done, total: None) -> Speed:
    """Measure a few training steps and the loading of a few images: about ten seconds, or two steps of two images.

    A step has as many images as take STEP_SECONDS, judged by a step of two, and at most those of the run. The time per
    image is that of the timed step, also if the batch of the run is larger. All ranks take the same steps.
    """
    batch_size = min(run.optim.batch_size, 32 if machine.device.type == "cpu" else 128)
    benchmark = BenchmarkStep(run, Runtime(machine.device, run.precision), batch_size, len(dataset.classes))
    clock, done = Clock(0, 1000, run.optim.epochs), 0

    def take(batch: Batch) -> float:
        nonlocal done
        progress(done := done + 1, NUM_TIMED_STEPS + 3)
        return benchmark.take(clock, batch)

    batch = benchmark.batch.micro_batches(2)[0]
    times = [take(batch) for _ in range(2)][1:]  # the first step allocates memory
    first = distributed.run_on_rank0(lambda: times[0])
    if first < STEP_SECONDS:
        batch = benchmark.batch.micro_batches(int(STEP_SECONDS / first * batch.num_images))[0]
        times = [take(batch) for _ in range(NUM_TIMED_STEPS + 1)][1:]
    return Speed(statistics.median(times) / batch.num_images, time_loading(run, dataset), batch.num_images)


def time_loading(run: Run, dataset: ImageDataset) -> float:
    """Return the median seconds of one worker to load and augment an image; without decoding if images are cached."""
    times, views = [], fastest_transform(run.views)
    for index in spaced_indices(len(dataset), NUM_TIMED_IMAGES).tolist():
        width, height = dataset.sizes[index].tolist()
        began = time.perf_counter()
        try:
            image = dataset.read_downscaled(index, 1 if run.cache else run.views.decode_scale(height, width))
        except BadImage:
            continue
        began = time.perf_counter() if run.cache else began
        views(image, sample_rng(0, 0, index))
        times.append(time.perf_counter() - began)
    return statistics.median(times) if times else 0.01


def micro_batch(run: Run, machine: Machine, classes: int, world: int) -> tuple[int, str]:
    """Return the measured `optim.micro_batch` for "auto", and the reason.

    0: the batch of a rank fits into memory, or must not be split.
    """
    per_rank = run.optim.batch_size // world
    run = edit(run, optim=dict(micro_batch=0))
    if not run.method.supports_grad_accumulation or has_batch_norm(build_method(run, classes=classes)):
        return 0, "the whole batch: the method or batch norm compares the images of a batch"
    two, four = (step_memory(run, machine, count, classes) for count in (2, 4))  # a constant plus an amount per image
    per_image = max(1.0, (four - two) / 2)
    fit = int((MEMORY_FRACTION * machine.memory - (two - 2 * per_image)) // per_image)
    measured = f"measured: {per_image / 2**20:,.0f} MiB per image, {fit:,} fit"
    if fit >= per_rank:
        return 0, f"the whole batch of {per_rank}; {measured}"
    return math.ceil(per_rank / math.ceil(per_rank / max(1, fit))), measured


def step_memory(run: Run, machine: Machine, count: int, classes: int) -> float:
    """Return the bytes of one training step of `count` images: weights, optimizer state and saved activations.

    The peak that a GPU reports is not used: in a step of few images it is the optimizer's, whatever their number.
    """
    benchmark, saved = BenchmarkStep(run, Runtime(machine.device, run.precision), count, classes), dict[int, int]()

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()  # shared storage counts once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        benchmark.take(Clock(0, 2, run.optim.epochs))
    weights = sum(4 * p.nbytes if p.requires_grad else p.nbytes for p in benchmark.state.method.parameters())
    return float(weights + sum(saved.values()))
