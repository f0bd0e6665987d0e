"""Checkpoints are written atomically, loaded without running code, and rejected with a clear error if invalid."""

import errno
import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_ssl import checkpoint
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, write_json


def saved(step: int = 3, size: int = 10) -> dict[str, Any]:
    return dict(
        format=checkpoint.FORMAT,
        run={"type": "Run", "seed": 1},
        step=step,
        method={"center": torch.arange(size, dtype=torch.float32)},
        backbone="teacher.backbone.",
        optimizer={"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        scaler={},
        best={"value": 41.5, "epoch": 2},
        data="abc",
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """A good checkpoint of step 1."""
    return checkpoint.save(tmp_path / "checkpoints" / "last.pt", saved(step=1))


def still_good(path: Path) -> bool:
    return files(path.parent) == [path.name] and checkpoint.load(path)["step"] == 1


def test_a_loaded_checkpoint_equals_the_saved_one(last: Path) -> None:
    assert still_good(last)
    checkpoint.save(last, saved(step=7))
    found = checkpoint.load(last)
    assert found["step"] == 7
    assert found["best"] == {"value": 41.5, "epoch": 2}
    assert torch.equal(found["method"]["center"], torch.arange(10.0))
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    assert files(last.parent) == ["last.pt"]


def test_a_name_as_long_as_the_system_allows_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".json")
    assert len(path.name.encode()) == 255
    write_json(path, {"a": 1})
    assert files(tmp_path) == [path.name]


def test_file_permissions_are_the_default_ones(last: Path) -> None:
    plain = last.with_name("plain")
    plain.touch()
    assert oct(last.stat().st_mode) == oct(plain.stat().st_mode)


# -- writing fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("wrapped", [False, True], ids=["OSError", "RuntimeError of torch"])
def test_a_failed_write_keeps_the_old_file(
    last: Path, number: int, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(data: Any, file: Any) -> None:
        file.write(b"half of it")
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            if wrapped:
                raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 9 vs 8")  # noqa: B904
            raise

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(UserError, match=rf"Cannot write .*last\.pt: {os.strerror(number)}"):
        checkpoint.save(last, saved(step=2))
    assert still_good(last)


def test_a_full_disk_is_reported_with_advice(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # some file systems only report the lost data here
    with pytest.raises(UserError, match=r"full.*free some space"):
        checkpoint.save(last, saved(step=2))
    assert still_good(last)


def test_an_interrupted_write_keeps_the_old_file(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(last, saved(step=2))
    monkeypatch.undo()
    assert still_good(last)


def test_an_unrelated_error_is_not_reported_as_a_disk_error(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: Any, file: Any) -> None:
        raise RuntimeError("a bug in the program")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(last, saved(step=2))
    monkeypatch.undo()
    assert still_good(last)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if made.returncode:
        pytest.skip(f"needs permission to mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    path = checkpoint.save(small_disk / "last.pt", saved(step=1))
    with pytest.raises(UserError, match="full"):
        checkpoint.save(path, saved(step=2, size=300_000))
    assert still_good(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_writing_to_dev_full_is_a_user_error(tmp_path: Path) -> None:
    def write(aside: Path) -> None:
        aside.symlink_to("/dev/full")
        aside.write_bytes(b"x" * 10)

    with pytest.raises(UserError, match="full"):
        atomic_write(tmp_path / "file", write)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        checkpoint.save(tmp_path / "file" / "last.pt", saved())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_user_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"Cannot write .*last\.pt: Permission denied\. Choose another path"):
            checkpoint.save(tmp_path / "last.pt", saved())
    finally:
        tmp_path.chmod(0o700)


# -- invalid files -----------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def evil_zip(good: bytes, evil: bytes) -> bytes:
    """Return a valid torch checkpoint whose pickle is replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, evil if name.endswith("/data.pkl") else source.read(name))
    return out.getvalue()


@pytest.mark.parametrize("form", ["pickle", "torch", "zip", "old torch", "inside the state"])
def test_a_malicious_checkpoint_is_rejected_without_running_code(tmp_path: Path, last: Path, form: str) -> None:
    mark, path = tmp_path / "owned", tmp_path / "evil.pt"
    evil = Evil(mark)
    match form:
        case "pickle":
            path.write_bytes(pickle.dumps(evil))
        case "torch":
            torch.save(evil, path)
        case "zip":
            path.write_bytes(evil_zip(last.read_bytes(), pickle.dumps(evil, protocol=2)))
        case "old torch":
            torch.save(evil, path, _use_new_zipfile_serialization=False)
        case _:
            torch.save({**saved(), "best": {"value": evil}}, path)
    with pytest.raises(UserError, match=r"evil\.pt is not a readable file") as caught:
        checkpoint.load(path)
    assert "weights_only" not in str(caught.value)  # torch would suggest weights_only=False
    assert not mark.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the payload does run if it is unpickled


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04 no zip", b"\x80\x02.", b"\xff\xd8\xff\xe0" * 50, os.urandom(4096)]
)
def test_a_file_that_is_not_a_checkpoint_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is not a"):
        checkpoint.load(path)


def test_a_truncated_checkpoint_is_rejected(last: Path) -> None:
    whole = last.read_bytes()
    for share in (0.05, 0.3, 0.5, 0.9, 0.999):
        last.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=r"last\.pt is not a"):
            checkpoint.load(last)


def test_a_changed_byte_of_a_tensor_is_detected_by_the_checksum(last: Path) -> None:
    content = bytearray(last.read_bytes())
    start = content.find(torch.arange(10.0).numpy().tobytes())
    content[start + 8] ^= 1
    last.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(last)
    (last.parent / "best.pt").touch()
    with pytest.raises(UserError, match=r"The same folder has best\.pt: copy one over it to resume from there"):
        checkpoint.load(last)


def test_the_error_for_other_torch_files_lists_the_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(2), "step": 3}, path)
    with pytest.raises(UserError, match=r"not a training checkpoint.*lacks format, run, method, backbone, optimizer"):
        checkpoint.load(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(UserError, match="not a training checkpoint"):
        checkpoint.load(path)


def test_another_format_version_is_rejected(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT + 1}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=rf"has format {checkpoint.FORMAT + 1}.*reads format {checkpoint.FORMAT}"):
        checkpoint.load(tmp_path / "last.pt")


def test_the_error_for_a_missing_checkpoint_has_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No checkpoint at .*checkpoints/last\.pt"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="No checkpoint at"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("step", -5), ("step", "x"), ("method", [1]), ("best", None), ("data", 3)]
)
def test_a_field_of_a_wrong_type_or_value_is_rejected(tmp_path: Path, field: str, value: Any) -> None:
    torch.save(saved() | {field: value}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=rf"last\.pt is damaged: {field} is "):
        checkpoint.load(tmp_path / "last.pt")
