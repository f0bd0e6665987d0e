"""Every kind of collapse is detected, healthy runs have no findings; a session stops or rolls back."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import CPU, RUN, Run, edit

from dino_ssl import checkpoint, load
from dino_ssl.api.training import run_session
from dino_ssl.collapse import policy
from dino_ssl.collapse.checks import Finding, check_config
from dino_ssl.collapse.monitor import LINES, Monitor
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.errors import Diverged, UserError
from dino_ssl.events import Logged, Started
from dino_ssl.files import read_lines
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.methods.moco import MoCoConfig
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.presets import paper
from dino_ssl.presets.small import demo, narrow_vit, small, small_vit, vit_tiny
from dino_ssl.schedules import Clock
from dino_ssl.state import build_method, is_good_loss
from dino_ssl.terminal import Terminal
from dino_ssl.training import train

DULL = edit(
    RUN,
    backbone=dict(drop_path=0.0),
    method=dict(teacher_temp=0.04, warmup_teacher_temp_epochs=0, freeze_last_layer=0),
    views=dict(local=0),
    optim=dict(epochs=12, lr=0.03),
    save_minutes=60,
    cache=True,
)
"""44 images whose colors are all augmented: too few and too similar to learn from, so problems show in 60 steps."""
HEALTHY = edit(
    DULL,
    data=Scenes(count=80, size=32, classes=4),
    method=dict(momentum=0.98),
    views=dict(saturation=0.0, hue=0.0, gray=0.0, solarize=(0.0, 0.0, 0.0), global_scale=(0.5, 1.0)),
    optim=dict(epochs=6, weight_decay_end=0.04),
)
"""80 images that keep their colors; 60 steps."""
SMALL = dict(head_hidden=32, head_dim=16, momentum=0.98)
WILD = dict(algorithm="sgd", clip_grad=0.0, warmup_epochs=0)


def findings_of(run: Run, out: Path, *, until: str = "") -> dict[str, Finding]:
    """Train; return the first finding of each name. Stops at the finding `until`."""
    run, findings = edit(run, out=str(out / "run")), {}
    events = train(run, CPU, run.data.open())
    started = next(events)
    assert isinstance(started, Started)
    monitor = Monitor(run.method.num_prototypes, run, started.clock.steps_per_epoch)
    for event in events:
        if isinstance(event, Logged):
            for finding in monitor.update({"step": event.clock.step, **event.metrics}):
                findings.setdefault(finding.name, finding)
            if until in findings:
                break
    events.close()
    return findings


@pytest.mark.parametrize(
    ("run", "name", "suggestion"),
    [
        (edit(DULL, method=dict(targets="none")), "Collapse to one prototype", "Set `method.targets` to centering"),
        (edit(DULL, method=dict(sharpening=False)), "Uniform collapse", "Set `method.sharpening`"),
        (edit(HEALTHY, method=dict(teacher="student")), "Identical targets", "Set `method.teacher` to momentum"),
        (edit(HEALTHY, method=dict(momentum=1.0)), "Teacher not updated", "Lower `method.momentum`"),
        (edit(HEALTHY, optim=dict(WILD, lr=100.0)), "Feature collapse", "learning rate"),
    ],
    ids=["no-centering", "no-sharpening", "no-momentum", "frozen-teacher", "learning-rate"],
)
def test_each_collapse_is_detected_with_its_cause(tmp_path: Path, run: Run, name: str, suggestion: str) -> None:
    assert suggestion in findings_of(run, tmp_path, until=name)[name].suggestion


def test_divergence_is_detected_without_prototypes_and_by_a_nan_loss(tmp_path: Path) -> None:
    """Supervised training with a far too high learning rate: the loss grows, or becomes nan."""
    supervised = edit(HEALTHY, method=SupervisedConfig(), views=Augment(size=32))
    assert "Divergence" in findings_of(edit(supervised, optim=dict(WILD, lr=60.0)), tmp_path, until="Divergence")
    with pytest.raises(Diverged):
        findings_of(edit(supervised, optim=dict(WILD, lr=1e4)), tmp_path)
    (finding,) = Monitor(64).update({"step": 40, "loss": math.nan})
    assert finding.name == "Divergence"


@pytest.mark.parametrize(
    "method",
    [None, BYOLConfig(**SMALL), MoCoConfig(queue=64, **SMALL), SupervisedConfig()],
    ids=["DINO", "BYOL", "MoCo", "supervised"],
)
def test_healthy_runs_have_no_findings(tmp_path: Path, method: Any) -> None:
    run = HEALTHY if method is None else edit(HEALTHY, method=method)
    if isinstance(method, SupervisedConfig):
        run = edit(run, views=Augment(size=32))
    assert findings_of(run, tmp_path) == {}
    assert check_config(edit(run, optim=dict(epochs=20)), 10, 80) == []


# -- before the first step ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(method=dict(teacher_temp=0.08, warmup_teacher_temp=0.08)), "Temperature too high"),
        (dict(method=dict(teacher_temp=0.07, warmup_teacher_temp_epochs=3)), "Temperature too high"),
        (dict(method=dict(momentum=0.9999)), "Momentum too high"),
        (dict(method=dict(out_dim=65536)), "K too large"),
        (dict(method=dict(center_momentum=0.999)), "Center too slow"),
        (dict(method=dict(targets="none")), "No centering"),
        (dict(method=dict(sharpening=False)), "No sharpening"),
        (dict(method=dict(teacher="previous-step")), "No momentum"),
        (dict(method=dict(head_bottleneck=0)), "No bottleneck"),
        (dict(method=BYOLConfig(predictor=False)), "No predictor"),
    ],
)
def test_settings_that_are_known_to_collapse_are_found_before_training(changes: dict, name: str) -> None:
    run = edit(Run(), method=dict(out_dim=4096))
    assert check_config(run, 100, 6500) == []
    (finding,) = check_config(edit(run, **changes), 100, 6500)
    assert finding.name == name
    assert finding.fatal == name.startswith("No ")  # a required part is missing


def test_presets_have_no_findings() -> None:
    for preset in (getattr(paper, name) for name in dir(paper) if name.startswith(("vit", "resnet"))):
        assert check_config(preset(), 1_281_167 // preset().optim.batch_size, 1_281_167) == []
    for preset in (small, small_vit, narrow_vit, demo, vit_tiny):
        num_images = 1800 if preset is demo else 6500
        assert check_config(preset(), num_images // preset().optim.batch_size, num_images) == []


def test_the_teachers_remaining_initial_weights_are_the_product_of_the_momenta() -> None:
    run = edit(Run(), method=DINOConfig(out_dim=64, momentum=0.5 ** (1 / 200), momentum_end=0.5 ** (1 / 200)))
    (finding,) = check_config(run, 2, 1000)  # 100 epochs of 2 steps
    assert "50%" in finding.message


# -- sessions ----------------------------------------------------------------------------------------------


def session(run: Run, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with (terminal := Terminal()).show_log():
        outcome = run_session(run, CPU, run.data.open(), terminal)
    return outcome, capsys.readouterr().out


def test_stop_ends_the_run_at_the_collapse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = edit(DULL, method=dict(targets="none"), on_collapse="stop", out=str(tmp_path / "run"))
    outcome, out = session(run, capsys)
    assert not outcome.finished
    assert outcome.collapse.startswith("Collapse to one prototype")
    assert outcome.clock.step == 30 + LINES - 1  # in LINES consecutive lines
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["step"] == outcome.clock.step
    assert out.count("Collapse to one prototype: teacher entropy") == 1
    report = outcome.report.read_text()
    assert "all images are assigned to one prototype" in report
    assert "Effective rank" in report


def test_rollback_restores_the_last_healthy_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch the teacher temperature is 2 and the targets are uniform.

    A checkpoint counts as healthy early, so that the test needs few steps.
    """
    monkeypatch.setattr(policy, "HEALTHY_LINES", 3)
    hot = dict(teacher_temp=2.0, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=2)
    run = edit(HEALTHY, data=dict(count=160), method=hot, optim=dict(epochs=2, batch_size=4), save_minutes=0)
    outcome, out = session(edit(run, on_collapse="rollback", out=str(tmp_path / "run")), capsys)
    assert "the last healthy checkpoint" in out
    assert not outcome.finished
    assert outcome.collapse.startswith("Uniform collapse")
    (row,) = [row for row in read_lines(tmp_path / "run/health.jsonl") if row["name"] == "Rollback"]
    assert 25 < outcome.clock.step < 40 < row["step"] < 60
    saved, kept = (checkpoint.load(tmp_path / f"run/checkpoints/{name}.pt") for name in ("last", "healthy"))
    assert saved["step"] == kept["step"] == outcome.clock.step
    exported = load(tmp_path / "run").state_dict()  # of the healthy checkpoint
    healthy = {name.removeprefix("teacher.backbone."): value for name, value in saved["method"].items()}
    assert all(torch.equal(value, healthy[name]) for name, value in exported.items())


class Line(NamedTuple):
    """One line of metrics, healthy or at ln K."""

    loss: float
    teacher_entropy: float
    kl: float = 1.0
    marginal_entropy: float = 4.0


GOOD, BAD = Line(3.0, 2.0), Line(math.log(64), math.log(64), 0.0, math.log(64))


def start_policy(tmp_path: Path, **changes: Any) -> policy.CollapsePolicy:
    run = edit(HEALTHY, out=str(tmp_path / "run"), **changes)
    started = Started(Clock(0, 10, 100), build_method(run), run.data.open(), None, {}, {})
    return policy.CollapsePolicy(run, started, is_main=True)


def feed(collapse_policy: policy.CollapsePolicy, steps: range, line: Line, *, save_at: int = -1) -> list[int]:
    """Return the steps at which training must end; a checkpoint is saved after step `save_at`."""
    ended = []
    for step in steps:
        if collapse_policy.update(Logged(Clock(step, 10, 100), line._asdict()))[1]:
            ended.append(step)
        if step == save_at:
            run = collapse_policy.run
            saved = {
                "format": checkpoint.FORMAT,
                "run": {},
                "step": step,
                "method": {},
                "optimizer": {},
                "scaler": {},
                "best": {},
                "data": "",
                "backbone": "",
            }
            checkpoint.save(Path(run.out) / "checkpoints/last.pt", saved)  # pyright: ignore[reportArgumentType]
    return ended


def test_a_short_collapse_does_not_stop_the_run(tmp_path: Path) -> None:
    collapse_policy = start_policy(tmp_path, on_collapse="stop")
    assert feed(collapse_policy, range(1, 60), GOOD) == []
    assert feed(collapse_policy, range(60, 60 + 2 * LINES - 2), BAD) == []  # shows in the mean of the last LINES - 1
    assert feed(collapse_policy, range(80, 100), GOOD) == []
    assert feed(collapse_policy, range(100, 120), BAD)


def test_a_checkpoint_is_healthy_after_enough_healthy_lines(tmp_path: Path) -> None:
    """A checkpoint saved shortly before the collapse is detected is not used; the one before it is."""
    collapse_policy = start_policy(tmp_path, on_collapse="rollback")
    feed(collapse_policy, range(1, 50), GOOD, save_at=40)
    assert not (tmp_path / "run/checkpoints/healthy.pt").exists()
    feed(collapse_policy, range(50, 60), GOOD, save_at=55)
    feed(collapse_policy, range(60, 62), GOOD, save_at=60)
    assert feed(collapse_policy, range(62, 80), BAD, save_at=70)
    assert collapse_policy.roll_back()[1] == 40


def test_without_a_healthy_checkpoint_nothing_is_restored(tmp_path: Path) -> None:
    collapse_policy = start_policy(tmp_path, on_collapse="rollback")
    assert feed(collapse_policy, range(1, 80), BAD)
    assert collapse_policy.roll_back()[1] is None


# -- good checkpoints --------------------------------------------------------------------------------------


def diverge(folder: Path, lr: float, **changes: Any) -> Run:
    """Train with a learning rate that ruins the weights within a few steps, saving after each."""
    run = edit(HEALTHY, out=str(folder), save_minutes=0, thumbnails=False, **changes)
    run = edit(run, optim=dict(lr=lr, clip_grad=0.0, warmup_epochs=0))
    with pytest.raises(Diverged, match=r"not finite at step") as caught:
        run_session(run, CPU, run.data.open(), Terminal(quiet=True))
    assert ("No good checkpoint was saved" in str(caught.value)) is (lr == 1e30)
    return run


def test_ruined_weights_are_not_saved_after_a_finite_loss(tmp_path: Path) -> None:
    diverge(tmp_path / "run", 1e30)  # the first step gives weights of 3e28
    assert not (tmp_path / "run/checkpoints/last.pt").exists()


def test_the_checkpoint_from_which_a_good_loss_was_computed_is_kept(tmp_path: Path) -> None:
    run = diverge(tmp_path / "run", 1e6, on_collapse="rollback")  # the loss of step 3 is nan
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["step"] == 1
    assert not (tmp_path / "run/checkpoints/previous.pt").exists()
    exported = load(tmp_path / "run/backbone.safetensors").state_dict()
    assert all(value.isfinite().all() for value in exported.values())
    assert [row["name"] for row in read_lines(Path(run.out) / "health.jsonl")][-1:] == ["Rollback"]


def test_the_checkpoint_before_is_removed_once_a_good_loss_was_computed(tmp_path: Path) -> None:
    run = edit(HEALTHY, out=str(tmp_path), save_minutes=0, optim=dict(epochs=1))
    for event in train(run, CPU, run.data.open()):
        if isinstance(event, Logged):
            assert not (tmp_path / "checkpoints/previous.pt").exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.pt"]


def test_a_loss_above_that_of_a_uniform_prediction_is_not_good() -> None:
    assert is_good_loss(1.09 * math.log(64), 64)
    assert not is_good_loss(1.11 * math.log(64), 64)
    assert not is_good_loss(math.nan, None)
    assert is_good_loss(1e3, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, 6e28])
def test_a_checkpoint_of_a_diverged_run_is_not_resumed(tmp_path: Path, value: float) -> None:
    run = edit(HEALTHY, out=str(tmp_path), optim=dict(epochs=1), online_eval=dict(every_epochs=1))
    list(train(run, CPU, run.data.open()))
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    saved["method"]["teacher.backbone.cls_token"][0, 0, 0] = value
    checkpoint.save(tmp_path / "checkpoints/last.pt", saved)
    with pytest.raises(UserError, match=r"had diverged\. The same folder has best\.pt: copy one over it"):
        next(train(run, CPU, run.data.open(), resume=True))
