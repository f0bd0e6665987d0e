"""Worker processes that build batches ahead of the training process, and threads that wait for disks."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.queues import Queue
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from dino_ssl.errors import UserError, memory_errors
from dino_ssl.terminal import logger

A = TypeVar("A")
B = TypeVar("B")
WORKER_DIED = (
    "A data worker process died, most often because memory ran out (in a container: because the shared memory /dev/shm "
    "is too small). Resume with fewer `workers`, a smaller batch, or more shared memory (docker run --shm-size=8g)."
)
NO_WORKERS = (
    "{} data worker processes cannot be started or cannot send their batches ({}). Use fewer `workers`, or allow more "
    "open files (ulimit -n)."
)


def make_loader(
    build: Callable[[Any], Any], jobs: Iterable[Any], workers: int = 0, *, prefetch: int = 2, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield build(job) for every job in order; with `workers`, each builds up to `prefetch` batches ahead.

    A process of a pool may have no workers of its own, and builds the batches itself. Raises UserError if workers
    cannot be started or die.
    """
    if workers and multiprocessing.current_process().daemon:
        logger.info("This process may not start data workers: batches are loaded in the training process.")
        workers = 0
    others = multiprocessing.active_children()
    try:
        results = _start(build, jobs, workers, prefetch, pin_memory)
    except OSError as error:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()  # at exit, it would be waited for
        raise UserError(NO_WORKERS.format(workers, error.strerror or error)) from error
    try:
        while True:
            try:
                with memory_errors():
                    result = next(results)
            except StopIteration:
                return
            except (OSError, EOFError, RuntimeError) as error:
                if not workers or "Caught " in str(error):  # raised by `build`; DataLoader added the worker's traceback
                    raise
                if "open files" in str(error):
                    raise UserError(NO_WORKERS.format(workers, "too many open files")) from error
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                raise UserError(WORKER_DIED) from error
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        shutdown = getattr(results, "_shutdown_workers", None)
        if shutdown is not None:  # now, not when the iterator is garbage-collected
            shutdown()


def _start(
    build: Callable[[Any], Any], jobs: Iterable[Any], workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Any]:
    """Return the iterator of a DataLoader.

    On Linux workers are forked, whatever the start method of the program: others import its main module again.
    """
    with warnings.catch_warnings():
        # More workers than cores may be right if disks are slow. Forking with threads is safe, because a worker uses
        # one thread and none of its parent's locks.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        return iter(
            DataLoader(
                _Jobs(build),
                sampler=jobs,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                worker_init_fn=_start_worker,
                collate_fn=identity,
                pin_memory=pin_memory,
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            )
        )


def map_in_order(function: Callable[[A], B], items: Iterable[A], threads: int, chunk: int = 1) -> Iterator[B]:
    """Yield function(item) in order, computed by threads in chunks of items, at most four chunks a thread ahead."""
    items = iter(items)
    pending: deque[Future[list[B]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(items, chunk)):
            pending.append(pool.submit(lambda batch=batch: list(map(function, batch))))
            if len(pending) >= 4 * threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


class _Jobs(Dataset[Any]):
    """Dataset of the DataLoader: a "sample" is a complete batch, its "index" the job that describes it."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self.build = build

    def __getitem__(self, job: Any) -> Any:
        try:
            return self.build(job)
        except UserError as error:  # if raised, DataLoader would wrap it in the worker's traceback
            return error


def identity(result: Any) -> Any:
    """Return the batch unchanged, as the collate function."""
    return result


def _start_worker(_: int) -> None:
    """Ignore SIGINT and delay SIGTERM: the main process handles them and needs its workers to finish the step.

    End the process if a batch cannot be sent: a queue would print the error and drop the batch, for which the main
    process would wait forever.
    """
    Queue._on_queue_feeder_error = staticmethod(lambda error, item: os._exit(1))  # pyright: ignore
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_later)


def _exit_later(*_: object) -> None:
    signal.alarm(20) if hasattr(signal, "alarm") else os._exit(0)  # SIGALRM ends the process
