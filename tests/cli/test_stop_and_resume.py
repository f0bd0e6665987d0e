"""Stopped runs: a signal saves, and the same command again never loses a run."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from dino_ssl import cli
from dino_ssl.files import locked
from dino_ssl.metrics import read_metrics

FORK = multiprocessing.get_context("fork")
"""A fork has imported torch already."""
LINE = ("--optim.epochs", "12", "--log-every", "1", "--out", "run")


def steps_of(run):
    return [row["step"] for row in read_metrics(run) if "loss" in row]


@pytest.fixture(scope="module")
def stopped(tiny_folder, photos):
    """A run that SIGINT (Ctrl-C) stopped: (its folder, exit code, output)."""
    run, outputs = tiny_folder / "run", tiny_folder / "output.txt"

    def train() -> None:
        os.chdir(tiny_folder)
        sys.path.insert(0, str(tiny_folder))
        with outputs.open("w") as output, redirect_stdout(output), redirect_stderr(output):
            code = cli.main(["train", str(photos), "--preset", "tiny_recipe:run", *LINE])
        sys.exit(code)

    training = FORK.Process(target=train)
    training.start()
    assert training.pid
    deadline = time.monotonic() + 240
    while training.is_alive() and time.monotonic() < deadline and len(steps_of(run)) < 2:
        time.sleep(0.05)
    os.kill(training.pid, signal.SIGINT)
    training.join(timeout=120)
    return run, training.exitcode, outputs.read_text()


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of the stopped run, to be resumed."""
    return shutil.copytree(stopped[0], tmp_path / "run")


def test_ctrl_c_saves_and_prints_how_to_resume(stopped):
    run, code, output = stopped
    assert code == 128 + signal.SIGINT
    assert "dino train --resume run" in output
    assert (run / "checkpoints/last.pt").is_file()
    assert (run / "report.html").is_file()
    assert "Traceback" not in output


@pytest.mark.usefixtures("tiny_preset")
def test_same_command_again_names_how_to_resume_or_to_start_anew(copy, photos, dino):
    output = dino("train", photos, "--preset", "tiny_recipe:run", *LINE)
    assert output.code == 2
    assert "--resume run" in output.err
    assert "--out run-2" in output.err


def test_resume_with_other_training_settings_is_refused(copy, dino):
    output = dino("train", "--resume", copy, "--seed", "3", "--method.out-dim", "64", "--workers", "0")
    assert output.code == 2
    assert "--seed was 0, got 3" in output.err
    assert "--method.out-dim was 32, got 64" in output.err
    assert "--workers" not in output.err


def test_resume_continues_to_the_end(copy, dino):
    last = steps_of(copy)[-1]
    output = dino("train", "--resume", copy, "--dry-run")
    assert output.code == 0, output.err
    assert f"would resume at step {last} of" in output.out
    assert steps_of(copy)[-1] == last
    output = dino("train", "--resume", copy, "--json", "--no-thumbnails")
    assert output.code == 0, output.err
    assert f"Resuming at step {last}" in output.err
    assert output.json["finished"]
    assert steps_of(copy) == list(range(1, output.json["steps"] + 1))
    assert json.loads((copy / "run.json").read_text())["run"]["optim"]["epochs"] == 12
    assert "data:image/jpeg" not in (copy / "report.html").read_text()
    assert not (copy / "snapshots/neighbors.json").exists()


def test_a_run_is_trained_by_one_process_at_a_time(copy, dino):
    receiver, sender = FORK.Pipe(duplex=False)

    def hold() -> None:
        with locked(copy):
            sender.send("held")
            time.sleep(120)

    other = FORK.Process(target=hold)
    other.start()
    assert receiver.recv() == "held"
    output = dino("train", "--resume", copy)
    other.kill()
    other.join()
    assert output.code == 2
    assert f"is being trained by process {other.pid} on " in output.err
    with locked(copy):  # a killed process does not hold it
        pass


@pytest.mark.usefixtures("tiny_preset")
def test_run_without_a_checkpoint_is_started_again(copy, photos, dino):
    shutil.rmtree(copy / "checkpoints")
    index = json.loads((copy / "snapshots/index.json").read_text())
    index["epochs"].append(9)  # of the first attempt
    (copy / "snapshots/index.json").write_text(json.dumps(index))
    preset = ("--preset", "tiny_recipe:run", "--optim.epochs", "1", "--log-every", "1")
    output = dino("train", photos, *preset, "--out", copy)
    assert output.code == 0, output.err
    assert steps_of(copy) == [1, 2]
    assert json.loads((copy / "snapshots/index.json").read_text())["epochs"] == [0, 1]


def test_closed_standard_output_is_no_error():
    command, source = [sys.executable, "-m", "dino_ssl", "--help"], {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    with subprocess.Popen(command, env=os.environ | source, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as helping:
        assert helping.stdout
        assert helping.stderr
        helping.stdout.close()
        assert helping.stderr.read() == b""
        assert helping.wait(60) == 141
