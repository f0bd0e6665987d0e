"""A run that collapses is told which way, and a healthy one nothing; a session stops there, or goes back."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import CPU, RUN, Run, edit

from dino_ssl import checkpoint, load
from dino_ssl.api.training import run_session
from dino_ssl.collapse import policy
from dino_ssl.collapse.checks import advise, check_config, relax
from dino_ssl.collapse.monitor import LINES, Monitor
from dino_ssl.config import differences
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.errors import Diverged
from dino_ssl.events import Logged, Started
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.methods.moco import MoCoConfig
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.presets import paper
from dino_ssl.presets.small import demo, narrow_vit, small, small_vit, vit_tiny
from dino_ssl.report.health_section import read_said
from dino_ssl.run import read_run
from dino_ssl.schedules import Clock
from dino_ssl.state import build_method
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
"""44 pictures in colours that are all changed: too few and too alike to hold on to, so that what is wrong shows in 60
steps."""
HEALTHY = edit(
    DULL,
    data=Scenes(count=80, size=32, classes=4),
    method=dict(momentum=0.98),
    views=dict(saturation=0.0, hue=0.0, gray=0.0, solarize=(0.0, 0.0, 0.0), global_scale=(0.5, 1.0)),
    optim=dict(epochs=8, weight_decay_end=0.04),
)
"""80 pictures that keep their colours; 80 steps."""
SMALL = dict(head_hidden=32, head_dim=16, momentum=0.98)
WILD = dict(algorithm="sgd", clip_grad=0.0, warmup_epochs=0)


def said(run: Run, out: Path, *, until: str = "") -> dict[str, int]:
    """The findings of a run by name, each with the step at which it came first; leaves when `until` stands."""
    run, found = edit(run, out=str(out / "run")), {}
    events = train(run, CPU, run.data.open())
    started = next(events)
    assert isinstance(started, Started)
    monitor = Monitor(run.method.num_prototypes, run, started.clock.steps_per_epoch)
    for event in events:
        if isinstance(event, Logged):
            for finding in monitor.see({"step": event.clock.step, **event.metrics}):
                found.setdefault(finding.name, event.clock.step)
            if until in found:
                break
    events.close()
    return found


@pytest.mark.parametrize(
    ("run", "named", "turn"),
    [
        (edit(DULL, method=dict(targets="none")), "Collapse to one prototype", "--method.targets centering"),
        (edit(DULL, method=dict(center_momentum=0.999)), "Collapse to one prototype", "Set it to 0.9"),
        (edit(DULL, method=dict(sharpening=False)), "Uniform collapse", "--method.sharpening"),
        (edit(DULL, method=dict(teacher_temp=0.08, warmup_teacher_temp=0.08)), "Uniform collapse", "Begin at 0.04"),
        (edit(HEALTHY, method=dict(teacher="student")), "One target for all", "--method.teacher momentum"),
        (edit(HEALTHY, method=dict(momentum=1.0)), "The teacher does not move", "--method.momentum"),
        (edit(HEALTHY, optim=dict(WILD, lr=100.0)), "Feature collapse", "learning rate"),
    ],
    ids=["no centering", "slow center", "no sharpening", "hot", "no momentum", "still teacher", "rate too high"],
)
def test_each_collapse_is_named_with_what_to_turn(tmp_path: Path, run: Run, named: str, turn: str) -> None:
    assert named in said(run, tmp_path, until=named)
    assert turn in advise(named, run)


def test_a_loss_that_leaves_is_divergence_with_and_without_prototypes(tmp_path: Path) -> None:
    """Supervised learning with steps far too long: the loss rises, or soon it is no number."""
    learned = edit(HEALTHY, method=SupervisedConfig(), views=Augment(size=32))
    assert "Divergence" in said(edit(learned, optim=dict(WILD, lr=60.0)), tmp_path, until="Divergence")
    with pytest.raises(Diverged):
        said(edit(learned, optim=dict(WILD, lr=1e4)), tmp_path)
    (finding,) = Monitor(64).see({"step": 40, "loss": math.nan})
    assert finding.name == "Divergence"


@pytest.mark.parametrize(
    "method",
    [None, BYOLConfig(**SMALL), MoCoConfig(queue=64, **SMALL), SupervisedConfig()],
    ids=["DINO", "BYOL", "MoCo", "supervised"],
)
def test_a_healthy_run_raises_none(tmp_path: Path, method: Any) -> None:
    run = HEALTHY if method is None else edit(HEALTHY, method=method)
    if isinstance(method, SupervisedConfig):
        run = edit(run, views=Augment(size=32))
    assert said(run, tmp_path) == {}
    assert check_config(edit(run, optim=dict(epochs=20)), 10, 80) == []


# -- before the first step ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(method=dict(teacher_temp=0.08, warmup_teacher_temp=0.08)), "Temperature too high for its warm-up"),
        (dict(method=dict(teacher_temp=0.07, warmup_teacher_temp_epochs=3)), "Temperature too high for its warm-up"),
        (dict(method=dict(momentum=0.9999)), "Momentum too high for so few steps"),
        (dict(method=dict(out_dim=65536)), "K too large for so few pictures"),
        (dict(method=dict(center_momentum=0.999)), "Center too slow"),
        (dict(method=dict(targets="none")), "No centering"),
        (dict(method=dict(sharpening=False)), "No sharpening"),
        (dict(method=dict(teacher="previous-step")), "No momentum"),
        (dict(method=dict(head_bottleneck=0)), "No bottleneck"),
        (dict(method=BYOLConfig(predictor=False)), "No predictor"),
    ],
)
def test_settings_that_are_known_to_collapse_are_named_before_the_first_step(changes: dict, named: str) -> None:
    run = edit(Run(), method=dict(out_dim=4096))
    assert check_config(run, 100, 6500) == []
    (finding,) = check_config(edit(run, **changes), 100, 6500)
    assert finding.name == named


def test_no_recipe_is_warned_of() -> None:
    for recipe in (getattr(paper, name) for name in dir(paper) if name.startswith(("vit", "resnet"))):
        assert check_config(recipe(), 1_281_167 // recipe().optim.batch_size, 1_281_167) == []
    for recipe in (small, small_vit, narrow_vit, demo, vit_tiny):
        dataset = 1800 if recipe is demo else 6500
        assert check_config(recipe(), dataset // recipe().optim.batch_size, dataset) == []


def test_what_the_teacher_took_on_is_that_of_the_momenta() -> None:
    """Half its random start is left where the momenta multiply to a half."""
    run = edit(Run(), method=DINOConfig(out_dim=64, momentum=0.5 ** (1 / 200), momentum_end=0.5 ** (1 / 200)))
    (finding,) = check_config(run, 2, 1000)  # 100 epochs of 2 steps
    assert "50%" in finding.seen


def test_milder_settings_never_replace_a_missing_part() -> None:
    run = edit(Run(), method=dict(teacher_temp=0.06, warmup_teacher_temp=0.04))
    changed = {name: new for name, _, new in differences(run, relax(run, "Uniform collapse"))}
    assert changed == {
        "optim.lr": run.optim.lr / 2,
        "method.teacher_temp": pytest.approx(0.045),
        "method.warmup_teacher_temp": pytest.approx(0.03),
    }
    assert relax(edit(run, method=dict(targets="none")), "Collapse to one prototype") is None


# -- what a session does about it --------------------------------------------------------------------------


def session(run: Run, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    outcome = run_session(run, CPU, run.data.open(), Terminal())
    return outcome, capsys.readouterr().out


def test_stop_ends_at_the_collapse_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = edit(DULL, method=dict(targets="none"), on_collapse="stop", out=str(tmp_path / "run"))
    outcome, out = session(run, capsys)
    assert not outcome.finished
    assert outcome.collapse.startswith("Collapse to one prototype")
    assert outcome.clock.step == 30 + LINES - 1  # it must stand for some lines
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["step"] == outcome.clock.step
    assert out.count("Collapse to one prototype: teacher entropy") == 1
    report = outcome.report.read_text()
    assert "one output takes every picture" in report
    assert "Effective rank" in report


def test_rollback_goes_on_from_the_last_healthy_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch the teacher's temperature is 2, and everything uniform; then 1.5, which is still too much. A
    checkpoint is trusted soon, so that few steps do."""
    monkeypatch.setattr(policy, "MARGIN", 3)
    monkeypatch.setattr(policy, "ROLLBACKS", 1)
    hot = dict(teacher_temp=2.0, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=2)
    run = edit(HEALTHY, data=dict(count=160), method=hot, optim=dict(epochs=2, batch_size=4), save_minutes=0)
    outcome, out = session(edit(run, on_collapse="rollback", out=str(tmp_path / "run")), capsys)
    assert "the last healthy checkpoint; it goes on with" in out
    assert "--optim.lr 0.015 (was 0.03)" in out
    assert "--method.teacher-temp 1.5 (was 2)" in out
    assert "after 1 times it ends here" in out
    assert not outcome.finished
    collapsed = [int(text.split()[0]) for text in out.split("Back from step ")[1:]]
    back = [int(text.split(",")[0]) for text in out.split(" to step ")[1:]]
    assert all(25 < good < 40 < bad < 60 for good, bad in zip(back, collapsed, strict=True))
    saved, kept = (checkpoint.load(tmp_path / f"run/checkpoints/{name}.pt") for name in ("last", "healthy"))
    assert saved["step"] == kept["step"] == outcome.clock.step == back[-1]
    exported = load(tmp_path / "run").state_dict()  # the healthy one's, not the collapsed
    own = {name.removeprefix("teacher.backbone."): value for name, value in saved["method"].items()}
    assert all(torch.equal(value, own[name]) for name, value in exported.items())
    assert read_run(tmp_path / "run").method.teacher_temp == 1.5  # pyright: ignore[reportAttributeAccessIssue]
    assert [row["step"] for row in read_said(tmp_path / "run") if "Back from" in row["said"]] == collapsed


class Line(NamedTuple):
    """A healthy line, or one at ln K."""

    loss: float
    teacher_entropy: float
    kl: float = 1.0
    marginal_entropy: float = 4.0


GOOD, BAD = Line(3.0, 2.0), Line(math.log(64), math.log(64), 0.0, math.log(64))


def guarded_run(tmp_path: Path, **changes: Any) -> tuple[policy.CollapsePolicy, Started]:
    run = edit(HEALTHY, out=str(tmp_path / "run"), **changes)
    started = Started(Clock(0, 10, 100), build_method(run), run.data.open(), None, {}, {})
    watching = policy.CollapsePolicy(run, Terminal(quiet=True), is_main=True)
    watching.begin(started)
    return watching, started


def feed(watching: policy.CollapsePolicy, steps: range, line: Line, *, save_at: int = -1) -> list[int]:
    """The steps at which training was to end; a checkpoint of that step is saved after the line of `save_at`."""
    ended = []
    for step in steps:
        if watching.line(Logged(Clock(step, 10, 100), line._asdict())):
            ended.append(step)
        if step == save_at:
            run = watching.run
            saved = {"run": {}, "step": step, "method": {}, "optimizer": {}, "scaler": {}, "best": {}, "data": ""}
            checkpoint.save(Path(run.out) / "checkpoints/last.pt", saved)  # pyright: ignore[reportArgumentType]
    return ended


def test_a_collapse_that_passes_stops_nothing(tmp_path: Path) -> None:
    watching, _ = guarded_run(tmp_path, on_collapse="stop")
    assert feed(watching, range(1, 60), GOOD) == []
    assert feed(watching, range(60, 60 + 2 * LINES - 2), BAD) == []  # the mean of lines sees it at the last LINES - 1
    assert feed(watching, range(80, 100), GOOD) == []
    assert feed(watching, range(100, 120), BAD)


def test_a_checkpoint_counts_once_healthy_lines_have_followed(tmp_path: Path) -> None:
    """One saved shortly before the collapse shows is not trusted; the one before it is."""
    watching, _ = guarded_run(tmp_path, on_collapse="rollback")
    feed(watching, range(1, 50), GOOD, save_at=40)
    assert not (tmp_path / "run/checkpoints/healthy.pt").exists()
    feed(watching, range(50, 60), GOOD, save_at=55)
    feed(watching, range(60, 62), GOOD, save_at=60)
    ended = feed(watching, range(62, 80), BAD, save_at=70)
    assert ended
    watching.step = ended[0]
    verdict = watching.verdict(None)
    assert verdict is not None
    assert verdict.back_to == 40
    assert verdict.run is not None
    assert verdict.run.optim.lr == watching.run.optim.lr == HEALTHY.optim.lr / 2


def test_without_a_healthy_checkpoint_it_ends(tmp_path: Path) -> None:
    watching, _ = guarded_run(tmp_path, on_collapse="rollback")
    assert feed(watching, range(1, 80), BAD)
    verdict = watching.verdict(None)
    assert verdict is not None
    assert verdict.run is verdict.back_to is None
