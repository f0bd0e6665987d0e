"""A queue of tensors from earlier batches: MoCo's keys, SwAV's features."""

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """A ring buffer of the newest `size` rows, equal on all ranks and part of the method's state.

    A batch that does not divide the size wraps around; of a batch larger than the size, the newest rows are kept.
    """

    rows: Tensor
    born: Tensor
    """[size] int64: the step in which each row was pushed; -1 for empty entries."""
    place: Tensor
    """Index of the next row."""

    def __init__(self, size: int, *shape: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, *shape))
        self.register_buffer("born", torch.full((size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._full = False

    @torch.no_grad()
    def push(self, rows: Tensor, step: int) -> None:
        """Replace the oldest rows by `rows` [n, ...] of all ranks, whose first is the oldest."""
        size = len(self.rows)
        indices = (self.place + torch.arange(len(rows), device=rows.device)[-size:]) % size
        self.rows.index_copy_(0, indices, rows[-size:].to(self.rows))
        self.born.index_fill_(0, indices, step)
        self.place.copy_((self.place + len(rows)) % size)

    def is_full(self) -> bool:
        """Return True if no entry is empty; synchronizes with the device as long as it returns False."""
        self._full = self._full or bool(self.born[-1] >= 0)
        return self._full

    def pushed_since(self, step: int) -> Tensor:
        """Return a mask of the rows pushed in this step or later, [size] bool."""
        return (self.born >= 0) & (self.born >= step)
