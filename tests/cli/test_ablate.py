"""`dino ablate`: runs that are stopped, resumed, shared between tables or fail, and the page at the end."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import pytest
import torch

from dino_ssl.ablations import runner
from dino_ssl.ablations.bases import IMAGES_SEEN
from dino_ssl.ablations.runner import (
    LOCKED,
    RunLocked,
    complete,
    final_state,
    missing_metrics,
    run_parallel,
    run_serial,
)
from dino_ssl.ablations.study import (
    RESULT,
    ROOT,
    STUDY,
    Study,
    StudyRun,
    link_shared_runs,
    read_study,
    resolve_study,
)
from dino_ssl.ablations.tables import get_table
from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.files import read_json
from dino_ssl.metrics import read_metrics
from dino_ssl.runtime import Runtime
from dino_ssl.terminal import Terminal

SRC = Path(__file__).parents[2] / "src"
RUNTIME = Runtime(torch.device("cpu"), "float32")
QUIET = Terminal(quiet=True)
PRESET = """
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals.online import OnlineEval
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run

def run():
    return Run(
        data=Scenes(count=44, size=32, classes=4),
        backbone=ViT(width=48, depth=1, heads=1, patch=8, image_size=32),
        method=DINOConfig(out_dim=32, head_hidden=32, head_bottleneck=16, momentum=0.9),
        views=MultiCrop(global_size=32, local_size=16, local=1),
        optim=Optim(batch_size=8, epochs=2, warmup_epochs=0),
        online_eval=OnlineEval(every_epochs=1), workers=0, log_every=1, precision="float32",
    )
"""
LINE = ("ablate", "table9", "--preset", "tiny_table:run")
"""Batch sizes of 16 to 128 and of 8 on 40 training images: sizes above 40 fail."""


def tiny_study(root: Path, name: str, **options) -> Study:
    namespace: dict = {}
    exec(PRESET, namespace)
    study = resolve_study(get_table(name), "small", root, preset=namespace["run"](), **options)
    study.write()
    return study


def run_of(study: Study, name: str, seed: int = 0) -> StudyRun:
    return StudyRun(study, study.table.select([name])[0], seed)


def losses(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


def interrupt(when) -> threading.Thread:
    """Send Ctrl-C to this process as soon as the condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 200
        while not when() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_run_is_resumed_and_a_failed_run_does_not_stop_the_others(dino, tmp_path, monkeypatch) -> None:
    study = tiny_study(tmp_path / ROOT, "table9", epochs=24)
    run = run_of(study, "8")
    thread = interrupt(lambda: len(losses(run.folder)) >= 2)
    assert runner.main(str(study.folder), "8", "0", "False") == 128 + signal.SIGINT
    thread.join()
    assert run.state == "incomplete"
    assert 2 <= len(losses(run.folder)) < 60
    assert run_serial([run], False, QUIET) == (None, 0)
    assert run.state == "done"
    assert [line["step"] for line in losses(run.folder)] == list(range(1, 61)), "12 epochs of 5 steps, each once"
    assert run.result is not None
    epochs, values = run.result.curves["loss"]
    assert len(epochs) == len(values) == runner.CURVE_POINTS
    assert (epochs[-1], values[-1]) == pytest.approx((12, losses(run.folder)[-1]["loss"]), rel=1e-4)
    assert run.result.date == date.today().isoformat()
    shutil.move(run.folder, tmp_path / "whole")
    run.folder.mkdir()
    shutil.copy(tmp_path / "whole" / RESULT, run.folder)  # of another computer: done, but nothing else can be measured
    assert run.state == "done"
    assert run_serial([run], False, QUIET) == (None, 1)
    assert "not the weights" in run.error
    shutil.rmtree(run.folder)
    shutil.move(tmp_path / "whole", run.folder)

    (tmp_path / "tiny_table.py").write_text(PRESET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(SRC))
    several, one = (*LINE, "--only", "512", "8", "--processes", "2", "--json"), (*LINE, "--only", "8")
    ran = dino(*several)
    assert ran.code == 1, ran.err
    assert "batch 512, seed 0: failed: " in ran.err
    results = {item["name"]: item for item in ran.json["configurations"]}
    assert results["8"]["runs"][0]["state"] == "done"
    assert results["8"]["ours"]["20-NN"]["n"] == 1
    assert results["128"]["runs"] == []
    assert results["512"]["runs"][0]["state"] == "failed"
    assert "batch" in results["512"]["runs"][0]["error"]
    assert "UserError" in (study.folder / "512/seed0/log.txt").read_text()
    page = Path(ran.json["report"]).read_text()
    assert "| batch 8, half the epochs |" in page
    first, second = (shlex.join(["dino", *line]) for line in (several[:-1], one))  # without --json
    assert read_json(study.folder / STUDY)["commands"] == [first]
    assert f"Run again:\n\n    {first}\n" in page
    assert dino(*one).code == 0
    assert read_json(study.folder / STUDY)["commands"] == [first, second]

    ran = dino("report", "table9", "--markdown", "docs", "--json")
    assert ran.code == 0
    assert "| batch 8, half the epochs |" in Path("docs/table9.md").read_text()
    ran = dino(*one, "--epochs", "6")
    assert ran.code == 2
    assert "`optim.epochs` is 24 there, got 6" in ran.err
    ran = dino("ablate", "table9", "--data", "scenes", "--preset", "small")
    assert ran.code == 2
    assert "--data is 44 images there, got 2,000 other images" in ran.err


def test_listing_dry_run_and_error_messages(dino):
    assert set(dino("ablate", "--json").json["tables"]) >= {"table7", "fig7", "attention-heads"}
    ran = dino("ablate", "fig7", "--dry-run")
    assert ran.code == 0
    assert "--method.no-sharpening" in ran.out
    ran = dino("ablate", "table7", "--dry-run")
    assert "--method byol" in ran.out
    assert not any(word in ran.out for word in ("Config", "True", "False", "None"))
    for words, message in (
        (("ablate", "table6"), "did you mean"),
        (("ablate", "table7", "--only", "dinos", "--dry-run"), "did you mean 'dino'"),
        (("ablate", "table7"), "set --data to a folder"),
        (("ablate", "table7", "--minutes", "3", "--epochs", "3"), "--minutes and --epochs"),
        (("report", "fig7"), "Run it: dino ablate fig7"),
        (("report", "fig77"), "did you mean 'fig7'"),
        (("report", "runs/nothing"), "No run in runs/nothing"),
    ):
        ran = dino(*words)
        assert ran.code == 2, words
        assert message in ran.err


# -- one run, in this process -------------------------------------------------------------------------------


def test_a_run_has_the_metrics_of_its_table_and_is_shared_with_other_tables(tmp_path):
    study = tiny_study(tmp_path, "fig6")
    run = run_of(study, "momentum")
    assert complete(run, False, RUNTIME, QUIET) is None
    result = run.result
    assert result is not None
    assert {"20-NN", "student 20-NN", "entropy", "kl", "hours", "memory"} <= set(result.values)
    assert 0 < result.values["entropy"] < 100
    assert result.values["memory"] > 0.05
    assert list(run.line("student 20-NN")[0]) == [1, 2]

    assert not missing_metrics(run, linear=False)
    assert missing_metrics(run, linear=True) == ["linear"]
    trained = read_metrics(run.folder)
    assert complete(run, True, RUNTIME, QUIET) is None
    assert run.result is not None
    assert run.result.values["linear"] >= 0
    assert run.result.values["20-NN"] == result.values["20-NN"]
    assert read_metrics(run.folder) == trained, "nothing is trained again"

    other = tiny_study(tmp_path, "fig7")
    runs = [run_of(other, name, seed) for seed in (0, 1) for name in ("both", "sharpening")]
    assert link_shared_runs(runs, tmp_path) == 1
    assert [run.state for run in runs] == ["done", "not run", "not run", "not run"]
    assert runs[0].result == run.result
    assert run_of(tiny_study(tmp_path, "table7"), "dino").state == "not run"


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    run = run_of(tiny_study(tmp_path, "fig6"), "student")
    run.folder.mkdir(parents=True)
    with (run.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunLocked, match="another process"):
            complete(run, False, RUNTIME, QUIET)
    assert not run.error
    assert final_state(run, LOCKED, False) == "being trained by another process"


def test_the_epochs_at_scale_small_follow_from_the_number_of_images(tmp_path):
    table = get_table("fig7")
    study = resolve_study(table, "small", tmp_path, data=Scenes(count=1000, size=32))
    assert study.base.optim.epochs == round(IMAGES_SEEN / 900)
    study.write()
    again = resolve_study(table, "small", tmp_path)
    assert again.base == study.base
    assert read_study(study.folder) == again
    with pytest.raises(UserError, match="1,000 images there, got 900 other images"):
        resolve_study(table, "small", tmp_path, preset=edit(study.base, data=Scenes(count=900, size=32)))


def processes(monkeypatch, **scripts: str) -> None:
    """Replace the process of each configuration by a script."""

    def start(run: StudyRun, linear: bool, env) -> subprocess.Popen:
        run.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", scripts[run.configuration.name]], start_new_session=True)

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)


def test_processes_that_end_without_a_result_have_failed(tmp_path, monkeypatch):
    study = tiny_study(tmp_path, "fig7")
    processes(monkeypatch, both="", sharpening="import os; os.kill(os.getpid(), 9)", centering="exit(3)")
    runs = [run_of(study, item.name) for item in study.table.configurations]
    assert run_parallel(runs, False, 2, QUIET) == (None, 2)
    assert "was killed" in runs[1].error
    assert "exit code 3" in runs[2].error
    assert "log.txt" in runs[2].error


def test_a_signal_is_forwarded_and_no_further_process_starts(tmp_path, monkeypatch):
    study = tiny_study(tmp_path, "fig7")
    runs = [run_of(study, item.name) for item in study.table.configurations]
    started = [tmp_path / str(number) for number in range(3)]
    wait = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit({}))\n"
    wait += "pathlib.Path({!r}).touch()\ntime.sleep(120)"
    scripts = [wait.format(143, str(path)) for path in started]
    processes(monkeypatch, both=scripts[0], sharpening=scripts[1], centering=scripts[2])
    thread = interrupt(lambda: started[0].exists() and started[1].exists())
    assert run_parallel(runs, False, 2, QUIET) == (signal.SIGINT, 0)
    thread.join()
    assert not started[2].exists()
    assert not any(run.error for run in runs)
