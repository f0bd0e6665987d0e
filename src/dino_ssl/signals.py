"""Ctrl-C and SIGTERM ask; training answers between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dino_ssl import distributed
from dino_ssl.runtime import Runtime


class Stop:
    """Whether somebody asked to stop, and by which signal; set by the signal, read between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def should_stop(self, rt: Runtime, step: int) -> bool:
        """Whether any rank was asked. Ranks agree every 10 steps; one process asks itself at each."""
        asked = self.signal is not None
        if rt.world_size == 1:
            return asked
        if step % 10:
            return False
        return bool(distributed.all_reduce_sum(torch.tensor([float(asked)], device=rt.device)).item())


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop after the step in hand; a second Ctrl-C stops at once, unsaved."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
