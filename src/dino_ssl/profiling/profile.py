"""The result of `dino bench`: the roofline of a run's step on this machine, and the measured step and data path."""

from typing import Any

import torch

from dino_ssl.config import edit, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.presets.benchmark_step import Speed, time_loading
from dino_ssl.presets.memory import micro_batch
from dino_ssl.profiling.roofline import Part, bytes_per_step, count_flops
from dino_ssl.profiling.step_profile import NUM_CLASSES, profile_step
from dino_ssl.profiling.throughput import Throughput, matmul_throughput, memory_bandwidth
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime

STEP_SECONDS = 2.0
"""Target duration of a step if no batch size is given."""
LARGEST_BATCH = {"cpu": 64, "cuda": 128}
NUM_OPERATORS = 6
"""Operators in the table."""


def measure(
    run: Run, machine: Machine, dataset: ImageDataset | None, progress: Progress, *, batch_size: int | None, steps: int
) -> dict[str, Any]:
    """Measure the machine, the step and, if there is a dataset, the data path; see `summarize`.

    batch_size: images of a step; None chooses. steps: timed steps.
    """
    parts, matmul = count_flops(run), matmul_throughput(machine.device, run.precision)
    if batch_size is None:
        batch_size = choose_batch_size(run, machine, sum(part.total for part in parts) / matmul.per_second)
    run = edit(run, optim=dict(batch_size=batch_size))
    if run.optim.micro_batch == "auto":
        run = edit(run, optim=dict(micro_batch=micro_batch(run, machine, NUM_CLASSES, 1)[0]))
    step = profile_step(run, Runtime(machine.device, run.precision), steps, progress)
    # Last, because the buffers would count in the peak memory of the step.
    memory = memory_bandwidth(machine.device, machine.memory)
    data_seconds = None if dataset is None else time_loading(run, dataset)
    return summarize(run, machine, parts, matmul, memory, step, data_seconds)


def choose_batch_size(run: Run, machine: Machine, seconds: float) -> int:
    """Return a power of two, at least 2 and at most the run's, for steps of about STEP_SECONDS.

    seconds: of one image at the matmul throughput; the step is expected to reach half of it.
    """
    largest = min(run.optim.batch_size, LARGEST_BATCH.get(machine.device.type, 64))
    size = 2
    while 2 * size <= largest and 2 * size * 2 * seconds <= STEP_SECONDS:
        size *= 2
    return size


def summarize(
    run: Run,
    machine: Machine,
    parts: list[Part],
    matmul: Throughput,
    memory: Throughput,
    step: dict[str, Any],
    data_seconds: float | None,
) -> dict[str, Any]:
    """Return the JSON of `dino bench`. data_seconds: of one worker for one image; None if not measured."""
    traffic, data = bytes_per_step(run, step["batch_size"]), None
    flops, moved = sum(part.total for part in parts), sum(traffic.values()) / step["batch_size"]
    by_compute, by_memory = matmul.per_second / flops, memory.per_second / moved
    if data_seconds is not None:
        expected = 1 / Speed(1 / step["images_per_s"], data_seconds).seconds(run, machine, 1)
        wait = 1 - expected / step["images_per_s"]
        data = {"images_per_s_per_worker": 1 / data_seconds, "images_per_s_with_step": expected, "wait": wait}
    return {
        "machine": {
            "name": machine.name,
            "device": str(machine.device),
            "cores": machine.cores,
            "threads": torch.get_num_threads(),
        },
        "run": to_dict(run),
        "matmul": {"flops_per_s": matmul.per_second, "operation": matmul.operation},
        "memory": {"bytes_per_s": memory.per_second, "operation": memory.operation},
        "flops_per_image": {part.name: part._asdict() | {"total": part.total} for part in parts},
        "bytes_per_step": traffic,
        "roofline": {
            "flops_per_image": flops,
            "bytes_per_image": moved,
            "compute_images_per_s": by_compute,
            "memory_images_per_s": by_memory,
            "images_per_s": min(by_compute, by_memory),
        },
        "step": step | {"roofline_share": step["images_per_s"] / min(by_compute, by_memory)},
        "data": data,
    }


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of the printed table: quantity, value, note."""
    bound, step, data = result["roofline"], result["step"], result["data"]
    whole = sum(step["parts"].values())
    spent = [*step["parts"].items(), *list(step["operators"].items())[:NUM_OPERATORS]]
    rows = [
        ("matmul throughput", f"{result['matmul']['flops_per_s'] / 1e9:.1f} GFLOP/s", result["matmul"]["operation"]),
        ("memory bandwidth", f"{result['memory']['bytes_per_s'] / 1e9:.1f} GB/s", result["memory"]["operation"]),
        ("FLOPs per image", f"{bound['flops_per_image'] / 1e9:.3f} G", ""),
        *(
            (f"  {name}", f"{flops['total'] / 1e9:.3f} G", f"{flops['total'] / bound['flops_per_image']:.1%}")
            for name, flops in result["flops_per_image"].items()
        ),
        ("bytes per image", f"{bound['bytes_per_image'] / 1e6:.2f} MB", f"{step['batch_size']} images per step"),
        ("compute bound", f"{bound['compute_images_per_s']:.2f} images/s", ""),
        ("memory bound", f"{bound['memory_images_per_s']:.2f} images/s", ""),
        ("training step", f"{step['images_per_s']:.2f} images/s", f"{step['roofline_share']:.1%} of the roofline"),
        *((f"  {name}", f"{1000 * seconds:.1f} ms", f"{seconds / whole:.1%}") for name, seconds in spent),
        ("peak memory", f"{step['peak_memory'] / 2**30:.2f} GiB", ""),
    ]
    if data is not None:
        rows += [
            ("decode and augment", f"{data['images_per_s_per_worker']:.2f} images/s", "one worker"),
            (
                "step with data",
                f"{data['images_per_s_with_step']:.2f} images/s",
                f"{data['wait']:.0%} waiting for data",
            ),
        ]
    return rows
