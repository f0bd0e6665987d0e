"""Help, names, the plan and output of commands: everything that needs no training."""

import io
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

import dino_ssl
from dino_ssl.api.training_progress import TrainingProgress
from dino_ssl.cli import main
from dino_ssl.cli.command_line import CommandLine, cli_diff
from dino_ssl.cli.early_checks import check_arguments
from dino_ssl.cli.embed import write_csv
from dino_ssl.cli.flags import SHORT_FLAGS, flag
from dino_ssl.cli.train import TrainOptions
from dino_ssl.config import differences, edit
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import SIMPLE_SCENES, Scenes
from dino_ssl.errors import UserError
from dino_ssl.files import mark_output
from dino_ssl.formatting import duration
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.models import Timm, ViT, backbone_named
from dino_ssl.presets import resolve
from dino_ssl.run import Run
from dino_ssl.schedules import Clock
from dino_ssl.terminal import Terminal, command_output

SRC = Path(__file__).parents[2] / "src"


def command_line(*arguments: str) -> CommandLine:
    return CommandLine(list(arguments), kind=TrainOptions, prog="dino train", examples="")


# -- help and names -------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """The files of a run that early checks read."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("run.json", "checkpoints/last.pt"):
        (tmp_path / "run" / name).touch()
    return tmp_path / "run"


def test_help_and_errors_about_names_and_paths_load_no_heavy_module(run_folder):
    cases = {
        "--help": "examples:",
        "--version": "dino",
        "train --help": "--help-all",
        "eval finetune -h": "CHECKPOINT TRAIN",
        "trian": "did you mean 'train'",
        "train": "No dataset given",
        "train /nowhere --minutes 3": "There is no file or folder /nowhere",
        "train scenes --epoch 3": "Unknown flag --epoch; did you mean --epochs?",
        "train scenes --epochs 3 --val /no/val": "There is no file or folder /no/val",
        f"train scenes --out={run_folder} --epochs 3": f"another run:         --out {run_folder}-2",
        f"eval finetune dino_vits16 scenes --out {run_folder}": f"if it stopped:  --resume {run_folder}",
        "bench /nowhere": "There is no file or folder /nowhere",
        "data pack /nowhere": "There is no file or folder /nowhere",
        "eval kn x y": "did you mean 'knn'",
        "eval knn /nowhere x": "There is no file '/nowhere'",
        "eval knn dino_vits16 /nowhere": "There is no file or folder /nowhere",
        "embed dino_vits17 x": "did you mean 'dino_vits16'",
        "attention timm:resnet18 scenes /no.jpg": "There is no file or folder /no.jpg",
    }
    code = (
        "import sys, dino_ssl, dino_ssl.cli\n"
        f"for line in {list(cases)}: print('CASE', dino_ssl.cli.main(line.split()), file=sys.stderr)\n"
        "dir(dino_ssl)\n"
        "heavy = {'torch', 'numpy', 'cv2', 'timm', 'tyro', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = dict(env={"PYTHONPATH": str(SRC)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, "-u", "-c", code], **process)
    assert done.returncode == 0, done.stdout
    outputs = dict(zip(cases, re.split(r"CASE \d\n", done.stdout), strict=False))
    for line, message in cases.items():
        assert message in outputs[line], line


def test_early_checks_pass_whatever_a_command_accepts(photos, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards.part").mkdir()  # being written: the command explains it
    for command, *words in (
        ("train", photos), ("train", "--cache", "nowhere"), ("train", "mymodule:MyDataset"), ("train", "shards"),
        ("eval", "copy-detection", "timm:resnet18", "simple-scenes", "none"), ("eval", "mymodule:Mine", photos, "x y"),
        ("eval", "video-segmentation", "results", photos, "--score"), ("eval", "finetune"), ("report", "table7"),
        *(("train", photos, "--out", run_folder, word) for word in ("-y", "--yes", "--dry-run", "--dry_run")),
        ("train", photos, "--val", "scenes"), ("train", photos, "--out"), ("embed", "dino_vits16", "--out", run_folder),
    ):  # fmt: skip
        check_arguments(command, list(map(str, words)))
    mark_output(tmp_path / "attention")
    check_arguments("data", ["check", "attention"])
    with pytest.raises(UserError, match="attention was written by dino"):
        check_arguments("train", ["attention"])


@pytest.mark.parametrize("name", ["train", "eval knn", "eval finetune", "attention", "embed", "report", "show"])
def test_help_of_every_command_ends_with_examples(dino, name):
    output = dino(*name.split(), "--help")
    assert output.code == 0
    _, _, examples = output.out.partition("\nexamples:\n")
    assert f"dino {name} " in examples


def test_help_of_train_explains_the_settings_of_a_run(dino):
    text = dino("train", "--help-all").out
    for part in (
        "--method.momentum FLOAT",
        "--views.local INT",
        "--optim.clip-grad FLOAT",
        "Number of passes over the training images",
        "--val FOLDER",
    ):
        assert part in text
    assert "{fixed}" not in text  # a setting that the command line cannot set


@pytest.mark.parametrize("columns", [70, 110])
def test_help_fills_the_width_of_the_terminal(dino, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    page, _, _ = dino("train", "--help-all").out.partition("\nexamples:")
    rows = [line.strip("│").rstrip() for line in page.splitlines()]
    texts = [(row, below.split()[0]) for row, below in pairwise(rows) if row[:3].isspace() and below[:3].isspace()]
    assert len(texts) > 20
    for row, word in texts:  # the first word of the next row has no space
        assert len(f"{row} {word}") > columns - 3


def test_flags_follow_the_types_of_the_run(dino):
    assert "--backbone.name" in dino("train", "--network", "timm:resnet18", "--help-all").out
    assert "--backbone.patch" in dino("train", "--preset", "vits8", "--help-all").out
    assert "--data.count" in dino("train", "scenes", "--help-all").out


@pytest.mark.parametrize("name", ["train", "eval finetune", "bench"])
def test_short_help_fits_two_screens_and_has_existing_flags(dino, name):
    page, everything = (dino(*name.split(), flag).out for flag in ("--help", "--help-all"))
    lines, _, examples = page.partition("\nexamples:\n")
    assert len(page.splitlines()) <= 100
    assert max(map(len, page.splitlines())) <= 120
    assert everything.partition("\nexamples:\n")[2] == examples
    flags = set(re.findall(r"(?<!dino )(--[a-z][\w.-]*\w)", lines)) - {"--help", "--help-all", "--every-epochs"}
    known = set(re.findall(r"--[a-z][\w.-]*\w", everything)) | set(SHORT_FLAGS)
    assert flags <= known
    assert len(flags) > 5


def test_presets_are_listed_with_their_results(dino):
    output = dino("presets")
    assert output.code == 0
    assert "vits16" in output.out
    assert set(dino("presets", "--json").json["presets"]) >= {"vits16", "vitb8", "resnet50", "small", "demo"}


def test_public_names_can_be_imported():
    for name in dir(dino_ssl):
        assert getattr(dino_ssl, name) is not None
    assert dir(dino_ssl) == sorted({*dino_ssl._HOMES, "__version__"})  # as `__all__`, a literal for type checkers
    assert callable(dino_ssl.train)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dino_ssl.nonsense


def test_network_names():
    assert backbone_named("vit_tiny/8") == ViT(size="tiny", patch=8)
    assert backbone_named("timm:resnet18") == Timm(name="resnet18")
    with pytest.raises(UserError, match="vit_base/16"):
        backbone_named("vit_bass/16")


# -- settings as flags ----------------------------------------------------------------------------------------


def test_differences_are_dotted_fields_and_flags():
    run = Run()
    changed = edit(run, optim=dict(batch_size=7), views=dict(local=0))
    assert differences(run, changed) == [("views.local", 8, 0), ("optim.batch_size", 1024, 7)]
    assert flag("optim.batch_size") == "--optim.batch-size"
    assert ("backbone", "ViT", "Timm") in differences(run, edit(run, backbone=Timm()))


def test_differences_as_flags_parse_to_the_same_run():
    plain = Run()
    other = edit(plain, backbone=Timm(name="resnet18"), method=BYOLConfig(predictor=False), online_eval=dict(size=64))
    line = cli_diff(plain, other)
    assert line == "--method byol --network timm:resnet18 --method.no-predictor --online-eval.size 64"
    assert command_line(*line.split()).change(plain) == other
    assert cli_diff(other, plain, ["online_eval.size"]) == "--method dino --network vit_small/16"


def test_synthetic_dataset_is_a_positional_word():
    for words, data in (
        (("scenes", "--data.count", "5"), Scenes(count=5)),
        (("--grad-checkpointing", "scenes"), Scenes(count=2000)),
        (("--json", "simple-scenes"), edit(SIMPLE_SCENES, count=2000)),
        (("--out", "scenes", "photos"), Folder(path="photos")),
        (("photos", "--evals", "knn scenes"), Folder(path="photos")),
    ):
        assert command_line(*words).options().run.data == data


def test_val_is_a_folder_or_synthetic():
    assert command_line("photos", "--val", "photos/val").options().run.val == Folder(path="photos/val")
    val = command_line("scenes", "--val", "scenes").options().run.val
    assert (val.part, val.count) == ("val", 500)
    assert command_line("photos").options().run.val is None


# -- the plan -------------------------------------------------------------------------------------------------


def test_plan_of_a_preset_shows_the_users_settings(dino, photos):
    output = dino("train", photos, "--preset", "demo", "--optim.epochs", "2", "--workers", "0", "--dry-run", "--json",
                  "--optim.batch-size", "8")  # fmt: skip
    rows = {row["name"]: row for row in output.json["plan"]}
    epochs = resolve("demo").optim.epochs
    assert f"{epochs} epochs, batch 64" in rows["preset"]["value"]
    assert (rows["epochs"]["value"], rows["epochs"]["reason"]) == ("2", f"set by you; the plan had {epochs}")
    assert rows["workers"]["value"] == "0"
    assert rows["workers"]["reason"].startswith("set by you")


def test_plan_shows_another_network_in_its_row(dino, photos, tmp_path):
    network = ("--network", "vit_tiny/8", "--backbone.depth", "1")
    output = dino("train", photos, *network, "--optim.epochs", "3", "--dry-run", "--json")
    assert output.code == 0, output.err
    plan = {row["name"]: row for row in output.json["plan"]}
    assert plan["network"]["value"].startswith("ViT-tiny/8")
    assert plan["epochs"]["value"] == "3"
    assert "backbone.depth" in plan
    assert "--backbone.depth" in output.err
    assert output.json["run"]["backbone"]["depth"] == 1
    assert output.json["run"]["backbone"]["image_size"] == output.json["run"]["views"]["global_size"]
    assert list(tmp_path.iterdir()) == []  # a dry run writes nothing


# -- output ---------------------------------------------------------------------------------------------------


def test_json_is_the_only_standard_output(capsys):
    with command_output(True) as (terminal, print_result):
        print("printed by a library")
        terminal.print("a message")
        print_result({"answer": 42})
    out, err = capsys.readouterr()
    assert out == '{"answer": 42}\n'
    assert "printed by a library" in err
    assert "a message" in err


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with command_output(False) as (terminal, print_result):
        terminal.print("a message")
        terminal.table("title", ("a", "b"), [("c", "d")])
        print_result({"answer": 42})
    assert capsys.readouterr() == ("", "")


def test_messages_are_printed_literally(capsys):
    Terminal().print("a file [bold]name[/bold] \udce9.jpg")
    assert "[bold]name[/bold] ?.jpg" in capsys.readouterr().out


def test_control_characters_do_not_reach_the_terminal(capsys, tmp_path):
    """A foreign name could clear the screen or set the title of the window; newlines and tabs belong to messages."""
    Terminal().print("a\033[2Jb\n\tc\r")
    Terminal().table("t\007", ("a",), [("x\x9bz",)])
    assert main(["embed", str(tmp_path / "no\033]0;PWN\007")]) == 2
    output = "".join(capsys.readouterr())
    assert r"a\x1b[2Jb" in output
    assert r"x\x9bz" in output
    assert r"no\x1b]0;PWN\x07" in output
    assert not set(output) & set("\033\007\r\x9b")


def test_formulas_in_csv_files_are_text(tmp_path):
    write_csv(tmp_path / "a.csv", {"name": ["=1+1", "+a", "-b.jpg", "@c", "d-e"], "score": [-1.5, 2.0, 3.0, 4.0, 5.0]})
    rows = [line.split(",") for line in (tmp_path / "a.csv").read_text().replace('"', "").splitlines()[1:]]
    assert rows == [["'=1+1", "-1.5"], ["'+a", "2"], ["'-b.jpg", "3"], ["'@c", "4"], ["d-e", "5"]]


def test_progress_shows_metrics_and_remaining_time():
    terminal = Terminal()
    terminal.console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    progress = TrainingProgress(terminal, Clock(0, 10, 3), prototypes=32)
    progress.show(Clock(10, 10, 3), {"loss": 3.25, "teacher_entropy": 2.5, "images_per_s": 123.4, "wait": 0.05})
    progress.show_activity("knn val/")
    terminal.console.print(progress.get_renderable())
    text = terminal.console.export_text()
    for part in (
        "epoch 1/3",
        "33%",
        "step 10/30",
        "loss 3.250",
        "teacher entropy 2.50 of 3.47",
        "123 images/s",
        "5% waiting",
        "0 s left",
        "knn val/ …",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("width", "last"), [(140, "5% waiting for data"), (110, "rank 43.2"), (80, "2.50 of 6.93"), (60, "loss 3.250")]
)
def test_a_narrow_terminal_shows_the_remaining_time_and_whole_metrics(width, last):
    metrics = {"loss": 3.25, "kl": 0.31, "feature_rank": 43.2, "teacher_entropy": 2.5, "images_per_s": 99, "wait": 0.05}
    terminal = Terminal()
    terminal.console = Console(force_terminal=True, width=width, record=True, file=io.StringIO())
    progress = TrainingProgress(terminal, Clock(0, 128, 300), prototypes=1024)
    progress.show_score("20-NN 43.3 %")
    progress.show(Clock(12800, 128, 300), metrics)
    terminal.console.print(progress.get_renderable())
    bar, line = terminal.console.export_text().splitlines()
    assert bar.rstrip().endswith("left")
    assert line.startswith("step 12800/38400  20-NN 43.3 %  loss 3.250")
    assert line.rstrip().endswith(last)
    progress.show_activity("knn")
    terminal.console.print(progress.get_renderable())
    assert terminal.console.export_text().rstrip().endswith("knn …")


def test_durations_have_at_most_two_units():
    texts = {8: "8 s", 200: "3 min 20 s", 599.7: "10 min", 1500: "25 min", 7500: "2 h 05 min", 360_000: "4 d 4 h"}
    assert {seconds: duration(seconds) for seconds in texts} == texts
    assert [duration(seconds) for seconds in (59.6, 3599, -1)] == ["1 min", "1 h 00 min", "0 s"]
