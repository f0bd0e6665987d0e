"""What a method remembers of earlier batches: MoCo's keys, SwAV's features."""

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The newest `size` rows that were pushed, the same on every rank, and a part of the method's state.

    A ring: a batch that does not divide the size wraps around, and of a batch larger than the size the newest rows
    stay.
    """

    rows: Tensor
    born: Tensor
    """[size] int64: the step in which each row came; -1 where none has come yet."""
    place: Tensor
    """Where the next row goes."""

    def __init__(self, size: int, *shape: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, *shape))
        self.register_buffer("born", torch.full((size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._full = False

    @torch.no_grad()
    def push(self, rows: Tensor, step: int) -> None:
        """rows [n, ...] of all ranks, the oldest first."""
        size = len(self.rows)
        new = rows[-size:]
        at = (self.place + torch.arange(len(rows), device=rows.device)[-size:]) % size
        self.rows.index_copy_(0, at, new.to(self.rows))
        self.born.index_fill_(0, at, step)
        self.place.copy_((self.place + len(rows)) % size)

    def is_full(self) -> bool:
        """Whether every place is taken; asks the device until it is, and never again."""
        self._full = self._full or bool(self.born[-1] >= 0)
        return self._full

    def since(self, step: int) -> Tensor:
        """[size] bool: which rows came in this step or later."""
        return (self.born >= 0) & (self.born >= step)
