"""Tables as a person runs them: rows that are stopped, fail, go on, lie elsewhere; and the page at the end."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from dino_ssl.ablations.bases import SEEN
from dino_ssl.ablations.job_pool import JobPool, Task
from dino_ssl.ablations.results import ROOT, STUDENT, Study, read_students, read_study
from dino_ssl.ablations.run_lock import RunLocked
from dino_ssl.ablations.runner import complete
from dino_ssl.ablations.study import StudyOptions, is_incomplete, job_of, resolve_study, reuse_result
from dino_ssl.ablations.tables import table
from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.metrics import read_metrics
from dino_ssl.runtime import Runtime
from dino_ssl.terminal import Terminal

PRESET = """
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals.online import Watch
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
        online_eval=Watch(every_epochs=1), workers=0, log_every=1, precision="float32",
    )
"""
LINE = ("ablate", "table9", "--preset", "tiny_table:run")
"""Batches of 16 to 128 and of 8, on 40 pictures: those above 40 cannot be filled, and fail."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    (folder / "tiny_table.py").write_text(PRESET)
    return folder


@pytest.fixture(scope="module")
def stopped(place, process):
    """A row of 12 epochs that SIGTERM stopped: (exit code, what was said)."""
    row = place / ROOT / "table9/small/8/seed0"
    with process(*LINE, "--only", "8", "--epochs", "24", cwd=place) as running:
        until = time.monotonic() + 270
        while running.poll() is None and time.monotonic() < until:
            if len([line for line in read_metrics(row) if "loss" in line]) >= 2:
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        said = "".join(running.communicate(timeout=240))
    return running.returncode, said


def test_a_table_goes_on_where_it_stopped_and_survives_a_row_that_fails(stopped, place, dino, monkeypatch):
    code, said = stopped
    assert code == 128 + signal.SIGTERM, said
    assert "8: stopped" in said
    row = place / ROOT / "table9/small/8/seed0"
    before = [line["step"] for line in read_metrics(row) if "loss" in line]
    assert 2 <= len(before) < 60

    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    ran = dino(*LINE, "--only", "512", "8", "--processes", "2", "--json")
    assert ran.code == 1, ran.err
    rows = {told["row"]: told for told in ran.json["rows"]}
    assert rows["8"]["runs"][0]["state"] == "done"
    assert rows["8"]["ours"]["20-NN"]["n"] == 1
    assert rows["128"]["runs"] == []
    assert rows["512"]["runs"][0]["state"] == "failed"
    assert "batch" in rows["512"]["runs"][0]["error"]
    steps = [line["step"] for line in read_metrics(row) if "loss" in line]
    assert steps == list(range(1, 61)), "12 epochs of 5 steps, none twice"
    assert f"Going on at step {before[-1]}" in (row / "log.txt").read_text()

    ran = dino("report", "table9", "--markdown", "docs", "--json")
    assert ran.code == 0
    assert "batch 8, half the epochs" in Path(ran.json["report"]).read_text()
    assert "| batch 8, half the epochs |" in Path("docs/table9.md").read_text()

    ran = dino(*LINE, "--only", "8", "--epochs", "6")
    assert ran.code == 2
    assert "--optim.epochs is 24 there, got 6" in ran.err
    ran = dino("ablate", "table9", "--data", "scenes", "--preset", "small")
    assert ran.code == 2
    assert "rows of other pictures: 44 there, 2,000 here" in ran.err


def test_words(dino):
    assert set(dino("ablate", "--json").json["tables"]) >= {"table7", "fig7", "attention-heads"}
    rows = dino("ablate", "fig7", "--dry-run")
    assert rows.code == 0
    assert "--method.no-sharpening" in rows.out
    rows = dino("ablate", "table7", "--dry-run")
    assert "--method byol" in rows.out
    assert not any(word in rows.out for word in ("Config", "True", "False", "None"))
    for words, message in (
        (("ablate", "table6"), "did you mean"),
        (("ablate", "table7", "--only", "dinos", "--dry-run"), "did you mean 'dino'"),
        (("ablate", "table7"), "dino ablate table7 --data photos/"),
        (("ablate", "table7", "--minutes", "3", "--epochs", "3"), "--minutes and --epochs"),
        (("report", "fig7"), "Run it: dino ablate fig7"),
        (("report", "fig77"), "did you mean 'fig7'"),
        (("report", "runs/nothing"), "No run in runs/nothing"),
    ):
        ran = dino(*words)
        assert ran.code == 2, words
        assert message in ran.err


# -- one row, in this process -------------------------------------------------------------------------------


def tiny_study(root: Path, name: str = "fig6", **asked) -> Study:
    space: dict = {}
    exec(PRESET, space)
    study = resolve_study(table(name), "small", StudyOptions(preset=space["run"](), **asked), root)
    study.write()
    return study


def test_a_row_measures_what_its_table_wants_and_another_table_need_not_run_it(tmp_path):
    study = tiny_study(tmp_path)
    cell = study.cell(study.table.row("momentum"), 0)
    rt, told = Runtime(torch.device("cpu"), "float32"), []
    job = job_of(study, cell)
    result = complete(job, rt, Terminal(quiet=True), lambda state, **figures: told.append(state))
    assert {"20-NN", "student 20-NN", "entropy", "kl", "hours", "memory"} <= set(result.values)
    assert 0 < result.values["entropy"] < 100
    assert result.values["memory"] > 0.05
    assert [row["epoch"] for row in read_students(cell.folder)] == [1, 2]
    assert {"training", "evaluated"} <= set(told)

    more = job_of(study, cell, linear=True)
    assert not is_incomplete(cell, job)
    assert is_incomplete(cell, more)
    trained = read_metrics(cell.folder)
    again = complete(more, rt, Terminal(quiet=True), lambda state, **figures: None)
    assert again.values["linear"] >= 0
    assert again.values["20-NN"] == result.values["20-NN"]
    assert read_metrics(cell.folder) == trained, "nothing is trained again"

    other = tiny_study(tmp_path, "fig7")
    both, alone = (other.cell(other.table.row(name), 0) for name in ("both", "sharpening"))
    assert reuse_result(other, both, job_of(other, both), tmp_path)
    assert both.result == cell.result
    assert not reuse_result(other, alone, job_of(other, alone), tmp_path)
    seed1 = other.cell(other.table.row("both"), 1)
    assert not reuse_result(other, seed1, job_of(other, seed1), tmp_path), "of another seed"
    (cell.folder / STUDENT).unlink()
    twin = tiny_study(tmp_path / "x", "fig6").cell(study.table.row("momentum"), 0)
    assert not reuse_result(study, twin, job_of(study, twin), tmp_path), "its student was not measured"


def test_a_row_is_run_by_one_process_at_a_time(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    study = tiny_study(tmp_path)
    cell = study.cell(study.table.row("student"), 0)
    cell.folder.mkdir(parents=True)
    with (cell.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunLocked):
            complete(job_of(study, cell), Runtime(torch.device("cpu"), "float32"), Terminal(quiet=True), print)


def test_a_small_table_takes_its_length_from_the_number_of_pictures(tmp_path):
    study = resolve_study(table("fig7"), "small", StudyOptions(data=Scenes(count=1000, size=32)), tmp_path)
    assert study.base.optim.epochs == round(SEEN / 900)
    study.write()
    again = resolve_study(table("fig7"), "small", StudyOptions(), tmp_path)
    assert again.base == study.base
    assert read_study(study.folder) == again
    with pytest.raises(UserError, match=r"other pictures: 1,000 there, 900 here"):
        resolve_study(
            table("fig7"), "small", StudyOptions(preset=edit(study.base, data=Scenes(count=900, size=32))), tmp_path
        )


# -- several processes --------------------------------------------------------------------------------------


def crew(folder: Path, *scripts: str, processes: int = 1) -> JobPool:
    tasks = [
        Task(str(number), [sys.executable, "-c", script], folder / f"{number}.txt")
        for number, script in enumerate(scripts)
    ]
    return JobPool(tasks, processes, {"PYTHONUNBUFFERED": "1"})


def test_a_crew_hears_its_tasks_and_says_why_one_ended_without_a_word(tmp_path):
    team = crew(
        tmp_path,
        'print(\'noise\'); print(\'{"state": "training", "step": 1, "steps": 4}\'); print(\'{"state": "done"}\')',
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import sys; print('its last words', file=sys.stderr); sys.exit(3)",
        processes=2,
    )
    seen = []
    assert team.work(lambda task: seen.append((task.name, task.state)), lambda: None) is None
    assert [task.state for task in team.tasks] == ["done", "failed", "failed"]
    assert team.tasks[0].share == 0.25
    assert "was killed" in team.tasks[1].told["error"]
    assert "exit code 3" in team.tasks[2].told["error"]
    assert (tmp_path / "2.txt").read_text() == "its last words\n"
    assert ("0", "done") in seen


def test_a_signal_is_passed_on_and_nothing_more_begins(tmp_path):
    def both(tasks):
        return [task.state for task in tasks[:2]] == ["training", "training"]

    waits = (
        "import signal, sys, time\n"
        'signal.signal(signal.SIGTERM, lambda *_: (print(\'{"state": "stopped"}\'), sys.exit(143)))\n'
        'print(\'{"state": "training"}\')\n'
        "time.sleep(120)"
    )
    deaf = 'import time; print(\'{"state": "training"}\'); time.sleep(120)'  # it dies of the signal, without a word
    team = crew(tmp_path, waits, deaf, waits, processes=2)
    code = team.work(
        lambda task: None,
        lambda: signal.raise_signal(signal.SIGINT) if both(team.tasks) else None,
    )
    assert code == signal.SIGINT
    assert [task.state for task in team.tasks] == ["stopped", "stopped", "waiting"]


def test_what_a_study_holds_is_plain_json(tmp_path):
    study = tiny_study(tmp_path)
    told = json.loads((study.folder / "study.json").read_text())
    assert told["base"]["type"] == "Run"
    assert told["data"]["classes"] == 4
