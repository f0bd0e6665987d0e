"""`dino ablate`: runs that are stopped, resumed, shared between tables or fail, and the page at the end."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from dino_ssl.ablations.bases import IMAGES_SEEN
from dino_ssl.ablations.job_pool import JobPool, Task
from dino_ssl.ablations.results import ROOT, STUDENT, Study, read_student_scores, read_study
from dino_ssl.ablations.run_lock import RunLocked
from dino_ssl.ablations.runner import complete
from dino_ssl.ablations.study import StudyOptions, is_incomplete, make_job, resolve_study, reuse_result
from dino_ssl.ablations.tables import get_table
from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.metrics import read_metrics
from dino_ssl.runtime import Runtime
from dino_ssl.terminal import Terminal

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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    (folder / "tiny_table.py").write_text(PRESET)
    return folder


@pytest.fixture(scope="module")
def stopped(workdir, process):
    """A run of 12 epochs that SIGTERM stopped: (exit code, output)."""
    folder = workdir / ROOT / "table9/small/8/seed0"
    with process(*LINE, "--only", "8", "--epochs", "24", cwd=workdir) as running:
        deadline = time.monotonic() + 270
        while running.poll() is None and time.monotonic() < deadline:
            if len([line for line in read_metrics(folder) if "loss" in line]) >= 2:
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        output = "".join(running.communicate(timeout=240))
    return running.returncode, output


def test_a_table_is_resumed_and_a_failed_run_does_not_stop_it(stopped, workdir, dino, monkeypatch):
    code, output = stopped
    assert code == 128 + signal.SIGTERM, output
    assert "8: stopped" in output
    folder = workdir / ROOT / "table9/small/8/seed0"
    before = [line["step"] for line in read_metrics(folder) if "loss" in line]
    assert 2 <= len(before) < 60

    monkeypatch.chdir(workdir)
    monkeypatch.syspath_prepend(str(workdir))
    ran = dino(*LINE, "--only", "512", "8", "--processes", "2", "--json")
    assert ran.code == 1, ran.err
    results = {item["name"]: item for item in ran.json["configurations"]}
    assert results["8"]["runs"][0]["state"] == "done"
    assert results["8"]["ours"]["20-NN"]["n"] == 1
    assert results["128"]["runs"] == []
    assert results["512"]["runs"][0]["state"] == "failed"
    assert "batch" in results["512"]["runs"][0]["error"]
    steps = [line["step"] for line in read_metrics(folder) if "loss" in line]
    assert steps == list(range(1, 61)), "12 epochs of 5 steps, each once"
    assert f"Resuming at step {before[-1]}" in (folder / "log.txt").read_text()

    ran = dino("report", "table9", "--markdown", "docs", "--json")
    assert ran.code == 0
    assert "batch 8, half the epochs" in Path(ran.json["report"]).read_text()
    assert "| batch 8, half the epochs |" in Path("docs/table9.md").read_text()

    ran = dino(*LINE, "--only", "8", "--epochs", "6")
    assert ran.code == 2
    assert "`optim.epochs` is 24 there, got 6" in ran.err
    ran = dino("ablate", "table9", "--data", "scenes", "--preset", "small")
    assert ran.code == 2
    assert "another dataset: 44 images there, 2,000 now" in ran.err


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


def tiny_study(root: Path, name: str = "fig6", **options) -> Study:
    namespace: dict = {}
    exec(PRESET, namespace)
    study = resolve_study(get_table(name), "small", StudyOptions(preset=namespace["run"](), **options), root)
    study.write()
    return study


def test_a_run_has_the_metrics_of_its_table_and_is_shared_with_other_tables(tmp_path):
    study = tiny_study(tmp_path)
    run = study.study_run(study.table.configuration("momentum"), 0)
    rt, states = Runtime(torch.device("cpu"), "float32"), []
    job = make_job(study, run)
    result = complete(job, rt, Terminal(quiet=True), lambda state, **values: states.append(state))
    assert {"20-NN", "student 20-NN", "entropy", "kl", "hours", "memory"} <= set(result.values)
    assert 0 < result.values["entropy"] < 100
    assert result.values["memory"] > 0.05
    assert [score["epoch"] for score in read_student_scores(run.folder)] == [1, 2]
    assert {"training", "evaluated"} <= set(states)

    more = make_job(study, run, linear=True)
    assert not is_incomplete(run, job)
    assert is_incomplete(run, more)
    trained = read_metrics(run.folder)
    again = complete(more, rt, Terminal(quiet=True), lambda state, **values: None)
    assert again.values["linear"] >= 0
    assert again.values["20-NN"] == result.values["20-NN"]
    assert read_metrics(run.folder) == trained, "nothing is trained again"

    other = tiny_study(tmp_path, "fig7")
    both, sharpening = (other.study_run(other.table.configuration(name), 0) for name in ("both", "sharpening"))
    assert reuse_result(other, both, make_job(other, both), tmp_path)
    assert both.result == run.result
    assert not reuse_result(other, sharpening, make_job(other, sharpening), tmp_path)
    seed1 = other.study_run(other.table.configuration("both"), 1)
    assert not reuse_result(other, seed1, make_job(other, seed1), tmp_path), "another seed"
    (run.folder / STUDENT).unlink()
    same = tiny_study(tmp_path / "x", "fig6").study_run(study.table.configuration("momentum"), 0)
    assert not reuse_result(study, same, make_job(study, same), tmp_path), "the student was not evaluated"


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    study = tiny_study(tmp_path)
    run = study.study_run(study.table.configuration("student"), 0)
    run.folder.mkdir(parents=True)
    with (run.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunLocked):
            complete(make_job(study, run), Runtime(torch.device("cpu"), "float32"), Terminal(quiet=True), print)


def test_the_epochs_at_scale_small_follow_from_the_number_of_images(tmp_path):
    study = resolve_study(get_table("fig7"), "small", StudyOptions(data=Scenes(count=1000, size=32)), tmp_path)
    assert study.base.optim.epochs == round(IMAGES_SEEN / 900)
    study.write()
    again = resolve_study(get_table("fig7"), "small", StudyOptions(), tmp_path)
    assert again.base == study.base
    assert read_study(study.folder) == again
    with pytest.raises(UserError, match=r"another dataset: 1,000 images there, 900 now"):
        resolve_study(
            get_table("fig7"), "small", StudyOptions(preset=edit(study.base, data=Scenes(count=900, size=32))), tmp_path
        )


# -- several processes --------------------------------------------------------------------------------------


def pool(folder: Path, *scripts: str, processes: int = 1) -> JobPool:
    tasks = [
        Task(str(number), [sys.executable, "-c", script], folder / f"{number}.txt")
        for number, script in enumerate(scripts)
    ]
    return JobPool(tasks, processes, {"PYTHONUNBUFFERED": "1"})


def test_the_pool_reports_progress_and_the_reason_of_a_failure(tmp_path):
    jobs = pool(
        tmp_path,
        'print(\'noise\'); print(\'{"state": "training", "step": 1, "steps": 4}\'); print(\'{"state": "done"}\')',
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import sys; print('a traceback', file=sys.stderr); sys.exit(3)",
        processes=2,
    )
    changes = []
    assert jobs.run(lambda task: changes.append((task.name, task.state)), lambda: None) is None
    assert [task.state for task in jobs.tasks] == ["done", "failed", "failed"]
    assert jobs.tasks[0].fraction == 0.25
    assert "was killed" in jobs.tasks[1].status["error"]
    assert "exit code 3" in jobs.tasks[2].status["error"]
    assert (tmp_path / "2.txt").read_text() == "a traceback\n"
    assert ("0", "done") in changes


def test_a_signal_is_forwarded_and_no_further_task_starts(tmp_path):
    def both_train(tasks):
        return [task.state for task in tasks[:2]] == ["training", "training"]

    handles = (
        "import signal, sys, time\n"
        'signal.signal(signal.SIGTERM, lambda *_: (print(\'{"state": "stopped"}\'), sys.exit(143)))\n'
        'print(\'{"state": "training"}\')\n'
        "time.sleep(120)"
    )
    ignores = 'import time; print(\'{"state": "training"}\'); time.sleep(120)'  # killed by the signal, reports nothing
    jobs = pool(tmp_path, handles, ignores, handles, processes=2)
    number = jobs.run(
        lambda task: None,
        lambda: signal.raise_signal(signal.SIGINT) if both_train(jobs.tasks) else None,
    )
    assert number == signal.SIGINT
    assert [task.state for task in jobs.tasks] == ["stopped", "stopped", "waiting"]


def test_study_json_has_base_and_dataset(tmp_path):
    study = tiny_study(tmp_path)
    content = json.loads((study.folder / "study.json").read_text())
    assert content["base"]["type"] == "Run"
    assert content["data"]["classes"] == 4
