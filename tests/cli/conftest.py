"""A small folder of images, and one run that `dino train` trained on it, for all tests of commands."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dino_ssl.cli import main
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.presets import plan as planning
from dino_ssl.presets.benchmark_step import Speed

TINY = """
    --network vit_tiny/8 --backbone.width 48 --backbone.depth 2 --backbone.heads 2
    --method.out-dim 32 --method.head-hidden 32
    --views.global-size 32 --views.local-size 16 --views.local 2 --online-eval.size 32
    --optim.batch-size 8 --workers 0 --precision float32
""".split()  # noqa: SIM905 - as typed


class Output(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object and nothing else."""
        assert self.out.count("\n") == 1, f"more than one line on standard output: {self.out!r}"
        return json.loads(self.out)


@pytest.fixture(scope="session", autouse=True)
def known_speed() -> Iterator[None]:
    """Skip the measurement of the machine when a run is planned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "measure", lambda *_: Speed(0.01, 0.01))
        yield


@pytest.fixture
def tiny() -> list[str]:
    """Flags of a run that takes seconds."""
    return TINY


@pytest.fixture
def dino(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    for name in ("RANK", "WORLD_SIZE", "DINO_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path) -> Output:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Output(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 40 images in 4 class folders, and two files that are no images."""
    folder = tmp_path_factory.mktemp("data") / "my photos"
    Scenes(count=40, size=40, classes=4).write(folder)
    (folder / "star" / "not an image.jpg").write_text("hello")
    (folder / "star" / "empty.png").touch()
    return folder


@pytest.fixture(scope="session")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Output]:
    """A run of two epochs, and the output of the command."""
    folder = tmp_path_factory.mktemp("trained")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "110")
        code = main(["train", str(photos), *TINY, "--optim.epochs", "2", "--out", "run", "--json"])
    assert code == 0, err.getvalue()
    return folder / "run", Output(code, out.getvalue(), err.getvalue())


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
    """Folder with a module whose function `run` is a preset: `--preset tiny_recipe:run`."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tiny_recipe.py").write_text(PRESET)
    return folder


@pytest.fixture
def tiny_preset(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tiny_folder))
