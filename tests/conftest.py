"""Shared fixtures: the location of the reference data, and a fixed number of threads."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of pytest share two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with reference numbers and real data; tests that need it are skipped if it is missing."""
    folder = Path(os.environ.get("DINO_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: no folder {folder} (set DINO_SHARED to its path)")
    return folder
