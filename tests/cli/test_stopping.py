"""Stopping and going on: signals save and leave, and the same command again never loses what is there."""

import json
import shutil
import signal
import time

import pytest

from dino_ssl.metrics import read_metrics
from dino_ssl.terminal import Terminal

LINE = ("--optim.epochs", "12", "--log-every", "1", "--out", "run")


@pytest.fixture(scope="module")
def stopped(tiny_folder, photos, process):
    """A run that SIGTERM stopped on its way: (its folder, exit code, what it said)."""
    run = tiny_folder / "run"
    with process("train", photos, "--preset", "tiny_recipe:run", *LINE, cwd=tiny_folder) as training:
        until = time.monotonic() + 240
        while training.poll() is None and time.monotonic() < until:
            if len([row for row in read_metrics(run) if "loss" in row]) >= 2:
                break
            time.sleep(0.05)
        training.send_signal(signal.SIGTERM)
        said = "".join(training.communicate(timeout=120))
    return run, training.returncode, said


@pytest.fixture
def copy(stopped, tmp_path):
    """The stopped run in a folder that a test may go on in."""
    return shutil.copytree(stopped[0], tmp_path / "run")


def test_sigterm_saves_and_says_how_to_go_on(stopped):
    run, code, said = stopped
    assert code == 128 + signal.SIGTERM
    assert "dino train --resume run" in said
    assert (run / "checkpoints/last.pt").is_file()
    assert (run / "report.html").is_file()
    assert "Traceback" not in said


@pytest.mark.usefixtures("tiny_preset")
def test_the_same_command_again_names_both_choices(copy, photos, dino):
    ran = dino("train", photos, "--preset", "tiny_recipe:run", *LINE)
    assert ran.code == 2
    assert "--resume run" in ran.err
    assert "--out run-2" in ran.err


@pytest.mark.usefixtures("tiny_preset")
def test_the_same_command_again_asks_where_somebody_can_answer(copy, photos, dino, monkeypatch):
    monkeypatch.setattr(Terminal, "asks", property(lambda self: True))
    asked = []
    monkeypatch.setattr(Terminal, "ask", lambda self, question, answers: asked.append(question) or "q")
    assert dino("train", photos, "--preset", "tiny_recipe:run", *LINE).code == 130
    assert "stopped at step" in asked[0]


def test_a_resumed_run_keeps_what_it_learns(copy, dino):
    ran = dino("train", "--resume", copy, "--seed", "3", "--method.out-dim", "64", "--workers", "0")
    assert ran.code == 2
    assert "--seed is 0 there, got 3" in ran.err
    assert "--method.out-dim is 32 there, got 64" in ran.err
    assert "--workers" not in ran.err


def test_resume_and_preset_exclude_each_other(copy, dino):
    ran = dino("train", "--resume", copy, "--minutes", "3")
    assert ran.code == 2
    assert "--minutes" in ran.err


def test_resume_goes_on_to_the_end(copy, dino):
    before = [row["step"] for row in read_metrics(copy) if "loss" in row]
    ran = dino("train", "--resume", copy, "--dry-run")
    assert ran.code == 0, ran.err
    assert f"would go on at step {before[-1]} of" in ran.out
    ran = dino("train", "--resume", copy, "--json")
    assert ran.code == 0, ran.err
    assert f"Going on at step {before[-1]}" in ran.err
    assert ran.json["finished"]
    steps = [row["step"] for row in read_metrics(copy) if "loss" in row]
    assert steps == list(range(1, ran.json["steps"] + 1))
    assert json.loads((copy / "run.json").read_text())["run"]["optim"]["epochs"] == 12


def test_an_attempt_that_saved_nothing_starts_anew(copy, photos, dino, tiny_preset):
    shutil.rmtree(copy / "checkpoints")
    index = json.loads((copy / "snapshots/index.json").read_text())
    index["epochs"].append({"epoch": 9, "maps": {}})  # of the first attempt
    (copy / "snapshots/index.json").write_text(json.dumps(index))
    ran = dino("train", photos, "--preset", "tiny_recipe:run", "--optim.epochs", "1", "--log-every", "1", "--out", copy)
    assert ran.code == 0, ran.err
    assert [row["step"] for row in read_metrics(copy) if "loss" in row] == [1, 2]
    epochs = [entry["epoch"] for entry in json.loads((copy / "snapshots/index.json").read_text())["epochs"]]
    assert epochs == [0, 1]


def test_a_reader_who_leaves_is_no_error(process, tmp_path):
    with process("--help", cwd=tmp_path) as helping:
        helping.stdout.close()
        assert helping.stderr.read() == ""
        assert helping.wait(60) == 141


def test_two_ranks_speak_once(tiny_folder, photos, torchrun):
    done = torchrun(
        "train", photos, "--preset", "tiny_recipe:run", "--optim.epochs", "1", "--out", "two", cwd=tiny_folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The plan") == 1
    assert done.stdout.count("Training 1 epoch, ") == 1
    assert json.loads((tiny_folder / "two/run.json").read_text())["run"]["optim"]["epochs"] == 1
    assert (tiny_folder / "two/backbone.safetensors").is_file()
