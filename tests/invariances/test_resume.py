"""A run that was killed, stopped or abandoned resumes bit-identically to an uninterrupted run."""

import json
import signal
from pathlib import Path

import pytest
import torch
from tensorboardX.event_file_writer import EventsWriter
from tiny import CPU, Run, dataset_of, edit, fit, killed_at, last, same_training, tiny

from dino_ssl import checkpoint
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.events import Ended, Evaluated, Logged, Started
from dino_ssl.metrics import Log, read_metrics
from dino_ssl.models.pretrained import weights_file
from dino_ssl.schedules import Clock
from dino_ssl.training import train

TIMES = {"time", "images_per_s", "wait"}
"""Metrics that are measured times, and therefore differ between runs."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run with k-NN evaluations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    narrow = dict(width=24, depth=1, heads=2)
    run = tiny(tmp_path_factory.mktemp("whole") / "run", backbone=narrow, online_eval=dict(every_epochs=1))
    ended = fit(run)[-1]
    torch.set_num_threads(threads)
    assert isinstance(ended, Ended)
    assert ended.finished
    return run


def metrics(run: Run) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(Path(run.out))]


def assert_same(run: Run, whole: Run) -> None:
    assert not same_training(run, whole)
    backbones = [(Path(r.out) / "backbone.safetensors").read_bytes() for r in (run, whole)]
    assert backbones[0] == backbones[1]
    assert metrics(run) == metrics(whole)


def test_a_run_killed_within_an_epoch_resumes_with_the_same_result(tmp_path: Path, whole: Run) -> None:
    """The process is killed after the checkpoint of step 8 is written and before it is renamed."""
    run = edit(whole, out=str(tmp_path / "run"))
    assert killed_at(run, 8) == -signal.SIGKILL
    assert last(run)["step"] == 7  # 2 of 5 steps into the second epoch
    assert len(list((Path(run.out) / "checkpoints").glob(".last.pt*.part"))) == 1
    (Path(run.out) / "snapshots").mkdir()
    (Path(run.out) / "snapshots/.epoch.png.1.part").touch()
    assert [line["step"] for line in metrics(run)][-1] == 8
    fit(run, resume=True)
    assert_same(run, whole)
    assert not list(Path(run.out).rglob("*.part"))


@pytest.mark.parametrize("until", [2, 6, 15])
def test_a_run_abandoned_at_any_step_resumes_with_the_same_result(tmp_path: Path, whole: Run, until: int) -> None:
    """Within epoch 1, at the first step of epoch 2 (5 is saved), before the last save."""
    run = edit(whole, out=str(tmp_path / "run"))
    fit(run, until=until)
    assert last(run)["step"] == until - 1
    fit(run, resume=True, until=min(until + 2, 15))  # interrupted a second time
    fit(run, resume=True)
    assert_same(run, whole)


def test_resuming_a_finished_run_takes_no_steps(tmp_path: Path) -> None:
    run = tiny(tmp_path / "run", optim=dict(epochs=1))
    fit(run)
    before = last(run)
    events = fit(run, resume=True)
    assert not [event for event in events if isinstance(event, Logged)]
    assert isinstance(events[-1], Ended)
    assert events[-1].finished
    assert not [key for key in before if key == "step" and last(run)[key] != before[key]]


def test_a_resumed_run_keeps_its_best_score_and_discards_its_export(tmp_path: Path, whole: Run) -> None:
    """The exported weights are older than new checkpoints and must not be evaluated instead of them."""
    run = edit(whole, out=str(tmp_path / "run"), optim=dict(epochs=1))
    fit(run)
    exported = Path(run.out) / "backbone.safetensors"
    assert weights_file(Path(run.out), "teacher") == exported
    training = train(edit(run, optim=dict(epochs=2)), CPU, dataset_of(run.data), resume=True)
    started = next(training)
    assert isinstance(started, Started)
    assert started.best == last(run)["best"] != {}
    next(training)
    training.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert weights_file(Path(run.out), "teacher") != exported


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_stops(tmp_path: Path, whole: Run, number: signal.Signals) -> None:
    """save_minutes is an hour, so only the signal can cause a save."""
    run = edit(whole, out=str(tmp_path / "run"), save_minutes=60)
    events = []
    before = signal.getsignal(number)
    for event in train(run, CPU, dataset_of(run.data)):
        events.append(event)
        if isinstance(event, Logged) and event.clock.step == 8:
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert isinstance(events[-1], Ended)
    assert not events[-1].finished
    assert events[-1].clock.step == last(run)["step"] == 8
    fit(edit(run, save_minutes=0), resume=True)
    assert_same(run, whole)


def test_a_second_ctrl_c_stops_immediately(tmp_path: Path) -> None:
    run = tiny(tmp_path / "run", save_minutes=60)
    training = train(run, CPU, dataset_of(run.data))

    def press_twice() -> None:
        for event in training:
            if isinstance(event, Logged) and event.clock.step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    training.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not (Path(run.out) / "checkpoints" / "last.pt").exists()


def test_evaluations_do_not_change_training(tmp_path: Path, whole: Run) -> None:
    """k-NN every epoch, k-NN once at the end, or a forward pass of the backbone after every step."""
    rare = edit(whole, out=str(tmp_path / "rare"), online_eval=dict(every_epochs=3))
    assert len([e for e in fit(rare) if isinstance(e, Evaluated)]) == 1
    assert not [d for d in same_training(rare, whole) if not d.startswith("/best")]

    observed = edit(whole, out=str(tmp_path / "observed"), seed=whole.seed)
    method = None
    for event in train(observed, CPU, dataset_of(observed.data)):
        method = getattr(event, "method", method)
        assert method is not None
        method.backbone.eval()
        with torch.no_grad():
            method.backbone(torch.randn(2, 3, 32, 32))
        method.backbone.train()
    assert not same_training(observed, whole)


def test_a_different_seed_gives_a_different_run(tmp_path: Path, whole: Run) -> None:
    """Check that the comparisons above can fail."""
    other = edit(whole, out=str(tmp_path / "run"), seed=1)
    fit(other)
    assert same_training(other, whole)


def test_resume_requires_a_checkpoint_and_the_same_images(tmp_path: Path) -> None:
    run = tiny(tmp_path / "run", optim=dict(epochs=1))
    with pytest.raises(UserError, match="No checkpoint at"):
        fit(run, resume=True)
    fit(run, until=3)
    with pytest.raises(UserError, match="different dataset"):
        fit(edit(run, data=Scenes(count=44, size=32, classes=4, seed=5)), resume=True)


def test_a_checkpoint_of_another_network_is_rejected_by_name(tmp_path: Path) -> None:
    run = tiny(tmp_path / "run", optim=dict(epochs=1))
    fit(run, until=3)
    for change in (dict(backbone=dict(depth=3)), dict(method=dict(out_dim=32))):
        with pytest.raises(UserError, match=r"last\.pt"):
            fit(edit(run, **change), resume=True)


# -- non-finite loss, full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path: Path, log_every: int) -> None:
    run = tiny(tmp_path / "run", log_every=log_every)
    training = train(run, CPU, dataset_of(run.data))
    method = None

    def poison() -> None:
        nonlocal method
        for event in training:
            method = getattr(event, "method", method)
            if isinstance(event, Logged) and event.clock.step >= 8:
                assert method is not None
                next(method.student.parameters()).data.fill_(float("nan"))

    with pytest.raises(UserError, match=r"The loss or a weight is not finite at step .*`optim\.lr`"):
        poison()
    saved = last(run)
    assert saved["step"] in (7, 8)
    broken = [n for n, v in saved["method"].items() if not torch.isfinite(v).all() and "student" not in n]
    assert not broken
    lines = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] is not None for line in lines)


@pytest.mark.parametrize("what", ["metrics", "tensorboard"])
def test_a_full_disk_while_logging_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The error is raised immediately in this thread; a writer thread would die of it and block training forever."""
    log = Log(tmp_path, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if what == "metrics":
        log._file.close()
        monkeypatch.setattr(log, "_file", open("/dev/full", "a", buffering=1))  # noqa: SIM115 - the log closes it
    else:
        monkeypatch.setattr(EventsWriter, "flush", full)
    with pytest.raises(UserError, match=r"Cannot write .*metrics\.jsonl.*disk is full"):
        log.write(Clock(1, 5, 1), {"loss": 1.0})
    if what == "tensorboard":
        monkeypatch.undo()
    log.__exit__()


def test_a_full_disk_while_training_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny(tmp_path / "run")
    real, calls = checkpoint.torch.save, []

    def fills_up(data: dict, file: object) -> None:
        calls.append(data["step"])
        if data["step"] == 6:
            file.write(b"half")  # pyright: ignore[reportAttributeAccessIssue]
            raise OSError(28, "No space left on device")
        real(data, file)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(checkpoint.torch, "save", fills_up)
    with pytest.raises(UserError, match=r"full.*free some space"):
        fit(run)
    assert last(run)["step"] == 5
    names = {path.name for path in (Path(run.out) / "checkpoints").iterdir()}
    assert names == {"last.pt", "previous.pt"}  # the same file


@pytest.mark.parametrize("broken", ["no optimizer state", "nan weights"])
def test_a_checkpoint_of_which_a_part_cannot_be_used_is_not_resumed(tmp_path: Path, whole: Run, broken: str) -> None:
    run = edit(whole, out=str(tmp_path / "run"))
    fit(run, until=3)
    path = Path(run.out) / "checkpoints/last.pt"
    content = last(run)
    if broken == "nan weights":
        content["method"] = {name: value * float("nan") for name, value in content["method"].items()}
    else:
        content["optimizer"] = {}
    checkpoint.save(path, content)
    with pytest.raises(UserError, match=r"cannot be loaded|had diverged"):
        fit(run, resume=True)
