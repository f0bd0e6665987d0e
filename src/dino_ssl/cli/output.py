"""Standard output and error that may be closed, full, or read by nobody: a long command goes on without them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Output:
    """A text stream that drops everything after the first error of the system, which it keeps."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text."""
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable[..., Any], *args: Any) -> None:
        if self.error is None:
            try:
                call(*args)
            except OSError as error:
                self.error = error
                with suppress(OSError):  # otherwise the interpreter prints an error about its buffer at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def safe_output() -> Iterator[Output]:
    """Replace the standard streams inside by ones whose errors end no command; yield standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file would get this number, and the messages of libraries
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        Output(stream or open(number, "w", closefd=False))  # noqa: SIM115
        for number, stream in enumerate(before, 1)
    )
    try:
        yield sys.stdout
    finally:
        sys.stdout, sys.stderr = before
