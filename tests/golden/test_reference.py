"""The authors' reference numbers, one test per file; and that the check itself can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CHECKS = Path(__file__).parents[1] / "reference"
sys.path.insert(0, str(CHECKS))

import check  # noqa: E402

SHARED = Path(os.environ.get("DINO_SHARED") or Path(__file__).parents[3] / "shared")
GOLDEN = SHARED / "reference" / "golden"
FILES = list(check.entries(GOLDEN)) if GOLDEN.is_dir() else list(check.CHECKS.items())


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "reference" / "golden"


@pytest.mark.parametrize(("name", "function"), FILES, ids=[name for name, _ in FILES])
def test_reference_numbers(golden: Path, name: str, function: str | None):
    try:
        result = check.run(golden, name, function)
    except check.TodoError as todo:
        pytest.skip(str(todo))
    assert result.ok, f"{result.where}: off by {result.max_abs_error}, tolerance {result.tolerance}"


def run_check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, CHECKS / "check.py", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_wrong_number_a_missing_file_and_an_unknown_one_all_fail(golden: Path, tmp_path: Path):
    data = dict(np.load(golden / "head.npz"))
    data["plain/output"] = data["plain/output"] + 1e-3
    np.savez(tmp_path / "head.npz", **data)
    shutil.copy(golden / "vit.npz", tmp_path)
    (tmp_path / "surprise.npz").write_bytes(b"")
    (tmp_path / "loss.npz").write_bytes(b"not an archive")

    done = run_check(tmp_path)

    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1, done.stdout + done.stderr
    assert lines["vit.npz"].startswith("ok  vit.npz  max_abs_error=")
    assert "  tolerance=1e-05" in lines["vit.npz"]
    assert lines["head.npz"].startswith("FAIL  head.npz  max_abs_error=0.001  tolerance=1e-05")
    assert lines["surprise.npz"].startswith("FAIL")
    assert lines["schedules.npz"].startswith("FAIL"), "a missing file"
    assert lines["trajectory_*.npz"].startswith("FAIL"), "a missing file"
    assert lines["loss.npz"].startswith(("FAIL", "todo")), "a file that cannot be read"
    assert "official_state_dict_keys.json" not in lines, "the one optional file"
