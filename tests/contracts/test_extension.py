"""The extension contract: a dataset, a network, a method and an evaluation from outside the package, one file each.

They train, resume, evaluate, embed, export and report as the package's own do. Their modules are imported if their
names are typed, or if the run folder that names them is trusted.
"""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import dino_ssl
from dino_ssl.cli import main
from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.presets import plan as planning
from dino_ssl.presets.benchmark_step import Speed
from dino_ssl.run import Run, read_run

DATASET = """
from dataclasses import dataclass

import numpy as np

from dino_ssl.data.dataset import DatasetConfig, ImageDataset

CLASSES = ("red", "green", "blue")


class SquareImages(ImageDataset):
    def __init__(self, count):
        names = [f"square-{i:03d}" for i in range(count)]
        labels = np.arange(count) % len(CLASSES)
        super().__init__(names=names, sizes=[(32, 32)] * count, labels=labels, classes=CLASSES)

    def read(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        x, y = rng.integers(0, 16, 2)
        image[y : y + 16, x : x + 16, index % len(CLASSES)] = 255
        return image


@dataclass(frozen=True, kw_only=True)
class Squares(DatasetConfig):
    count: int = 36

    def open(self, progress=None):
        return SquareImages(self.count)
"""

NETWORK = """
from dataclasses import dataclass

from torch import nn

from dino_ssl.models.backbone import Backbone, BackboneConfig, Features


class ConvNet(Backbone):
    patch = 8

    def __init__(self, width):
        super().__init__()
        self.embed_dim = width
        self.stages = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.Conv2d(width, width, 2, 2))

    def forward(self, images):
        return self.features(images)[0].cls

    def features(self, images, layers=1):
        feature_map = self.stages(images)
        return [Features(feature_map.mean((2, 3)), feature_map.permute(0, 2, 3, 1))]


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig(BackboneConfig):
    width: int = 16

    def build(self, *, drop_path=None):
        return ConvNet(self.width)
"""

METHOD = '''
from dataclasses import dataclass

import torch
from torch import nn

from dino_ssl.methods.method import Method, MethodConfig, Outputs


class VICReg(Method):
    """Variance-invariance-covariance regularization (Bardes et al., 2022) of two views, without a projector."""

    def __init__(self, backbone, variance, covariance):
        super().__init__()
        self.network, self.variance, self.covariance = backbone, variance, covariance

    def forward(self, batch, clock, targets=None):
        views = [self.network(view) for view in batch.views[0][:2]]
        invariance = (views[0] - views[1]).square().mean()
        variance = sum((1 - view.std(0)).relu().mean() for view in views)
        covariances = [view.T.cov().fill_diagonal_(0) for view in views]
        covariance = sum(matrix.square().sum() / len(matrix) for matrix in covariances)
        loss = invariance + self.variance * variance + self.covariance * covariance
        return Outputs(loss, None, {"loss": loss.detach(), "invariance": invariance.detach()})

    @property
    def trainable(self):
        return self.network

    @property
    def backbone(self):
        return self.network


@dataclass(frozen=True, kw_only=True)
class VICRegConfig(MethodConfig):
    global_views = 2

    variance: float = 1.0
    covariance: float = 0.04

    def build(self, context):
        return VICReg(context.build_backbone(), self.variance, self.covariance)
'''

EVALUATION = '''
from dataclasses import dataclass

from dino_ssl.data.sources import open_dataset
from dino_ssl.evals.base import Evaluation, PreparedEval, Scores, Source
from dino_ssl.evals.features import extract


@dataclass(frozen=True, kw_only=True)
class Spread(Evaluation):
    """Share of the variance of the features in their largest dimension."""

    name = "spread"
    sources = (Source("DATA", "Folder of images.", required=False),)

    percent: bool = True
    """Return percent instead of a fraction."""

    def run_sources(self, run):
        return (run.val,)

    def prepare(self, sources, context):
        dataset = open_dataset(sources[0])

        def score(backbone):
            variance = extract(backbone, dataset, context).features.var(0)
            share = float(variance.max() / variance.sum())
            return Scores({"largest": 100 * share if self.percent else share})

        data = {"data": {"images": len(dataset)}}
        return PreparedEval(name=self.name, data=data, score=score, size=context.size)
'''

MODULES = {"mydata": DATASET, "mynet": NETWORK, "mymethod": METHOD, "myeval": EVALUATION}
OPTIONS = """
    --views.global-size 32 --views.local-size 16 --views.local 0 --optim.batch-size 8 --workers 0
    --precision float32 --log-every 1 --online-eval.size 32
""".split()  # noqa: SIM905 - as typed


class Output(NamedTuple):
    """Result of one command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def known_speed() -> Iterator[None]:
    """Skip the measurement of the machine when a run is planned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "measure", lambda *_: Speed(0.01, 0.01))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory with the four modules and a folder of images; nothing else makes the modules importable."""
    folder = tmp_path_factory.mktemp("extension")
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    Scenes(count=24, size=32, classes=3).write(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def dino(folder: Path) -> Iterator[Callable[..., Output]]:
    """Run a command in `folder`, without any module that an earlier command imported."""

    def run(*arguments: str) -> Output:
        for name in MODULES:
            sys.modules.pop(name, None)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(list(arguments))
        return Output(code, out.getvalue(), err.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("RANK", "WORLD_SIZE", "DINO_DEBUG"):
            patch.delenv(name, raising=False)
        yield run
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def trained(dino: Callable[..., Output], folder: Path) -> dict[str, Any]:
    """JSON result of a training run whose dataset, method, network and evaluation are all from outside."""
    result = dino(
        "train", "mydata:Squares", "--method", "mymethod:VICRegConfig", "--network", "mynet:ConvNetConfig",
        "--method.variance", "2", "--backbone.width", "12", "--data.count", "30",
        "--evals", "myeval:Spread photos --every-epochs 1", "myeval:Spread mydata:Squares --no-percent",
        *OPTIONS, "--optim.epochs", "2", "--out", "run", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_types_from_outside_train_on_the_command_line(trained: dict[str, Any], folder: Path) -> None:
    assert trained["finished"]
    assert set(trained["evals"]) == {"myeval:Spread photos", "myeval:Spread mydata:Squares --no-percent"}
    assert "20-NN" in trained["quality"]
    saved = json.loads((folder / "run/run.json").read_text())["run"]
    types = {name: saved[name]["type"] for name in ("data", "method", "backbone")}
    assert types == {"data": "mydata:Squares", "method": "mymethod:VICRegConfig", "backbone": "mynet:ConvNetConfig"}
    assert saved["evals"][0]["evaluation"]["type"] == "myeval:Spread"
    assert (saved["data"]["count"], saved["method"]["variance"], saved["backbone"]["width"]) == (30, 2.0, 12)
    rows = {row["name"]: row for row in json.loads((folder / "run/plan.json").read_text())["plan"]}
    assert rows["method.variance"]["value"] == "2"


@pytest.mark.parametrize("command", ["train --resume", "report", "show", "embed", "eval knn"])
def test_run_folder_with_types_from_outside_needs_trust(
    command: str, trained: dict[str, Any], dino: Callable[..., Output]
) -> None:
    data = ["photos"] if command in ("embed", "eval knn") else []
    result = dino(*command.split(), "run", *data)
    assert result.code == 2
    assert "type from outside the package" in result.err
    assert "--trust" in result.err
    assert not any(name in sys.modules for name in MODULES)


def test_resume_in_the_middle_needs_trust_and_continues(dino: Callable[..., Output], folder: Path) -> None:
    line = ("train", "mydata:Squares", "--method", "mymethod:VICRegConfig", "--network", "mynet:ConvNetConfig")
    result = dino(*line, *OPTIONS, "--optim.epochs", "1", "--out", "half", "--json")
    assert result.code == 0, result.err
    steps = json.loads(result.out)["steps"]
    saved = json.loads((folder / "half/run.json").read_text())
    saved["run"]["optim"]["epochs"] = 2  # as if it had been stopped after one of two epochs
    (folder / "half/run.json").write_text(json.dumps(saved))
    refused = dino("train", "--resume", "half")
    assert refused.code == 2
    assert "mydata:Squares" in refused.err or "mynet:ConvNetConfig" in refused.err
    result = dino("train", "--resume", "half", "--trust", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["finished"]
    assert json.loads(result.out)["step"] == 2 * steps
    assert f"Resuming at step {steps}" in result.err


def test_trusted_run_evaluates_embeds_and_reports(
    trained: dict[str, Any], dino: Callable[..., Output], folder: Path
) -> None:
    for evaluation in ("knn", "myeval:Spread"):
        result = dino("eval", evaluation, "run", "photos", "--trust", "--json")
        assert result.code == 0, result.err
        assert "random_weights" in json.loads(result.out)["references"]
    result = dino("eval", "myeval:Spread", "run", "--trust", "--json", "--no-references")
    assert result.code == 0, result.err
    result = json.loads(result.out)
    assert (result["data"]["data"]["images"], result["size"]) == (3, 32)  # those that the run held out
    result = dino("eval", "knn", "run", "mydata:Squares", "--trust", "--json", "--no-references")
    assert result.code == 0, result.err
    result = dino("embed", "run", "mydata:Squares", "--trust", "-o", "features.npz", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["width"] == 12
    (folder / "run/report.html").unlink()
    result = dino("report", "run", "--trust")
    assert result.code == 0, result.err
    assert "mymethod:VICRegConfig" in (folder / "run/report.html").read_text()
    assert dino("show", "run", "--trust").code == 0


def test_exported_backbone_loads_with_trust(trained: dict[str, Any], dino: Callable[..., Output], folder: Path) -> None:
    dino("--version")  # forgets the modules
    with pytest.raises(dino_ssl.UserError, match=r"mynet:ConvNetConfig.*trust"):
        dino_ssl.load("run/backbone.safetensors")
    backbone = dino_ssl.load("run/backbone.safetensors", trust=True)
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 12)


def test_built_in_network_of_a_method_from_outside_needs_no_trust(dino: Callable[..., Output], folder: Path) -> None:
    network = ("--network", "vit_tiny/8", "--backbone.width", "24", "--backbone.depth", "1", "--backbone.heads", "2")
    line = ("train", "photos", "--method", "mymethod:VICRegConfig", *network, *OPTIONS)
    result = dino(*line, "--optim.epochs", "1", "--out", "vit", "--json")
    assert result.code == 0, result.err
    result = dino("eval", "knn", "vit", "photos", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["checkpoint"]["size"] == 32
    assert dino("embed", "vit", "photos", "-o", "vit.npz").code == 0
    assert dino("embed", "vit/checkpoints/last.pt", "photos", "-o", "vit.npz").code == 0
    assert not any(name in sys.modules for name in MODULES)


def test_installed_command_finds_modules_in_the_working_directory(folder: Path) -> None:
    """Python does not search it for an installed script."""
    code = "import sys; sys.path = [p for p in sys.path if p]; from dino_ssl.cli import main; sys.exit(main())"
    line = ("train", "mydata:Squares", "--method", "mymethod:VICRegConfig", "--network", "mynet:ConvNetConfig")
    environment = {"PYTHONPATH": str(Path(dino_ssl.__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *line, "--help-all"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for flag in ("--data.count", "--method.variance", "--backbone.width"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "mydata:Circles"), "has no attribute 'Circles'"),
        (("train", "nodata:Squares"), "No module named 'nodata'"),
        (("train", "mynet:ConvNetConfig"), "dataclass derived from dino_ssl.data.dataset.DatasetConfig"),
        (("train", "photos", "--method", "mynet:ConvNetConfig"), "derived from dino_ssl.methods.method.MethodConfig"),
        (("train", "photos", "--network", "mymethod:VICReg"), "derived from dino_ssl.models.backbone.BackboneConfig"),
        (("eval", "myeval:Spred", "dino_vits16", "photos"), "has no attribute 'Spred'"),
    ],
)
def test_wrong_names_are_refused(arguments: tuple[str, ...], message: str, dino: Callable[..., Output]) -> None:
    result = dino(*arguments)
    assert result.code == 2
    assert message in result.err


class Noise(Dataset):
    """A torch dataset of random images."""

    def __init__(self, seed: int) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], index % 2


@pytest.mark.parametrize("kind", ["torch dataset", "list of arrays"])
def test_dataset_object_trains_and_resumes(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "dino_ssl")
    dataset, other = (Noise(seed) if kind == "torch dataset" else list(Noise(seed).images) for seed in (0, 1))
    settings: dict[str, Any] = dict(
        preset=Run(
            backbone=dino_ssl.ViT(width=24, depth=1, heads=2, patch=8, image_size=32),
            method=DINOConfig(out_dim=16, head_hidden=16, head_bottleneck=8),
        ),
        views=dict(global_size=32, local=0),
        workers=0,
        out=tmp_path / "run",
        quiet=True,
    )
    outcome = dino_ssl.train(dataset, **settings, optim=dict(epochs=1, batch_size=8, warmup_epochs=0))
    assert outcome.finished
    assert capfd.readouterr() == ("", "")
    assert "Training 1 epoch, 2 steps" in caplog.text
    saved = json.loads((tmp_path / "run/run.json").read_text())
    assert saved["run"]["data"]["type"] == "ExternalDataset"
    assert saved["run"]["data"]["length"] == 20
    assert json.loads((tmp_path / "run/plan.json").read_text())["format"] == 1
    saved["run"]["optim"]["epochs"] = 2
    (tmp_path / "run/run.json").write_text(json.dumps(saved))
    with pytest.raises(dino_ssl.UserError, match="another dataset"):
        dino_ssl.train(other, out=tmp_path / "run", resume=True, quiet=True)
    resumed = dino_ssl.train(dataset, out=tmp_path / "run", resume=True, quiet=True)
    assert resumed.finished
    assert resumed.clock.step == 2 * outcome.clock.step
    assert read_run(tmp_path / "run").data == from_dict(type(resumed.run.data), to_dict(resumed.run.data))
    assert len(dino_ssl.embed(outcome.folder, dataset).names) == 20
