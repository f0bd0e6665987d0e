"""Data workers that cannot start, cannot send, or may not exist: one error within seconds, and a saved state."""

import errno
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.utils.data._utils as loading
from tiny import CPU, FORK, dataset_of, edit, fit, last, same_training, tiny

from dino_ssl import training
from dino_ssl.data.workers import make_loader
from dino_ssl.errors import UserError
from dino_ssl.events import Logged
from dino_ssl.training import train


class Unsendable:
    """A batch for which there is no shared memory or no open file left."""

    def __reduce__(self) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader looks every fifth of a second, instead of every five, whether its workers are alive."""
    monkeypatch.setattr(loading, "MP_STATUS_CHECK_INTERVAL", 0.2)


def message_in_child(work: Callable[[], Any]) -> str:
    """Call `work` in a process of its own, with its limits, and return the message of its UserError, or its result."""
    receiver, sender = FORK.Pipe(duplex=False)

    def answer() -> None:
        try:
            sender.send(str(work()))
        except UserError as error:
            sender.send(str(error))

    process = FORK.Process(target=answer)
    process.start()
    assert receiver.poll(60), "no answer"
    process.join(60)
    return receiver.recv()


@pytest.mark.usefixtures("impatient")
def test_a_batch_that_cannot_be_sent_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    """The queue of a worker drops such a batch; the training process waited for it forever."""
    with pytest.raises(UserError, match="data worker process died"):
        list(make_loader(lambda job: Unsendable() if job == 3 else job, range(6), workers=1))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_start_under_any_start_method(method: str) -> None:
    """A script without `if __name__ == "__main__":` would be imported, and run, again by each worker."""

    def load() -> list[int]:
        multiprocessing.set_start_method(method, force=True)
        return list(make_loader(lambda job: job * job, range(4), workers=2))

    assert message_in_child(load) == "[0, 1, 4, 9]"


def test_a_process_of_a_pool_loads_its_batches_itself() -> None:
    def load() -> list[int]:
        multiprocessing.current_process()._config["daemon"] = True  # pyright: ignore[reportAttributeAccessIssue]
        return list(make_loader(lambda job: job + 1, range(3), workers=2))

    assert message_in_child(load) == "[1, 2, 3]"


def test_too_few_open_files_for_the_workers_is_one_message() -> None:
    def load() -> list[int]:
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, used + 10))
        return list(make_loader(lambda job: job, range(3), workers=8))

    message = message_in_child(load)
    assert "8 data worker processes cannot be started" in message
    assert "ulimit -n" in message


def test_an_error_of_the_data_saves_the_training_state_first(tmp_path: Path) -> None:
    """The folder of the images disappears: every step until then is kept, and resuming equals one run."""
    narrow = dict(width=24, depth=1, heads=2)
    run = tiny(tmp_path / "run", backbone=narrow, optim=dict(epochs=2), save_minutes=60)
    dataset = run.data.open()
    read, calls = dataset.read, iter(range(10**6))

    def vanish(index: int) -> Any:
        if next(calls) >= 60:
            raise UserError("the disk is gone")
        return read(index)

    dataset.read = vanish
    with pytest.raises(UserError, match="the disk is gone"):
        list(train(run, CPU, dataset))
    assert last(run)["step"] == 7  # of 8 images each; the eighth batch was not complete
    fit(run, resume=True)
    whole = edit(run, out=str(tmp_path / "whole"))
    fit(whole)
    assert not same_training(run, whole)


def test_exhausted_memory_saves_the_training_state_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(tmp_path / "run", backbone=dict(width=24, depth=1, heads=2), optim=dict(epochs=1), save_minutes=60)
    real, calls = training._accumulate_gradients, iter(range(100))

    def fail(*args: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return real(*args)

    monkeypatch.setattr(training, "_accumulate_gradients", fail)
    with pytest.raises(UserError, match="Memory ran out: DefaultCPUAllocator"):
        fit(run)
    assert last(run)["step"] == 3
    monkeypatch.undo()
    fit(run, resume=True)
    whole = edit(run, out=str(tmp_path / "whole"))
    fit(whole)
    assert not same_training(run, whole)


def test_a_deleted_folder_ends_training_with_one_message(tmp_path: Path) -> None:
    run = tiny(tmp_path / "run", backbone=dict(width=24, depth=1, heads=2))
    events = train(run, CPU, dataset_of(run.data))  # pyright: ignore[reportArgumentType]
    while not isinstance(event := next(events), Logged) or event.clock.step < 4:
        pass
    shutil.rmtree(run.out)
    with pytest.raises(UserError, match="run was deleted or moved while it was trained"):
        list(events)
    assert not Path(run.out).exists()
