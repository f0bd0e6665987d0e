"""Real training steps on noise: their duration, their peak memory, and the time of each part and operator."""

import statistics
from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile

from dino_ssl.presets.benchmark_step import BenchmarkStep, benchmark_step
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, peak_memory
from dino_ssl.schedules import Clock

NUM_CLASSES = 10
CLOCK = Clock(1001, 10, 10**6)
"""After the epochs in which the last layer is frozen, and not the last step of an epoch."""
RANGES = {
    "copy to device": "copy to device",
    "teacher forward": "teacher forward",
    "forward": "student forward and loss",
    "autograd::engine::evaluate_function": "backward",
    "Optimizer.step": "optimizer",
    "after_step": "teacher and center",
}
"""Parts of a step by the prefix of their profiler events; some are recorded by this package, the others by torch."""


def profile_step(run: Run, rt: Runtime, steps: int, progress: Progress) -> dict[str, Any]:
    """Run a warm-up step, `steps` timed steps and one step under torch.profiler, of `optim.batch_size` images.

    Returns batch_size, times (seconds of each timed step), seconds (their median), images_per_s, peak_memory (bytes, of
    the GPU or of this process), parts and operators (seconds by name in the profiled step; the parts sum to the step).
    """
    batch_size, times = run.optim.batch_size, []
    step = benchmark_step(run, rt, batch_size, NUM_CLASSES)
    for number in range(steps + 1):
        progress(number, steps + 2)
        times.append(step.step(CLOCK))
    seconds, peak = statistics.median(times[1:]), peak_memory(rt.device)
    progress(steps + 1, steps + 2)
    parts, operators = _profile(step)
    return {
        "batch_size": batch_size,
        "times": times[1:],
        "seconds": seconds,
        "images_per_s": batch_size / seconds,
        "peak_memory": peak,
        "parts": parts,
        "operators": operators,
    }


def _profile(step: BenchmarkStep) -> tuple[dict[str, float], dict[str, float]]:
    """Return seconds by part and by operator, of the GPU if there is one. A nested part counts once."""
    on_gpu = step.rt.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        seconds = step.step(CLOCK)
    parts, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in profiler.events() or ():
        if event.device_type.name != "CPU":  # GPU kernels count in the event that launched them
            continue
        total = event.device_time_total if on_gpu else event.cpu_time_total
        if event.name.startswith("aten::"):
            operators[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        elif part := _part(event):
            parts[part] += total
            parent = event.cpu_parent
            while parent is not None and not _part(parent):
                parent = parent.cpu_parent
            if parent is not None:
                parts[_part(parent)] -= total
    whole = sum(operators.values()) if on_gpu else 1e6 * seconds
    parts["other"] = whole - sum(parts.values())
    return (
        {name: 1e-6 * parts[name] for name in (*RANGES.values(), "other") if name in parts},
        {name: 1e-6 * operators[name] for name in sorted(operators, key=lambda name: -operators[name])},
    )


def _part(event: Any) -> str:
    return next((part for start, part in RANGES.items() if event.name.startswith(start)), "")
