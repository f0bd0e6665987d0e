"""A small folder of pictures, and one run that the command line trained on it, for all tests of commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dino_ssl.cli import main
from dino_ssl.data.synthetic.scenes import Scenes

SRC = Path(__file__).parents[2] / "src"
TINY = """
    --network vit_tiny/8 --backbone.width 48 --backbone.depth 2 --backbone.heads 2
    --method.out-dim 32 --method.head-hidden 32
    --views.global-size 32 --views.local-size 16 --views.local 2
    --optim.batch-size 8 --workers 0 --precision float32
""".split()  # noqa: SIM905 - as a person types it


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object and nothing else."""
        assert self.out.count("\n") == 1, f"more than one line on standard output: {self.out!r}"
        return json.loads(self.out)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "COLUMNS": "110"}


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "dino_ssl", *map(str, words)]


def spawn(*words: str | Path, cwd: Path) -> Ran:
    """The command as a person runs it: a process of its own."""
    done = subprocess.run(command(*words), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def tiny() -> list[str]:
    """Flags of a run that takes seconds."""
    return TINY


@pytest.fixture
def dino(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The command in this process, in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    for name in ("RANK", "WORLD_SIZE", "DINO_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures in 4 class folders, and two files that are none."""
    folder = tmp_path_factory.mktemp("data") / "my photos"
    Scenes(count=40, size=40, classes=4).write(folder)
    (folder / "star" / "not a picture.jpg").write_text("hello")
    (folder / "star" / "empty.png").touch()
    return folder


@pytest.fixture(scope="session")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A run of two epochs, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    ran = spawn("train", photos, *TINY, "--optim.epochs", "2", "--out", "run", "--json", cwd=folder)
    assert ran.code == 0, ran.err
    return folder / "run", ran


PRESET = """
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run

def run():
    return Run(
        backbone=ViT(width=48, depth=1, heads=1, patch=8, image_size=32),
        method=DINOConfig(out_dim=32, head_hidden=32),
        views=MultiCrop(global_size=32, local_size=16, local=0),
        optim=Optim(batch_size=18, warmup_epochs=0),
    )
"""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of one's own, whose function `run` is a recipe: `--preset tiny_recipe:run`."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tiny_recipe.py").write_text(PRESET)
    return folder


@pytest.fixture
def tiny_preset(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tiny_folder))


@pytest.fixture(scope="session")
def process():
    """Starts the command and leaves it running, both outputs in pipes."""

    def start(*words: str | Path, cwd: Path) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command(*words), cwd=cwd, env=environment(), stdout=pipe, stderr=pipe, text=True)

    return start


@pytest.fixture(scope="session")
def torchrun():
    """The command on two processes."""

    def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        line = [*launcher, *command(*words)[1:]]
        return subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)

    return run
