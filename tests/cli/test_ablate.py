"""`dino ablate`: runs that are stopped, resumed, shared between tables or fail, and the page at the end."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from dino_ssl.ablations.bases import IMAGES_SEEN
from dino_ssl.ablations.launch import final_state
from dino_ssl.ablations.results import ROOT, Study, read_study
from dino_ssl.ablations.runner import LOCKED, RunLocked, complete
from dino_ssl.ablations.study import is_incomplete, link_shared_runs, make_job, resolve_study
from dino_ssl.ablations.tables import get_table
from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.metrics import read_metrics
from dino_ssl.runtime import Runtime
from dino_ssl.terminal import Terminal

SRC = Path(__file__).parents[2] / "src"
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


def losses(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


def test_a_table_is_resumed_and_a_failed_run_does_not_stop_it(dino, tmp_path, monkeypatch) -> None:
    (tmp_path / "tiny_table.py").write_text(PRESET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SRC), str(tmp_path)]))
    folder = tmp_path / ROOT / "table9/small/8/seed0"

    def stop_during_training() -> None:
        deadline = time.monotonic() + 270
        while len(losses(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_during_training)
    thread.start()
    ran = dino(*LINE, "--only", "8", "--epochs", "24")
    thread.join()
    assert ran.code == 128 + signal.SIGTERM, ran.err
    assert "batch 8, half the epochs, seed 0: stopped" in ran.out
    before = [line["step"] for line in losses(folder)]
    assert 2 <= len(before) < 60

    ran = dino(*LINE, "--only", "512", "8", "--processes", "2", "--json")
    assert ran.code == 1, ran.err
    results = {item["name"]: item for item in ran.json["configurations"]}
    assert results["8"]["runs"][0]["state"] == "done"
    assert results["8"]["ours"]["20-NN"]["n"] == 1
    assert results["128"]["runs"] == []
    assert results["512"]["runs"][0]["state"] == "failed"
    assert "batch" in results["512"]["runs"][0]["error"]
    assert [line["step"] for line in losses(folder)] == list(range(1, 61)), "12 epochs of 5 steps, each once"
    assert f"Resuming at step {before[-1]}" in (folder / "log.txt").read_text()
    assert "| batch 8, half the epochs |" in Path(ran.json["report"]).read_text()

    ran = dino("report", "table9", "--markdown", "docs", "--json")
    assert ran.code == 0
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


def tiny_study(root: Path, name: str = "fig6") -> Study:
    namespace: dict = {}
    exec(PRESET, namespace)
    study = resolve_study(get_table(name), "small", root, preset=namespace["run"]())
    study.write()
    return study


def test_a_run_has_the_metrics_of_its_table_and_is_shared_with_other_tables(tmp_path):
    study = tiny_study(tmp_path)
    run = study.study_run(study.table.configurations[0], 0)
    rt = Runtime(torch.device("cpu"), "float32")
    job = make_job(study, run)
    assert complete(job, rt, Terminal(quiet=True)) is None
    result = run.result
    assert result is not None
    assert {"20-NN", "student 20-NN", "entropy", "kl", "hours", "memory"} <= set(result.values)
    assert 0 < result.values["entropy"] < 100
    assert result.values["memory"] > 0.05
    assert list(run.line("student 20-NN")[0]) == [1, 2]

    more = make_job(study, run, linear=True)
    assert not is_incomplete(run, job)
    assert is_incomplete(run, more)
    trained = read_metrics(run.folder)
    assert complete(more, rt, Terminal(quiet=True)) is None
    again = run.result
    assert again is not None
    assert again.values["linear"] >= 0
    assert again.values["20-NN"] == result.values["20-NN"]
    assert read_metrics(run.folder) == trained, "nothing is trained again"

    other = tiny_study(tmp_path, "fig7")
    runs = [other.study_run(item, seed) for seed in (0, 1) for item in other.table.select(["both", "sharpening"])]
    assert link_shared_runs(runs, [make_job(other, run) for run in runs], other, tmp_path) == 1
    assert [run.state for run in runs] == ["done", "not run", "not run", "not run"]
    assert runs[0].result == run.result


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    study = tiny_study(tmp_path)
    run = study.study_run(study.table.configurations[1], 0)
    run.folder.mkdir(parents=True)
    with (run.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunLocked):
            complete(make_job(study, run), Runtime(torch.device("cpu"), "float32"), Terminal(quiet=True))
    assert final_state(run, LOCKED, stopping=False) == "being trained by another process"


def test_a_process_that_ends_without_a_result_has_failed(tmp_path):
    study = tiny_study(tmp_path)
    for seed, (code, message) in enumerate([(-signal.SIGKILL, "was killed"), (3, "exit code 3"), (-11, "signal 11")]):
        run = study.study_run(study.table.configurations[0], seed)
        assert final_state(run, code, stopping=False) == "failed"
        assert message in run.error
        assert "log.txt" in run.error
    assert final_state(run, -signal.SIGTERM, stopping=True) == "stopped"


def test_the_epochs_at_scale_small_follow_from_the_number_of_images(tmp_path):
    table = get_table("fig7")
    study = resolve_study(table, "small", tmp_path, data=Scenes(count=1000, size=32))
    assert study.base.optim.epochs == round(IMAGES_SEEN / 900)
    study.write()
    again = resolve_study(table, "small", tmp_path)
    assert again.base == study.base
    assert read_study(study.folder) == again
    with pytest.raises(UserError, match=r"another dataset: 1,000 images there, 900 now"):
        resolve_study(table, "small", tmp_path, preset=edit(study.base, data=Scenes(count=900, size=32)))
