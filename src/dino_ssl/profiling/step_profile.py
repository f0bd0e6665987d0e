"""Real training steps on noise: their duration, their peak memory, and the time of each part and operator."""

import statistics
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dino_ssl.presets.benchmark_step import BenchmarkStep, benchmark_step
from dino_ssl.progress import Progress
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, peak_memory
from dino_ssl.schedules import Clock

NUM_CLASSES = 10
CLOCK = Clock(1001, 10, 10**6)
"""After the epochs in which the last layer is frozen, and not the last step of an epoch."""
RANGES = ("copy to device", "teacher forward", "forward", "optimizer", "teacher and center")
"""Names of the ranges that `training.train_step` and the methods record."""


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
    """Return seconds by part and by operator, of the GPU if there is one.

    Another thread launches the backward kernels of a GPU, outside the recorded ranges. The backward pass is therefore
    the time outside all ranges, on every device; it includes gradient clipping.
    """
    on_gpu = step.rt.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        seconds = step.step(CLOCK)
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    own = {e.key: 1e-6 * (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events}
    total = {e.key: 1e-6 * (e.device_time_total if on_gpu else e.cpu_time_total) for e in events}
    parts = {name: total[name] for name in RANGES if name in total}
    parts["forward"] -= parts.get("teacher forward", 0.0)
    parts["backward"] = (sum(own.values()) if on_gpu else seconds) - sum(parts.values())
    operators = {name: value for name, value in own.items() if name.startswith("aten::") and value > 0}
    return parts, dict(sorted(operators.items(), key=lambda item: -item[1]))
