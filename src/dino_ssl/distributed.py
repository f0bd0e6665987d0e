"""Collective operations over ranks: `torch.distributed` if a process group exists, the identity otherwise.

`runtime.start` creates the process group; nothing here does. Every function may be called without one.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

T = TypeVar("T")


def _active() -> bool:
    return td.is_available() and td.is_initialized() and td.get_world_size() > 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return td.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return td.get_world_size() if _active() else 1


def is_rank0() -> bool:
    """Return True on rank 0, which logs and writes files."""
    return rank() == 0


def _all_reduce(tensor: Tensor, op: str = "SUM") -> Tensor:
    """Return the reduction over ranks; on a single rank, `tensor` itself."""
    if _active():
        tensor = tensor.clone()
        td.all_reduce(tensor, op=getattr(td.ReduceOp, op))  # some builds of torch have no torch.distributed
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the unweighted mean over ranks."""
    return _all_reduce(tensor) / world_size()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, differentiable; on a single rank, `tensor` itself."""
    return _AllReduceSum.apply(tensor) if _active() else tensor  # pyright: ignore[reportReturnType]


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Every rank's output contains this rank's input, so gradients are summed over ranks too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce_sum(gradient)


def all_reduce_logsumexp(tensor: Tensor) -> Tensor:
    """Return the element-wise log-sum-exp over ranks."""
    top = _all_reduce(tensor, "MAX")
    return top + all_reduce_sum((tensor - top).exp()).log()


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order; ranks may hold different numbers of rows."""
    if not _active():
        return tensor
    tensor = tensor.contiguous()
    count = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    td.all_gather(counts, count)
    longest = max(int(n) for n in counts)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    td.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def shard(rows: Tensor) -> Tensor:
    """Return this rank's rows of a tensor that every rank holds: row p belongs to rank p mod world size."""
    return rows[rank() :: world_size()]


def unshard(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks in their original order: the inverse of `shard`."""
    if not _active():
        return rows
    positions = torch.arange(rows.shape[0], device=rows.device) * world_size() + rank()
    return all_gather(rows)[all_gather(positions).argsort()]


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if _active():
        td.barrier()


def run_on_rank0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 only and return its result on every rank; its exception is raised on every rank."""
    if not _active():
        return work()
    outcome: list = [None, None]
    if is_rank0():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    td.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
