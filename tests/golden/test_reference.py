"""The authors' reference numbers: a committed subset, and all of them if `../shared` (or DINO_SHARED) exists."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REFERENCE = Path(__file__).parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))

import check  # noqa: E402

COMMITTED = Path(__file__).with_name("data")
SHARED = Path(os.environ.get("DINO_SHARED") or Path(__file__).parents[3] / "shared") / "reference" / "golden"
FILES = [(COMMITTED, path.name) for path in sorted(COMMITTED.iterdir())]
if SHARED.is_dir():
    FILES += [(SHARED, name) for name, _ in check.entries(SHARED)]


@pytest.mark.parametrize(("folder", "name"), FILES, ids=[f"{folder.name}-{name}" for folder, name in FILES])
def test_reference_numbers(folder: Path, name: str) -> None:
    function = dict(check.entries(folder))[name]
    result = check.run(folder, name, function)
    assert result.ok, f"{result.where}: off by {result.max_abs_error}, tolerance {result.tolerance}"


def test_check_fails_on_wrong_numbers_and_on_missing_unknown_and_unreadable_files(tmp_path: Path) -> None:
    data = dict(np.load(COMMITTED / "head.npz"))
    data["bn/output"] = data["bn/output"] + 1e-3
    np.savez(tmp_path / "head.npz", **data)
    shutil.copy(COMMITTED / "vit.npz", tmp_path)
    (tmp_path / "surprise.npz").write_bytes(b"")
    (tmp_path / "loss.npz").write_bytes(b"not an archive")

    command = [sys.executable, REFERENCE / "check.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1, done.stdout + done.stderr
    assert lines["vit.npz"].startswith("ok  vit.npz  max_abs_error=")
    assert "  tolerance=1e-05" in lines["vit.npz"]
    assert lines["head.npz"].startswith("FAIL  head.npz  max_abs_error=0.001  tolerance=1e-05")
    assert lines["surprise.npz"].startswith("FAIL"), "an unknown file"
    assert lines["schedules.npz"].startswith("FAIL"), "a missing file"
    assert lines["trajectory_*.npz"].startswith("FAIL"), "a missing file"
    assert lines["loss.npz"].startswith("FAIL"), "an unreadable file"
    assert "official_state_dict_keys.json" not in lines, "the only optional file"
