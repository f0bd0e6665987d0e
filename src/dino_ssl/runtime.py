"""Device, precision and ranks, decided once and passed as an object.

Nothing here knows about methods, models or data.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_ssl import distributed
from dino_ssl.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]

PATIENCE = timedelta(hours=2)
"""For what the first rank does alone while the others wait for it: looking through millions of pictures, a question at
the terminal, an evaluation. (The usual ten minutes are for networks that break.)"""


@dataclass(frozen=True)
class Machine:
    """What there is to work with; the plan quotes it."""

    device: torch.device
    name: str
    cores: int
    """Processor cores that the training's processes on this computer may use, together."""
    memory: int
    """Bytes of memory for this process: the card's, or its share of the computer's."""
    precision: Precision
    """The fastest precision that trains well here."""
    why: str
    """Why that precision."""
    ranks: int = 1
    """Processes of the training on this computer."""

    @property
    def own_cores(self) -> int:
        """Of each of these processes."""
        return self.cores // self.ranks


def machine() -> Machine:
    """Looks once at what this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        index, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= cards:
            raise UserError(
                f"{ranks} processes on this computer, which has {cards} GPU{'s' if cards > 1 else ''}: expected one "
                f"process for each. Start it with --nproc-per-node {cards}."
            )
        torch.cuda.set_device(index)  # what is asked below is asked of this card
        card = torch.cuda.get_device_properties(index)
        good = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "the card multiplies bfloat16 natively" if good else "the card has float16 but no bfloat16"
        return Machine(
            torch.device("cuda", index),
            card.name,
            cores,
            card.total_memory,
            "bfloat16" if good else "float16",
            why,
            ranks,
        )
    memory = machine_memory() // ranks
    if torch.backends.mps.is_available():
        return Machine(torch.device("mps"), "Apple GPU", cores, memory, "float32", "the reference precision", ranks)
    if _has_bfloat16():
        precision, why = "bfloat16", "the processor multiplies bfloat16"
    else:
        precision, why = "float32", "this processor has no bfloat16 instructions: emulated, they are many times slower"
    return Machine(torch.device("cpu"), _cpu(), cores, memory, precision, why, ranks)


@dataclass(frozen=True)
class Runtime:
    """The decisions, as an object to pass."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world_size: int = 1
    optimized: bool = True
    """Use optimized kernels instead of the reference implementations; the results are equal."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Runs matrix products in the chosen precision; float32 leaves everything as it is."""
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "float32")

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16; the identity otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def distribute(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it in DistributedDataParallel if there are several ranks."""
        module.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return module if self.world_size == 1 else DistributedDataParallel(module, broadcast_buffers=False)

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
        """The randomness inside the networks (drop-path) is a function of (seed, step, rank): resume needs no
        generator states, and no evaluation in between can disturb it."""
        mixed = (seed * 1_000_003 + step) * 65_537 + self.rank
        torch.manual_seed(mixed % (2**63))


@contextmanager
def start(precision: Precision | None = None) -> Iterator[Runtime]:
    """The runtime of this process, for as long as the `with` lasts. Under torchrun it joins the other ranks.

    precision: None takes what is fastest here. Raises UserError where the machine cannot do what is asked.
    """
    here = machine()
    precision = precision or here.precision
    if precision == "float16" and here.device.type == "cpu":
        raise UserError(
            "precision float16 needs a GPU; a CPU trains in float32, or in bfloat16 where it has the instructions."
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if here.device.type == "cpu":
        _keep_freed_memory()
    if here.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    joined = world > 1 and not td.is_initialized()
    if joined:
        on_card = here.device.type == "cuda"
        td.init_process_group(
            "nccl" if on_card else "gloo", timeout=PATIENCE, device_id=here.device if on_card else None
        )
    try:
        yield Runtime(here.device, precision, distributed.rank(), distributed.world_size())
    finally:
        if joined:
            td.destroy_process_group()


def _keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next step, instead of giving it back and faulting it in again.

    Activations are large and of the same sizes at every step: measured on one AVX2 core, a small ConvNet's step
    took 0.76 of the time. Other C libraries have no mallopt, and are left as they are.
    """
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AMX or AVX512-BF16 on x86, BF16 on Arm)."""
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def machine_memory() -> int:
    """Bytes this process may use: the computer's, or less inside a container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        return min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        return total


def free_memory(device: torch.device) -> int:
    """Bytes that pictures may take on a device: half of what is free on a card, a quarter of the computer's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return machine_memory() // 4


def synchronize(device: torch.device) -> None:
    """Until the device has done all that it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the card, or of the computer's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:  # of this program alone; rusage counts what started it too
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU from pinned memory, without waiting for its queued work."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
