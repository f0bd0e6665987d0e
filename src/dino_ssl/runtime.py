"""Device, precision and ranks, decided once and passed as an object.

This module does not depend on methods, models or data.
"""

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_ssl import distributed
from dino_ssl.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Time that ranks wait for rank 0: scanning millions of images, a question at the terminal, an evaluation. The default
of ten minutes is too short for these."""


@dataclass(frozen=True)
class Machine:
    """The hardware of this process."""

    device: torch.device
    name: str
    """Name of the GPU, or of the processor with its vector instructions: `AMD EPYC (AVX512, bfloat16)`."""
    cores: int
    """CPU cores that all training processes on this computer may use together."""
    memory: int
    """Bytes of memory for this process: of the GPU, or its share of the computer's."""
    precision: Precision
    """The fastest precision that trains well on this hardware."""
    precision_reason: str
    ranks: int = 1
    """Training processes on this computer."""

    @property
    def inference_precision(self) -> Precision:
        """bfloat16 if the hardware supports it, otherwise float32."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"

    @property
    def cores_per_rank(self) -> int:
        """CPU cores of each training process."""
        return self.cores // self.ranks


def machine(device: str | torch.device | None = None) -> Machine:
    """Detect the hardware. device: cpu, cuda, cuda:1, mps, ...; None chooses a GPU if there is one.

    Raises UserError if the machine does not have the device, or if there are more processes than GPUs.
    """
    chosen = _choose_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", 1))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # before the queries below
        gpu = torch.cuda.get_device_properties(chosen)
        precision, reason = "float16", "the GPU supports float16 but not bfloat16"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            precision, reason = "bfloat16", "the GPU supports bfloat16"
        return Machine(chosen, gpu.name, cores, gpu.total_memory, precision, reason, ranks)
    memory = machine_memory() // ranks
    if chosen.type == "mps":
        return Machine(chosen, "Apple GPU", cores, memory, "float32", "the reference precision", ranks)
    name, has_bfloat16 = _cpu_info()
    precision, reason = "float32", "the processor has no bfloat16 instructions; emulation is many times slower"
    if has_bfloat16:
        precision, reason = "bfloat16", "the processor has bfloat16 instructions"
    return Machine(chosen, name, cores, memory, precision, reason, ranks)


def _choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device of this process; `cuda` without a number is the GPU of its rank."""
    rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(f"cuda:{i}" for i in range(num_gpus)), *["mps"] * torch.backends.mps.is_available()]
    name = str(device or ("cuda" if num_gpus else known[-1]))
    if name == "cuda" and num_gpus:
        name = f"cuda:{rank}"
        if rank >= num_gpus:
            raise UserError(
                f"{ranks} processes on this computer, which has {num_gpus} GPU{'s' if num_gpus > 1 else ''}: expected "
                f"one process per GPU. Start it with torchrun --nproc-per-node {num_gpus}."
            )
    if name not in known:
        raise UserError(f"`device` {name} is not available: torch finds {', '.join(known)} on this machine.")
    if ranks > 1 and name.startswith("cuda:") and name != f"cuda:{rank}":
        raise UserError(f"`device` {name} is one GPU for {ranks} processes: expected cuda, which is one GPU for each.")
    return torch.device(name)


@dataclass(frozen=True)
class Runtime:
    """Device, precision and ranks of this process."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world_size: int = 1
    optimized: bool = True
    """Use optimized kernels instead of the reference implementations; the results are equal."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of the precision; float32 disables it."""
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "float32")

    def scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler; it is enabled for float16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def distribute(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it in DistributedDataParallel if there are several ranks."""
        module.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.world_size == 1:
            return module
        model = DistributedDataParallel(module)
        model.broadcast_buffers = False  # an argument whose name depends on torch's version; statistics stay per rank
        return model

    def no_sync(self, model: nn.Module, *, last: bool) -> AbstractContextManager:
        """Return the context of one micro-batch: gradients are averaged over ranks after the last one only."""
        if last or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def to_device(self, values: Tensor) -> Tensor:
        """Copy a tensor to the device; to a GPU on a separate stream, so that the copy overlaps with computation."""
        if self.device.type != "cuda":
            return values.to(self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copy_stream):
            copied = values.to(self.device, non_blocking=True)
        current.wait_stream(self._copy_stream)
        copied.record_stream(current)  # its memory is not reused before the step that reads it is done
        return copied

    @cached_property
    def _copy_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def seed_step(self, seed: int, step: int) -> None:
        """Seed the random numbers inside networks (drop-path) as a function of (seed, step, rank).

        Checkpoints need no generator states, and an evaluation between two steps changes nothing.
        """
        mixed = (seed * 1_000_003 + step) * 65_537 + self.rank
        torch.manual_seed(mixed % (2**63))


@contextmanager
def start(precision: Precision | None = None, device: str | torch.device | None = None) -> Iterator[Runtime]:
    """Yield the runtime of this process; under torchrun, join the process group of all ranks.

    precision: None uses the fastest one. device: see `machine`. Raises UserError if the machine does not support one.
    """
    hardware = machine(device)
    device, precision = hardware.device, precision or hardware.precision
    on_gpu = device.type == "cuda"
    if device.type == "cpu":
        if precision == "float16":
            raise UserError("`precision` float16 needs a GPU: use float32 or bfloat16.")
        _keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    joined = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not td.is_initialized()
    if joined:
        td.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT, device_id=device if on_gpu else None
        )
    try:
        yield Runtime(device, precision, distributed.rank(), distributed.world_size())
    finally:
        if joined:
            td.destroy_process_group()


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system after every step.

    Activations have the same sizes in every step. Measured on one AVX2 core: a step of a small ConvNet takes 0.76 of
    the time. Other C libraries have no mallopt and are left unchanged.
    """
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def _cpu_info() -> tuple[str, bool]:
    """Return the processor's name with its vector instructions, and True if they include bfloat16.

    bfloat16 instructions are AMX or AVX512-BF16 on x86, BF16 on Arm. Processors of the same name differ in speed by a
    factor of several.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    name = match[1] if match else platform.processor() or platform.machine()
    has_bfloat16 = bool({"amx_bf16", "avx512_bf16", "bf16"} & set(text.split()))
    instructions = [torch.backends.cpu.get_cpu_capability().removeprefix("DEFAULT"), "bfloat16" * has_bfloat16]
    listed = ", ".join(filter(None, instructions))
    return f"{name} ({listed})" if listed else name, has_bfloat16


def machine_memory() -> int:
    """Return the bytes of memory of the computer, or the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of the GPU, or of the computer."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:  # of this program only; rusage includes its parent process before exec
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
