"""The documentation is right: its commands are accepted, its examples run, its links lead somewhere."""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import dino_ssl
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.eval_spec import parse_scheduled_eval
from dino_ssl.cli.evaluate import ScoreOptions, options_of
from dino_ssl.cli.help_pages import page_examples
from dino_ssl.cli.options import parse
from dino_ssl.cli.train import TrainOptions
from dino_ssl.data import sources
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals import EVALUATIONS, copy_detection, find_evaluation, retrieval, video_segmentation
from dino_ssl.evals.online import OnlineEval
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models import timm as timm_models
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.presets import plan as planning
from dino_ssl.presets.benchmark_step import Speed
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.training import train

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = ("my_method", "my_backbone", "my_eval", "my_dataset")
"""Modules of docs/python.md that extend the package."""


def documented_commands() -> list[str]:
    """Return every command line of the pages and of the evaluations' help, without comments."""
    texts = [page.read_text() for page in PAGES]
    texts += [find_evaluation(name).examples for name in EVALUATIONS]
    texts += [page_examples(command) for command in ("train", "eval finetune")]
    lines = (line for text in texts for line in re.findall(r"^ *(dino [a-z]+.*)$", text, re.MULTILINE))
    return list(dict.fromkeys(re.split(r"\s{2,}|\s#", line.strip())[0] for line in lines))


COMMANDS = documented_commands()
EVAL_ARGUMENTS = {
    line: arguments
    for line in COMMANDS
    if line.startswith("dino eval ") and (arguments := shlex.split(line)[2:])[0] in EVALUATIONS
}
ON_SCENES = {arguments[0]: line for line, arguments in EVAL_ARGUMENTS.items() if "scenes" in arguments}
SCHEDULED = sorted(set(re.findall(r'--evals[ =]"([^"]+)"', "".join(map(Path.read_text, PAGES)))))


def python_blocks(page: Path) -> list[str]:
    """Return the Python code blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the example modules of docs/python.md."""
    page = (ROOT / "docs/python.md").read_text()
    for name in EXAMPLES:
        (code,) = re.findall(rf"^`{name}\.py`.*?^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in EXAMPLES:
        sys.modules.pop(name, None)


# -- commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", EVAL_ARGUMENTS)
def test_evaluation_commands_are_accepted(line: str) -> None:
    name, *arguments = EVAL_ARGUMENTS[line]
    if "--score" in arguments:
        assert parse(ScoreOptions, [argument for argument in arguments if argument != "--score"], "dino", "").root
        return
    options = parse(options_of(find_evaluation(name)), arguments, "dino", "")
    assert options.checkpoint == arguments[0]


def test_every_evaluation_has_an_example_on_synthetic_images() -> None:
    assert ON_SCENES.keys() == EVALUATIONS.keys()


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("spec", [spec for spec in SCHEDULED if "NAME" not in spec])
def test_scheduled_evaluations_are_accepted(spec: str) -> None:
    assert str(parse_scheduled_eval(spec))


@pytest.mark.usefixtures("examples", "run")
def test_training_commands_are_accepted() -> None:
    lines = [line for line in COMMANDS if line.startswith("dino train ") and "mymodule" not in line]
    for line in lines:
        arguments = [argument for argument in shlex.split(line)[2:] if argument not in ("--help", "--help-all", "...")]
        options = CommandLine(arguments, kind=TrainOptions, prog="dino train", examples="").options()
        assert isinstance(options.run, Run), line
    assert len(lines) > 10


def test_other_commands_have_the_documented_flags(dino) -> None:
    helps: dict[str, str] = {}
    for line in COMMANDS:
        words = shlex.split(line)[1:]
        if words[0] in ("train", "eval"):
            continue
        command = words[:2] if words[0] == "data" and len(words) > 1 else words[:1]
        if " ".join(command) not in helps:
            helps[" ".join(command)] = dino(*command, "--help-all").out
        flags = [word for word in words if word.startswith("--") and word != "--help"]
        missing = [flag for flag in flags if flag.partition("=")[0] not in helps[" ".join(command)]]
        assert not missing, f"{line}: {missing}"
    assert {"attention", "embed", "track", "tsne", "pca", "ablate", "data pack", "report"} <= helps.keys()


# -- Python -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_examples_import_existing_names(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dino_ssl"):
                home = importlib.import_module(node.module or "")
                missing = [alias.name for alias in node.names if not hasattr(home, alias.name)]
                for name in list(missing):
                    if importlib.util.find_spec(f"{node.module}.{name}"):
                        missing.remove(name)
                assert not missing, f"from {node.module} import {missing}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dino_ssl":
                assert hasattr(dino_ssl, node.attr) or node.attr == "data", node.attr


@pytest.mark.usefixtures("small")
def test_extensions_of_the_python_page_train_and_evaluate(
    examples: Path, dino, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure", lambda *_: Speed(0.01, 0.01))
    scenes = Scenes(count=24, size=32, classes=4).open()
    images = np.stack([scenes.read(i) for i in range(len(scenes))])
    np.savez(examples / "images.npz", images=images, labels=scenes.labels)
    ran = dino(
        "train", "my_dataset:NumPyFile", "--data.file", "images.npz", "--evals", "my_eval:ClassMeans scenes",
        "--method", "my_method:SimSiamConfig", "--method.width", "16", "--method.hidden", "16",
        "--network", "my_backbone:SmallConvNet", "--backbone.width", "8",
        "--views.global-size", "32", "--views.local", "0", "--optim.batch-size", "8", "--optim.epochs", "1",
        "--workers", "0", "--precision", "float32", "--out", "run", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["finished"]
    assert ran.json["evals"]["my_eval:ClassMeans scenes"].keys() == {"accuracy"}
    ran = dino("eval", "my_eval:ClassMeans", "run", "scenes", "--trust", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["references"].keys() == {"raw_pixels", "random_weights"}


# -- links and names --------------------------------------------------------------------------------------------


def test_links_between_pages_lead_to_files_and_headings() -> None:
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in headings(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_code_files_that_pages_name_exist() -> None:
    missing = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for name in set(re.findall(r"`((?:benchmarks|tests|src|docs)/[\w./-]+\.\w+)", page.read_text())):
            if not (ROOT / name).exists():
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert not missing


# -- evaluations on fewer images than the word `scenes` generates ------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`scenes` generates a few small images; timm's weights are random instead of downloaded."""
    monkeypatch.setattr(sources, "DRAWN", {"train": 40, "val": 20, "test": 20})
    monkeypatch.setattr(retrieval, "SYNTHETIC_QUERIES", 6)
    monkeypatch.setattr(copy_detection, "SYNTHETIC_ORIGINALS", 6)
    monkeypatch.setattr(video_segmentation, "SYNTHETIC_CLIPS", 1)
    monkeypatch.setattr(video_segmentation, "SYNTHETIC_FRAMES", 4)
    monkeypatch.setattr(video_segmentation, "SYNTHETIC_SIZE", 64)
    create = timm_models.create
    monkeypatch.setattr(
        timm_models, "create", lambda *args, **options: create(*args, **options | {"pretrained": False})
    )


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with its checkpoint."""
    run = Run(
        data=Scenes(count=16, size=32, classes=4),
        backbone=ViT(
            width=48, depth=2, heads=3, patch=8, image_size=32
        ),  # heads of width 16, which cannot be inferred from the weights
        method=DINOConfig(out_dim=32, head_hidden=32, head_bottleneck=16),
        views=MultiCrop(global_size=24, local=0),  # differs from the size of the position embeddings
        optim=Optim(epochs=1, batch_size=8, warmup_epochs=0),
        online_eval=OnlineEval(every_epochs=0),
        workers=0,
        out=str(tmp_path_factory.mktemp("short") / "run"),
    )
    for _ in train(run, Runtime(torch.device("cpu"), "float32"), run.data.open()):
        pass
    return Path(run.out)


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """The trained run as runs/x and runs/photos, in the working directory."""
    (tmp_path / "runs").mkdir()
    for name in ("x", "photos"):
        (tmp_path / "runs" / name).symlink_to(short_run)
    return Path("runs/x")


@pytest.mark.usefixtures("small", "run")
@pytest.mark.parametrize("line", ON_SCENES.values(), ids=list(ON_SCENES))
def test_evaluation_examples_on_synthetic_images_run(line: str, dino) -> None:
    ran = dino(*shlex.split(line)[1:], "-o", "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["values"]
    assert ran.json["references"]["random_weights"].keys() == ran.json["values"].keys()
    assert Path(ran.json["file"]).parent == Path("out")


@pytest.mark.usefixtures("small")
def test_a_run_its_checkpoints_and_copies_of_them_are_evaluated_equally(dino, run: Path) -> None:
    """At the training size, with the same random weights as a reference; the table has a short column title."""
    Path("copy.pt").write_bytes((run / "checkpoints/last.pt").read_bytes())
    results, titles = [], []
    for checkpoint in (run, run / "checkpoints/last.pt", run / "backbone.safetensors", "copy.pt"):
        ran = dino("eval", "knn", checkpoint, "scenes", "--k", "5", "-o", "out", "--json")
        assert ran.code == 0, ran.err
        results.append(ran.json)
        titles.append(ran.err.splitlines()[1].split()[0])  # below the title, above the scores
    for result in results:
        assert result["checkpoint"]["size"] == 24
        assert result | {"checkpoint": ""} == results[0] | {"checkpoint": ""}
        assert result["checkpoint"]["hash"] == results[0]["checkpoint"]["hash"]
    assert len(list(Path("out").glob("*.json"))) == 1  # one network, one file
    assert titles[0] == "/".join(run.resolve().parts[-2:])
    assert titles[1:3] == [f"{run.resolve().name}/last.pt", f"{run.resolve().name}/backbone.safetensors"]
    assert titles[3].endswith("/copy.pt")


@pytest.mark.usefixtures("small", "run")
@pytest.mark.parametrize("name", ["knn", "attention-masks", "video-segmentation"])
def test_a_network_of_timm_is_evaluated(name: str, dino) -> None:
    ran = dino("eval", name, "timm:test_vit", "scenes", "--no-references", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["checkpoint"]["source"] == "timm:test_vit"
    assert not ran.json["references"]
