"""Training runs with DINO's switches: bit-identical resume, kinds of teachers, heads of App. C."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU, RUN, dataset_of, differences, edit, fit, last, same_training

from dino_ssl.data.batch import Batch
from dino_ssl.events import Logged, Started
from dino_ssl.methods.dino import DINO, DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.run import Run
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method
from dino_ssl.training import train, train_step

CONVNET = Timm(name="resnet18", args=(("channels", "(8, 8, 8, 16)"), ("layers", "(1, 1, 1, 1)")))
SHORT = edit(
    RUN,
    backbone=dict(width=24, depth=1, heads=2),
    views=dict(local=1),
    optim=dict(epochs=2),
    method=dict(freeze_last_layer=0.4),
)
"""5 steps per epoch, 10 in total."""


@pytest.mark.parametrize(
    "method",
    [
        dict(teacher="student", targets="sinkhorn"),
        dict(teacher="previous-step", targets="batch-softmax", predictor=True),
        dict(teacher="previous-epoch", targets="sinkhorn", head_norm="batch"),
        dict(targets="none", loss="mse", predictor=True, norm_last=False),
    ],
    ids=lambda method: ", ".join(map(str, method.values())),
)
def test_resume_is_bit_equal(tmp_path: Path, method: dict) -> None:
    """Also for a teacher that is an older copy of the student: at step 7 they differ."""
    whole = edit(SHORT, method=method, out=str(tmp_path / "whole"), save_minutes=60)
    fit(whole)
    part = edit(whole, out=str(tmp_path / "part"), save_minutes=0)
    fit(part, until=8)
    state = last(part)["method"]
    names = [name for name in state if name.startswith("teacher.") and "weight_g" not in name]
    apart = [name for name in names if not torch.equal(state[name], state[name.replace("teacher.", "student.", 1)])]
    assert bool(apart) == (method.get("teacher") != "student")
    fit(part, resume=True)
    assert not same_training(part, whole)


# -- teachers -----------------------------------------------------------------------------------------------


def weights(method: DINO, which: str) -> dict[str, torch.Tensor]:
    """Parameters and statistics of a network, without the predictor."""
    network = {"teacher": method.teacher, "student": method.student}[which]
    return {name: v.clone() for name, v in network.state_dict().items() if not name.startswith("head.predictor.")}


def steps(run: Run) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """(steps taken, teacher, student) at the start and after every step."""
    method = None
    for event in train(run, CPU, dataset_of(run.data)):
        if isinstance(event, Started | Logged):
            method = event.method if isinstance(event, Started) else method
            assert isinstance(method, DINO)
            yield event.clock.step, weights(method, "teacher"), weights(method, "student")


@pytest.fixture(params=["student", "previous-step", "previous-epoch"])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list, list]:
    """A teacher's kind, the teacher and the student after 0, 1, ... 10 steps: a ConvNet with batch norm."""
    method = dict(teacher=request.param, predictor=True, head_norm="batch")
    run = edit(SHORT, backbone=CONVNET, method=method, out=str(tmp_path / "run"), save_minutes=60)
    numbers, teachers, students = zip(*steps(run), strict=True)
    assert numbers == tuple(range(11))
    return request.param, list(teachers), list(students)


def test_copied_teacher_equals_the_student_of_its_step(history: tuple[str, list, list]) -> None:
    """`student`: the current step; `previous-step`: one step behind; `previous-epoch`: the last step of an epoch."""
    kind, teachers, students = history
    behind = {"student": lambda step: step, "previous-step": lambda step: step - 1}
    then = behind.get(kind, lambda step: step // 5 * 5)
    for step in range(1, 11):
        assert not differences(without_statistics(teachers[step]), without_statistics(students[then(step)])), step
        if step > 1:  # the first step's rate is 0
            assert differences(without_statistics(students[step]), without_statistics(students[step - 1])), (
                step
            )  # check that the comparison can fail
        if kind != "previous-step" and then(step) == step:
            assert not differences(teachers[step], students[step]), step  # including batch norm statistics


def without_statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the statistics of batch norm, which every forward pass changes."""
    return {name: value for name, value in state.items() if "running" not in name and "num_batches" not in name}


# -- predictor ----------------------------------------------------------------------------------------------


def test_only_the_student_has_a_predictor() -> None:
    """It has no part in the EMA, and its weights get gradients from the loss."""
    dino = build_method(edit(RUN, method=dict(predictor=True)))
    assert isinstance(dino, DINO)
    student, teacher = (dict(network.named_parameters()) for network in (dino.student, dino.teacher))
    added = student.keys() - teacher.keys()
    assert added == {name for name in student if name.startswith("head.predictor.")} != set()
    assert not teacher.keys() - student.keys()
    views = torch.randn(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dino(Batch((views,)), Clock(0, 30, 1)).loss.backward()
    assert all(student[name].grad is not None and student[name].grad.any() for name in added if "bias" not in name)


# -- heads (App. C) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("bottleneck", [0, 8])
@pytest.mark.parametrize(("norm", "act"), [("none", "gelu"), ("batch", "relu")])
def test_every_head_of_appendix_c_trains(norm: Any, act: Any, layers: int, bottleneck: int) -> None:
    """All parameters get a gradient, and 30 steps on one batch reduce the KL to a constant teacher.

    Without bottleneck and norm, a head of several layers has nearly the same output for all inputs (deep ones fail in
    App. C), so the initial KL is about 0.
    """
    settings = dict(head_norm=norm, head_act=act, head_layers=layers, head_bottleneck=bottleneck)
    still = dict(momentum=1.0, center_momentum=1.0, freeze_last_layer=0, teacher_temp=0.04)
    method = DINOConfig(out_dim=16, head_hidden=24, **settings, **still)  # pyright: ignore[reportArgumentType]
    optim = dict(epochs=1, lr=0.1, min_lr=0.1, warmup_epochs=0, weight_decay=0.0, weight_decay_end=0.0)
    run = edit(RUN, method=method, backbone=dict(width=12, depth=1, heads=1, drop_path=0.0), optim=optim)
    dino = build_method(run)
    assert isinstance(dino, DINO)
    state = State(dino, run.optim.build(dino.trainable), CPU.scaler())
    generator = torch.Generator().manual_seed(0)
    batch = Batch((torch.randn(2, 6, 3, 16, 16, generator=generator), torch.randn(1, 6, 3, 8, 8, generator=generator)))
    dino(batch, Clock(0, 30, 1)).loss.backward()
    for name, parameter in dino.student.head.named_parameters():
        if parameter.requires_grad and not (norm == "batch" and name.endswith("bias")):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    kl = [float(train_step(state, dino, batch, Clock(i, 30, 1), run, CPU)["kl"]) for i in range(30)]
    if kl[0] < 0.01:
        assert (norm, bottleneck) == ("none", 0)
        assert layers > 1
    else:
        assert kl[-1] <= 0.8 * kl[0], kl
