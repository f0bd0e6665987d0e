"""The command lines of the documentation work as they are typed: all are understood, and those on `scenes` are run."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from dino_ssl.cli.eval_spec import parse_scheduled_eval
from dino_ssl.cli.evaluate import ScoreOptions, options_of
from dino_ssl.cli.options import parse
from dino_ssl.data import sources
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals import EVALUATIONS, copy_detection, find_evaluation, retrieval, video_segmentation
from dino_ssl.evals.online import OnlineEval
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models import timm as timm_models
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.training import train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def typed() -> dict[str, str]:
    """Every line of `dino eval` in the pages and in --help, without its remark: {line: where it stands}."""
    texts = {page.name: page.read_text() for page in PAGES}
    texts |= {f"dino eval {name} --help": find_evaluation(name).examples for name in EVALUATIONS}
    lines = {}
    for place, text in texts.items():
        for line in re.findall(r"^ *(dino eval .*)$", text, re.MULTILINE):
            lines.setdefault(re.split(r"\s{2,}|\s#", line.strip())[0], place)
    return lines


LINES = typed()
NAMED = {line: words for line in LINES if (words := shlex.split(line)[2:]) and words[0] in EVALUATIONS}
DRAWN = {words[0]: line for line, words in NAMED.items() if "scenes" in words}
ASKED = sorted(set(re.findall(r'--evals[ =]"([^"]+)"', "".join(map(Path.read_text, PAGES)))))


@pytest.mark.parametrize("line", NAMED)
def test_it_is_understood(line: str) -> None:
    name, *words = NAMED[line]
    if "--score" in words:
        assert parse(ScoreOptions, [word for word in words if word != "--score"], "dino", "").root
        return
    options = parse(options_of(find_evaluation(name)), words, "dino", "")
    assert options.checkpoint == words[0]


def test_every_evaluation_has_a_line_that_needs_no_files() -> None:
    assert DRAWN.keys() == EVALUATIONS.keys()


@pytest.mark.parametrize("words", [words for words in ASKED if "NAME" not in words])
def test_evaluations_on_the_way_are_understood(words: str) -> None:
    assert str(parse_scheduled_eval(words))


# -- run, on fewer pictures than the word `scenes` draws --------------------------------------------------------


QUICK = {"linear": ("--epochs", "2", "--lr", "0.1"), "low-shot": ("--share", "1", "--size", "32")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`scenes` draws a few small pictures; timm's weights are random instead of downloaded."""
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
def trained_a_little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with its checkpoint."""
    run = Run(
        data=Scenes(count=16, size=32, classes=4),
        backbone=ViT(width=48, depth=2, heads=3, patch=8, image_size=32),  # heads of 16: the weights do not tell
        method=DINOConfig(out_dim=32, head_hidden=32, head_bottleneck=16),
        views=MultiCrop(global_size=24, local=0),  # not the side that the positions are made for
        optim=Optim(epochs=1, batch_size=8, warmup_epochs=0),
        online_eval=OnlineEval(every_epochs=0),
        workers=0,
        out=str(tmp_path_factory.mktemp("little") / "run"),
    )
    for _ in train(run, Runtime(torch.device("cpu"), "float32"), run.data.open()):
        pass
    return Path(run.out)


@pytest.fixture
def run(trained_a_little: Path, tmp_path: Path) -> Path:
    """The trained run, called runs/x."""
    (tmp_path / "runs").mkdir()
    for name in ("x", "photos"):
        (tmp_path / "runs" / name).symlink_to(trained_a_little)
    return Path("runs/x")


@pytest.mark.usefixtures("small", "run")
@pytest.mark.parametrize("line", DRAWN.values(), ids=list(DRAWN))
def test_it_runs(line: str, dino) -> None:
    ran = dino(*shlex.split(line)[1:], "-o", "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["values"]
    assert ran.json["references"]["random_weights"].keys() == ran.json["values"].keys()
    assert Path(ran.json["file"]).parent == Path("out")


@pytest.mark.usefixtures("small")
def test_a_run_its_checkpoints_and_their_copies_are_one_network(dino, run: Path) -> None:
    """Asked at the size it was trained at, beside the same random weights; the table's head is short."""
    Path("away.pt").write_bytes((run / "checkpoints/last.pt").read_bytes())
    told, heads = [], []
    for checkpoint in (run, run / "checkpoints/last.pt", run / "backbone.safetensors", "away.pt"):
        words = ("eval", "knn", checkpoint, "scenes", "--k", "5")
        ran = dino(*words, "-o", "out", "--json")
        assert ran.code == 0, ran.err
        told.append(ran.json)
        heads.append(ran.err.splitlines()[1].split()[0])  # below the title, over the figures
    for one in told:
        assert {**one, "checkpoint": one["checkpoint"]["hash"]} == {
            **told[0],
            "checkpoint": told[0]["checkpoint"]["hash"],
        }
        assert one["checkpoint"]["size"] == 24
    assert len(list(Path("out").glob("*.json"))) == 1  # one network, one file
    assert heads[1:] == [f"{run.resolve().name}/last.pt", f"{run.resolve().name}/backbone.safetensors", heads[3]]
    assert heads[0] == "/".join(run.resolve().parts[-2:])
    assert heads[3].endswith("/away.pt")


@pytest.mark.usefixtures("small", "run")
@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_network_of_timm_will_do(name: str, dino) -> None:
    ran = dino("eval", name, "timm:test_vit", "scenes", "--no-references", "-o", "out", "--json", *QUICK.get(name, ()))
    assert ran.code == 0, ran.err
    assert ran.json["checkpoint"]["source"] == "timm:test_vit"
    assert not ran.json["references"]
