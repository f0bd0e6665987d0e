"""Help, names, and what is shown while training: all that needs no training."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from dino_ssl.api.live import TrainingProgress
from rich.console import Console

import dino_ssl as package
from dino_ssl.api.resolve import cli_diff, differences, flag
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.train import TrainOptions
from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.formatting import duration
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.models import Timm, ViT, backbone_named
from dino_ssl.run import Run
from dino_ssl.schedules import Clock
from dino_ssl.terminal import Terminal, command_output

SRC = Path(__file__).parents[2] / "src"


def test_help_and_import_are_light():
    code = (
        "import sys, dino, dino_ssl.cli; dino_ssl.cli.main(['--help']); dino_ssl.cli.main(['nonsense']); dir(dino)\n"
        "heavy = {'torch', 'numpy', 'cv2', 'timm', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


@pytest.mark.parametrize("words", [["train"], ["eval", "knn"], ["attention"], ["embed"], ["report"], ["show"]])
def test_every_commands_help_ends_with_examples(dino, words):
    ran = dino(*words, "--help")
    assert ran.code == 0
    _, _, examples = ran.out.partition("\nexamples:\n")
    assert f"dino {' '.join(words)} " in examples


def test_help_explains_every_setting_of_a_run(dino):
    ran = dino("train", "--help")
    for words in (
        "--method.momentum FLOAT",
        "--views.local INT",
        "--optim.clip-grad FLOAT",
        "Times that every picture is seen",
    ):
        assert words in ran.out


def test_a_changed_network_or_method_is_told_as_it_is_typed():
    plain = Run()
    other = edit(plain, backbone=Timm(name="resnet18"), method=BYOLConfig(predictor=False), online_eval=dict(size=64))
    line = cli_diff(plain, other)
    assert line == "--method byol --network timm:resnet18 --method.no-predictor --online_eval.size 64"
    given = CommandLine(line.split(), kind=TrainOptions, prog="dino train", examples="")
    assert given.change(plain) == other
    assert cli_diff(other, plain, ["online_eval.size"]) == "--method dino --network vit_small/16"


def test_flags_follow_the_type_of_the_network(dino, photos):
    assert "--backbone.name" in dino("train", "--network", "timm:resnet18", "--help").out
    assert "--backbone.patch" in dino("train", "--preset", "vits8", "--help").out
    assert "--data.count" in dino("train", "scenes", "--help").out


def test_presets_say_what_was_reported(dino):
    ran = dino("presets")
    assert ran.code == 0
    assert "vits16" in ran.out
    assert set(dino("presets", "--json").json["presets"]) >= {"vits16", "vitb8", "resnet50", "small", "demo"}


def test_the_package_has_its_names():
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert callable(package.train)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = package.nonsense


def test_a_switch_of_the_run_before_the_word_for_drawn_pictures(dino):
    line = dict(kind=TrainOptions, prog="dino train", examples="")
    assert CommandLine(["--recompute", "scenes"], **line).drawn() == "scenes"
    assert CommandLine(["--no-recompute", "simple-scenes"], **line).drawn() == "simple-scenes"
    assert CommandLine(["--out", "scenes", "photos"], **line).drawn() is None


def test_a_preset_s_plan_tells_what_the_line_sets(dino, photos, tmp_path):
    done = dino("train", photos, "--preset", "demo", "--optim.epochs", "2", "--workers", "0", "--dry-run", "--json",
                "--optim.batch-size", "8")  # fmt: skip
    rows = {row["name"]: row for row in done.json["plan"]}
    assert "11 epochs, batch 64" in rows["recipe"]["value"]
    assert (rows["epochs"]["value"], rows["epochs"]["why"]) == ("2", "you set it; the plan had 11")
    assert rows["workers"]["value"] == "0"
    assert rows["workers"]["why"].startswith("you set it")


def test_classes_of_one_picture_are_learnt_without_an_accuracy(dino, tmp_path, tiny):
    Scenes(count=8, size=40, classes=8).write(tmp_path / "each")
    done = dino("train", "each", *tiny, "--optim.epochs", "1", "--out", "run", "--json")
    assert done.code == 0, done.err
    assert "no class has a picture to spare" in done.err
    assert done.json["quality"] == {}


def test_network_names():
    assert backbone_named("vit_tiny/8") == ViT(size="tiny", patch=8)
    assert backbone_named("timm:resnet18") == Timm(name="resnet18")
    with pytest.raises(UserError, match="vit_base/16"):
        backbone_named("vit_bass/16")


def test_differences_are_named_as_flags():
    run = Run()
    changed = edit(run, optim=dict(batch_size=7), views=dict(local=0))
    assert differences(run, changed) == [("views.local", 8, 0), ("optim.batch_size", 1024, 7)]
    assert flag("optim.batch_size") == "--optim.batch-size"
    assert ("backbone", "ViT", "Timm") in differences(run, edit(run, backbone=Timm()))


def test_json_keeps_standard_output_to_itself(capsys):
    with command_output(True) as (terminal, give):
        print("a library says something")
        terminal.print("a message")
        give({"answer": 42})
    out, err = capsys.readouterr()
    assert out == '{"answer": 42}\n'
    assert "a library says something" in err
    assert "a message" in err


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with command_output(False) as (terminal, give):
        terminal.print("a message")
        terminal.table("title", ("a", "b"), [("c", "d")])
        give({"answer": 42})
    assert capsys.readouterr() == ("", "")


def test_messages_are_taken_as_they_are(capsys):
    Terminal().print("a file [bold]name[/bold] \udce9.jpg")
    assert "[bold]name[/bold] ?.jpg" in capsys.readouterr().out


def test_the_live_bar_shows_figures_and_time_left():
    terminal = Terminal()
    terminal.console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    watch = TrainingProgress(terminal, Clock(0, 10, 3), prototypes=32)
    watch.logged(Clock(10, 10, 3), {"loss": 3.25, "teacher_entropy": 2.5, "images_per_s": 123.4, "wait": 0.05})
    terminal.console.print(watch._draw())
    shown = terminal.console.export_text()
    for words in (
        "epoch 1/3",
        "33%",
        "step 10/30",
        "loss 3.250",
        "teacher entropy 2.50 of 3.47",
        "123 images/s",
        "5% waiting",
    ):
        assert words in shown


def test_durations():
    said = {8: "8 s", 200: "3 min 20 s", 599.7: "10 min", 1500: "25 min", 7500: "2 h 05 min", 360_000: "4 d 4 h"}
    assert {seconds: duration(seconds) for seconds in said} == said
    assert [duration(seconds) for seconds in (59.6, 3599, -1)] == ["1 min", "1 h 00 min", "0 s"]


def test_the_plan_shows_another_network_in_its_row(dino, photos, tmp_path):
    ran = dino(
        "train",
        photos,
        "--network",
        "vit_tiny/8",
        "--backbone.depth",
        "1",
        "--optim.epochs",
        "3",
        "--dry-run",
        "--json",
    )
    assert ran.code == 0, ran.err
    plan = {row["name"]: row for row in ran.json["plan"]}
    assert plan["network"]["value"] == "ViT-tiny/8"
    assert plan["epochs"]["value"] == "3"
    assert "--backbone.depth" in plan
    assert ran.json["run"]["backbone"]["depth"] == 1
    assert ran.json["run"]["backbone"]["image_size"] == ran.json["run"]["views"]["global_size"]
    assert list(tmp_path.iterdir()) == []  # a dry run writes nothing


def test_a_dry_run_refuses_what_training_would(dino, photos, tiny, tmp_path):
    for flags, said in (
        (("--optim.batch-size", "64"), "batch size 64 with 36 pictures"),
        (("--evals", "knn nowhere"), '--evals "knn nowhere" is not possible'),
        (("--val", "nowhere"), "nowhere"),
        (("--method.head-norm", "batch", "--optim.micro-batch", "2"), "batch norm"),
    ):
        ran = dino("train", photos, *tiny, *flags, "--optim.epochs", "1", "--dry-run")
        assert ran.code == 2, flags
        assert said in ran.err
    assert list(tmp_path.iterdir()) == []
