"""The measurements of `dino bench`: training steps on noise, their roofline on this machine, and the data path."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from dino_ssl.config import edit
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.presets.benchmark_step import BenchmarkStep, Speed, micro_batch, time_loading
from dino_ssl.profiling.roofline import bytes_per_step, count_flops, matmul_throughput, memory_bandwidth
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime, peak_memory
from dino_ssl.schedules import Clock

STEP_SECONDS = 2.0
"""Target duration of a step if no batch size is given."""
NUM_STEPS, NUM_CLASSES = 3, 10
CLOCK = Clock(1001, 10, 10**6)
"""After the epochs in which the last layer is frozen, and not the last step of an epoch."""
NUM_OPERATORS = 6
"""Operators in the table."""
PARTS = {
    "copy to device": "copy to device",
    "teacher forward": "teacher forward",
    "forward": "student forward and loss",
    "autograd::engine::evaluate_function": "backward",
    "Optimizer.step": "optimizer",
    "after_step": "teacher and center",
}
"""Parts of a step by the prefix of their profiler events; some are recorded by this package, the others by torch."""


class Row(NamedTuple):
    """One measured or counted quantity."""

    name: str
    value: float
    unit: str
    note: str = ""


def measure(
    run: Run, machine: Machine, dataset: ImageDataset | None, progress: Progress, batch_size: int | None
) -> tuple[Run, list[Row]]:
    """Return the profiled run and its roofline, training step and, if there is a dataset, data path.

    batch_size: images of a step; None chooses.
    """
    flops, (matmul, shape) = count_flops(run), matmul_throughput(machine.device, run.precision)
    total = sum(flops.values())
    by_compute = matmul / total
    run = edit(run, optim=dict(batch_size=batch_size or choose_batch_size(run, machine, by_compute)))
    if run.optim.micro_batch == "auto":
        run = edit(run, optim=dict(micro_batch=micro_batch(run, machine, NUM_CLASSES, 1)[0]))
    step_seconds, peak, spent = profile_step(run, Runtime(machine.device, run.precision), progress)
    # After the step, because its buffers would count in the peak memory.
    bandwidth, operation = memory_bandwidth(machine.device, machine.memory)
    moved = sum(bytes_per_step(run, run.optim.batch_size).values()) / run.optim.batch_size
    by_memory = bandwidth / moved
    images_per_s = run.optim.batch_size / step_seconds
    share = images_per_s / min(by_compute, by_memory)
    whole = sum(seconds for name, seconds in spent.items() if not name.startswith("aten::"))
    rows = [
        Row("matmul throughput", matmul / 1e9, "GFLOP/s", shape),
        Row("memory bandwidth", bandwidth / 1e9, "GB/s", operation),
        Row("FLOPs per image", total / 1e9, "GFLOP"),
        *(Row(f"  {name}", count / 1e9, "GFLOP", f"{count / total:.1%}") for name, count in flops.items()),
        Row("bytes per image", moved / 1e6, "MB", f"{run.optim.batch_size} images per step"),
        Row("compute bound", by_compute, "images/s"),
        Row("memory bound", by_memory, "images/s"),
        Row("training step", images_per_s, "images/s", f"{share:.1%} of the roofline"),
        *(Row(f"  {name}", 1e3 * seconds, "ms", f"{seconds / whole:.1%}") for name, seconds in spent.items()),
        Row("peak memory", peak / 2**30, "GiB"),
    ]
    if dataset is not None:
        speed = Speed(1 / images_per_s, time_loading(run, dataset))
        seconds = speed.seconds(run, machine, 1)
        rows.append(Row("decode and augment", 1 / speed.data, "images/s", "one worker"))
        rows.append(Row("step with data", 1 / seconds, "images/s", f"{1 - speed.step / seconds:.0%} waiting for data"))
    return run, rows


def table(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the cells of the printed table: quantity, value with three digits or two decimals, note."""
    values = (f"{row.value:,.2f}" if row.value >= 10 else f"{row.value:.3g}" for row in rows)
    return [(row.name, f"{value} {row.unit}", row.note) for row, value in zip(rows, values, strict=True)]


def choose_batch_size(run: Run, machine: Machine, images_per_s: float) -> int:
    """Return a power of two, at least 2 and at most the run's, for steps of STEP_SECONDS at half of images_per_s."""
    largest = min(run.optim.batch_size, 64 if machine.device.type == "cpu" else 128)
    return 2 ** int(math.log2(max(2, min(largest, STEP_SECONDS * images_per_s / 2))))


def profile_step(run: Run, rt: Runtime, progress: Progress) -> tuple[float, int, dict[str, float]]:
    """Run a warm-up step, NUM_STEPS timed steps and one step under torch.profiler, of `optim.batch_size` images.

    Returns the median seconds of the timed steps, the peak memory in bytes (of the GPU, or of this process), and the
    seconds of the profiled step by part and, after the parts, by the slowest operators. The parts sum to the step.
    """
    step, times = BenchmarkStep(run, rt, run.optim.batch_size, NUM_CLASSES), []
    for number in range(NUM_STEPS + 1):
        progress(number, NUM_STEPS + 2)
        times.append(step.take(CLOCK))
    peak, on_gpu = peak_memory(rt.device), rt.device.type == "cuda"
    progress(NUM_STEPS + 1, NUM_STEPS + 2)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        profiled = step.take(CLOCK)
    parts, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in profiler.events() or ():
        if event.device_type.name == "CPU":  # GPU kernels count in the event that launched them
            own = 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            parts[_part(event)] += own
            if event.name.startswith("aten::"):
                operators[event.name] += own
    if not on_gpu:
        parts["other"] += profiled - sum(parts.values())  # outside of all events
    spent = {name: parts[name] for name in (*PARTS.values(), "other") if name in parts}
    slowest = sorted(operators, key=lambda name: -operators[name])[:NUM_OPERATORS]
    return statistics.median(times[1:]), peak, spent | {name: operators[name] for name in slowest}


def _part(event: Any) -> str:
    """Return the innermost part of a step that an event belongs to."""
    while event is not None:
        for prefix, part in PARTS.items():
            if event.name.startswith(prefix):
                return part
        event = event.cpu_parent
    return "other"
