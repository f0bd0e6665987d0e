"""Talking between processes: the identity where there is one, torch.distributed where torchrun started several.

Nothing here starts a process group; `runtime.py` does, once. Every function may be called without one.
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
    return td.get_rank() if _active() else 0


def world() -> int:
    return td.get_world_size() if _active() else 1


def is_main() -> bool:
    return rank() == 0


def mean(tensor: Tensor) -> Tensor:
    """The mean over the ranks, each counted alike; the argument itself where there is one rank."""
    if not _active():
        return tensor
    total = tensor.clone()
    td.all_reduce(total)
    return total / world()


def total(tensor: Tensor) -> Tensor:
    """The sum over the ranks; the argument itself where there is one rank. The gradient of the sum of all ranks' losses
    goes back through it."""
    return _Total.apply(tensor) if _active() else tensor  # pyright: ignore[reportReturnType]


class _Total(torch.autograd.Function):
    """What a rank adds is in every rank's sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        summed = tensor.clone()
        td.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return total(gradient)


def most(tensor: Tensor) -> Tensor:
    """The largest of the ranks' values, place by place; the argument itself where there is one rank."""
    if not _active():
        return tensor
    largest = tensor.clone()
    td.all_reduce(largest, op=td.ReduceOp.MAX)
    return largest


def logsumexp(tensor: Tensor) -> Tensor:
    """The logarithm of the sum over the ranks of exp(tensor), place by place; as it came where there is one rank."""
    top = most(tensor)
    return top + total((tensor - top).exp()).log()


def gather(tensor: Tensor) -> Tensor:
    """Each rank's rows one below the other, in the order of ranks; the ranks may hold different numbers of rows."""
    if not _active():
        return tensor
    tensor = tensor.contiguous()
    count = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(world())]
    td.all_gather(counts, count)
    most = max(int(n) for n in counts)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    td.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def shard(rows: Tensor) -> Tensor:
    """This rank's part of rows that every rank holds, dealt out as the loader deals a batch: row p to rank p mod n."""
    return rows[rank() :: world()]


def unshard(rows: Tensor) -> Tensor:
    """The rows of all ranks in the order in which they were dealt out: what `shard` undoes."""
    if not _active():
        return rows
    dealt = torch.arange(rows.shape[0], device=rows.device) * world() + rank()
    return gather(rows)[gather(dealt).argsort()]


def barrier() -> None:
    if _active():
        td.barrier()


def on_main(work: Callable[[], T]) -> T:
    """The result of `work`, done on rank 0 alone and sent to every rank; what it raises is raised on all."""
    if not _active():
        return work()
    box: list = [None, None]
    if is_main():
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    td.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
