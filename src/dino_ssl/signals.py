"""Ctrl-C and SIGTERM: a request to stop that training reads between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dino_ssl import distributed
from dino_ssl.runtime import Runtime


class StopSignal:
    """The signal that requested a stop; None so far. Set by the signal handler, read between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def should_stop(self, rt: Runtime, step: int) -> bool:
        """Return whether any rank received a signal. Several ranks compare every 10 steps only."""
        received = self.signal is not None
        if rt.world_size == 1:
            return received
        if step % 10:
            return False
        return bool(distributed.all_reduce_sum(torch.tensor([float(received)], device=rt.device)).item())


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Handle Ctrl-C and SIGTERM: the first stops after the current step, a second Ctrl-C stops immediately."""
    stop = StopSignal()

    def request(number: int, frame: Any) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone may set handlers
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
