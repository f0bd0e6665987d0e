"""Standard output that is closed, full or read by nobody; a machine without memory; a deleted folder of a run."""

import errno
import io
import sys
from pathlib import Path

import pytest

from dino_ssl import cli
from dino_ssl.errors import OutOfMemory, memory_error, memory_errors, system_error


class Full(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, "no space" if self.number == errno.ENOSPC else "broken pipe")


def run(monkeypatch: pytest.MonkeyPatch, number: int, *argv: str) -> int:
    monkeypatch.setattr(sys, "stdout", Full(number))
    return cli.main(list(argv))


def test_a_full_or_broken_standard_output_is_one_message(monkeypatch, capsys):
    assert run(monkeypatch, errno.ENOSPC, "presets") == 2
    assert capsys.readouterr().err == "dino: standard output cannot be written: no space.\n"
    assert run(monkeypatch, errno.EPIPE, "presets") == 141
    assert capsys.readouterr().err == ""


def test_training_ends_with_its_own_exit_code(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda arguments: print("The plan", flush=True) or 0)
    assert run(monkeypatch, errno.EPIPE, "train", "photos") == 0
    assert run(monkeypatch, errno.ENOSPC, "train", "photos") == 0


def test_a_closed_standard_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 1 bytes.",
        "can't start new thread",
        "CUDA out of memory. Tried to allocate 2 GiB",
        "could not create a primitive",
        "x\nlibtorch.so: failed to map segment from shared object",
    ],
)
def test_errors_of_memory_are_one_message(monkeypatch, capsys, text):
    def fail(arguments: list[str]) -> int:
        raise RuntimeError(text)

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["show"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("dino: Memory ran out: ")
    assert text.splitlines()[-1] in message
    with pytest.raises(OutOfMemory), memory_errors():
        raise RuntimeError(text)


def test_other_errors_are_not_errors_of_memory_or_the_system():
    assert memory_error(MemoryError()) is not None
    assert memory_error(OSError(errno.ENOMEM, "Cannot allocate memory")) is not None
    assert memory_error(RuntimeError("a bug")) is None
    assert memory_error(ValueError("out of memory")) is None
    assert system_error(RuntimeError("a bug")) is None
    assert "File name too long" in str(system_error(OSError(errno.ENAMETOOLONG, "File name too long", "d" * 300)))
    with pytest.raises(RuntimeError, match="a bug"), memory_errors():
        raise RuntimeError("a bug")


def test_a_name_that_is_too_long_is_one_message(capsys, photos: Path):
    assert cli.main(["train", str(photos), "--out", "d" * 300]) == 2
    assert "File name too long" in capsys.readouterr().err
