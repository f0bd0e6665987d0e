"""The measurements of `dino bench`: training steps on noise, their roofline on this machine, and the data path."""

import math
import statistics
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dino_ssl.config import edit, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.presets.benchmark_step import BenchmarkStep, Speed, micro_batch, time_loading
from dino_ssl.profiling.roofline import bytes_per_step, count_flops, matmul_throughput, memory_bandwidth
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime, peak_memory
from dino_ssl.schedules import Clock

STEP_SECONDS = 2.0
"""Target duration of a step if no batch size is given."""
NUM_CLASSES = 10
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


def measure(
    run: Run, machine: Machine, dataset: ImageDataset | None, progress: Progress, *, batch_size: int | None, steps: int
) -> dict[str, Any]:
    """Return the JSON of `dino bench`: machine, run, roofline, step and, if there is a dataset, the data path.

    batch_size: images of a step; None chooses. steps: timed steps.
    """
    flops, matmul = count_flops(run), matmul_throughput(machine.device, run.precision)
    by_compute = matmul.per_second / sum(flops.values())
    run = edit(run, optim=dict(batch_size=batch_size or choose_batch_size(run, machine, by_compute)))
    if run.optim.micro_batch == "auto":
        run = edit(run, optim=dict(micro_batch=micro_batch(run, machine, NUM_CLASSES, 1)[0]))
    step = profile_step(run, Runtime(machine.device, run.precision), steps, progress)
    # After the step, because its buffers would count in the peak memory.
    memory, traffic = memory_bandwidth(machine.device, machine.memory), bytes_per_step(run, run.optim.batch_size)
    by_memory = memory.per_second / sum(traffic.values()) * run.optim.batch_size
    data = None
    if dataset is not None:
        speed = Speed(1 / step["images_per_s"], time_loading(run, dataset))
        with_step = 1 / speed.seconds(run, machine, 1)
        data = {"images_per_s_per_worker": 1 / speed.data, "images_per_s_with_step": with_step}
        data["wait"] = 1 - with_step / step["images_per_s"]
    return {
        "machine": {"name": machine.name, "device": str(machine.device), "threads": torch.get_num_threads()},
        "run": to_dict(run),
        "matmul": {"flops_per_s": matmul.per_second, "operation": matmul.operation},
        "memory": {"bytes_per_s": memory.per_second, "operation": memory.operation},
        "flops_per_image": flops,
        "bytes_per_step": traffic,
        "roofline": {
            "compute_images_per_s": by_compute,
            "memory_images_per_s": by_memory,
            "images_per_s": min(by_compute, by_memory),
        },
        "step": step | {"roofline_share": step["images_per_s"] / min(by_compute, by_memory)},
        "data": data,
    }


def choose_batch_size(run: Run, machine: Machine, images_per_s: float) -> int:
    """Return a power of two, at least 2 and at most the run's, for steps of STEP_SECONDS at half of images_per_s."""
    largest = min(run.optim.batch_size, 64 if machine.device.type == "cpu" else 128)
    return 2 ** int(math.log2(max(2, min(largest, STEP_SECONDS * images_per_s / 2))))


def profile_step(run: Run, rt: Runtime, steps: int, progress: Progress) -> dict[str, Any]:
    """Run a warm-up step, `steps` timed steps and one step under torch.profiler, of `optim.batch_size` images.

    Returns batch_size, times (seconds of each timed step), seconds (their median), images_per_s, peak_memory (bytes, of
    the GPU or of this process), parts and operators (seconds by name in the profiled step; the parts sum to the step).
    """
    step, times = BenchmarkStep(run, rt, run.optim.batch_size, NUM_CLASSES), []
    for number in range(steps + 1):
        progress(number, steps + 2)
        times.append(step.take(CLOCK))
    seconds, peak = statistics.median(times[1:]), peak_memory(rt.device)
    progress(steps + 1, steps + 2)
    parts, operators = _profile(step)
    return {
        "batch_size": run.optim.batch_size,
        "times": times[1:],
        "seconds": seconds,
        "images_per_s": run.optim.batch_size / seconds,
        "peak_memory": peak,
        "parts": parts,
        "operators": operators,
    }


def _profile(step: BenchmarkStep) -> tuple[dict[str, float], dict[str, float]]:
    """Return seconds by part and by operator, of the GPU if there is one."""
    on_gpu = step.rt.device.type == "cuda"
    parts, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        seconds = step.take(CLOCK)
    for event in profiler.events() or ():
        if event.device_type.name == "CPU":  # GPU kernels count in the event that launched them
            own = 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            parts[_part(event)] += own
            if event.name.startswith("aten::"):
                operators[event.name] += own
    if not on_gpu:
        parts["other"] += seconds - sum(parts.values())  # Python
    return (
        {name: parts[name] for name in (*PARTS.values(), "other") if name in parts},
        dict(sorted(operators.items(), key=lambda item: -item[1])),
    )


def _part(event: Any) -> str:
    """Return the innermost part of a step that an event belongs to."""
    while event is not None:
        for prefix, part in PARTS.items():
            if event.name.startswith(prefix):
                return part
        event = event.cpu_parent
    return "other"


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of the printed table: quantity, value, note."""
    bound, step, data = result["roofline"], result["step"], result["data"]
    flops, traffic = result["flops_per_image"], sum(result["bytes_per_step"].values()) / step["batch_size"]
    total_flops, total_time = sum(flops.values()), sum(step["parts"].values())
    spent = [*step["parts"].items(), *list(step["operators"].items())[:NUM_OPERATORS]]
    rows = [
        ("matmul throughput", f"{result['matmul']['flops_per_s'] / 1e9:.1f} GFLOP/s", result["matmul"]["operation"]),
        ("memory bandwidth", f"{result['memory']['bytes_per_s'] / 1e9:.1f} GB/s", result["memory"]["operation"]),
        ("FLOPs per image", f"{total_flops / 1e9:.3f} G", ""),
        *((f"  {name}", f"{count / 1e9:.3f} G", f"{count / total_flops:.1%}") for name, count in flops.items()),
        ("bytes per image", f"{traffic / 1e6:.2f} MB", f"{step['batch_size']} images per step"),
        ("compute bound", f"{bound['compute_images_per_s']:.2f} images/s", ""),
        ("memory bound", f"{bound['memory_images_per_s']:.2f} images/s", ""),
        ("training step", f"{step['images_per_s']:.2f} images/s", f"{step['roofline_share']:.1%} of the roofline"),
        *((f"  {name}", f"{1000 * seconds:.1f} ms", f"{seconds / total_time:.1%}") for name, seconds in spent),
        ("peak memory", f"{step['peak_memory'] / 2**30:.2f} GiB", ""),
    ]
    if data is not None:
        with_step, wait = f"{data['images_per_s_with_step']:.2f} images/s", f"{data['wait']:.0%} waiting for data"
        rows.append(("decode and augment", f"{data['images_per_s_per_worker']:.2f} images/s", "one worker"))
        rows.append(("step with data", with_step, wait))
    return rows
