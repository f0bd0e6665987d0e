"""Ctrl-C and SIGTERM: a request to stop that training reads between two steps."""

import signal
import threading
from typing import Any, Self

import torch

from dino_ssl import distributed
from dino_ssl.runtime import Runtime


class StopSignal:
    """A context that handles Ctrl-C and SIGTERM: the first requests a stop, a second one stops immediately."""

    number: int | None = None
    """The signal that this rank received."""

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # which alone may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def should_stop(self, rt: Runtime, step: int) -> bool:
        """Return True if any rank received a signal. Several ranks compare every 10 steps only."""
        received = self.number is not None
        if rt.world_size == 1:
            return received
        if step % 10:
            return False
        return bool(distributed.all_reduce_sum(torch.tensor([float(received)], device=rt.device)).item())
