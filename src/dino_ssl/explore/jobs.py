"""Long work of the page: one computation at a time in a background thread, with progress; it can be cancelled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dino_ssl.errors import UserError
from dino_ssl.progress import Progress, StartProgress
from dino_ssl.terminal import logger


class Cancelled(Exception):  # noqa: N818 - not an error
    """Raised inside of a job by its progress callback after `Jobs.cancel`."""


class Jobs:
    """The job that runs or ran last, and the last result of each kind of job."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self._state: dict[str, Any] = {"kind": None, "state": "done", "step": "", "done": 0, "total": 0, "message": ""}
        self._lock, self._cancel = threading.Lock(), threading.Event()

    @property
    def state(self) -> dict[str, Any]:
        """The kind, the state (running, done, failed, cancelled), the step, its progress, an error message, results."""
        return {**self._state, "results": sorted(self.results)}

    def start(self, kind: str, work: Callable[[StartProgress], Any]) -> None:
        """Call work(start_progress) in a thread and keep its result. Raises UserError while another job runs."""
        with self._lock:
            if self._state["state"] == "running":
                raise UserError(f"Wait for the computation of the {self._state['kind']} to end, or cancel it.")
            self._cancel = threading.Event()
            self._state = {"kind": kind, "state": "running", "step": "", "done": 0, "total": 0, "message": ""}
        threading.Thread(target=self._run, args=(kind, work, self._state, self._cancel), daemon=True).start()

    def cancel(self) -> None:
        """Let the running job end at its next progress report."""
        self._cancel.set()

    def _run(
        self, kind: str, work: Callable[[StartProgress], Any], state: dict[str, Any], cancel: threading.Event
    ) -> None:
        def progress(done: int, total: int) -> None:
            if cancel.is_set():
                raise Cancelled
            state.update(done=done, total=total)

        @contextmanager
        def start(step: str) -> Iterator[Progress]:
            progress(0, 0)
            state.update(step=step)
            yield progress

        try:
            result = work(start)
            progress(state["done"], state["total"])  # cancelled after its last report
            self.results[kind] = result
            state.update(state="done")
        except Cancelled:
            state.update(state="cancelled")
        except UserError as error:
            state.update(state="failed", message=str(error))
        except Exception as error:  # the page shows it, and the server continues
            logger.exception(f"The computation of the {kind} failed")
            state.update(state="failed", message=f"{type(error).__name__}: {error}")
