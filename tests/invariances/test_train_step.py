"""One training step of DINO: its schedules, its order, and the state that ranks share."""

from typing import Any

import pytest
import torch
from tiny import CPU, RUN, differences
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.methods.dino import DINO, Carry
from dino_ssl.objectives import dino_loss
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method
from dino_ssl.training import batch_to_device, train_step

PLAIN = edit(
    RUN,
    backbone=dict(drop_path=0.0),
    method=dict(freeze_last_layer=0, momentum=0.9),
    optim=dict(algorithm="sgd", lr=1.0, warmup_epochs=0),
)
CLOCK = Clock(0, steps_per_epoch=2, epochs=3)


def batch(count: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(0)
    sides = (32, 16)
    views = [torch.randint(0, 256, (2, count, 3, n, n), dtype=torch.uint8, generator=generator) for n in sides]
    return Batch(tuple(views), None)


def state(run: Run, scaler: torch.amp.GradScaler | None = None) -> State:
    method = build_method(run)
    return State(method, run.optim.build(method.trainable), scaler or CPU.scaler())


def dino(**settings: Any) -> DINO:
    method = build_method(edit(PLAIN, method=settings))
    assert isinstance(method, DINO)
    return method


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    """A loss scale changes neither the weights nor the logged gradient norm. The paper's presets train in float16."""
    run = edit(PLAIN, optim=dict(clip_grad=0.1))
    plain, scaled = state(run), state(run, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    norms = [train_step(s, s.method, batch(), CLOCK, run, CPU)["grad_norm"] for s in (plain, scaled)]
    torch.testing.assert_close(norms[1], norms[0])
    assert norms[0] > 0.1
    close = lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    assert not differences(scaled.method.state_dict(), plain.method.state_dict(), same=close)
    assert differences(build_method(run).state_dict(), plain.method.state_dict(), same=close)


def test_prototypes_are_frozen_in_the_first_epoch_only() -> None:
    run = edit(PLAIN, method=dict(freeze_last_layer=1))
    training = state(run)
    weights = training.method.trainable.get_parameter("head.last_layer.weight_v")
    changed = []
    for step in range(4):
        before = weights.detach().clone()
        train_step(training, training.method, batch(), CLOCK._replace(step=step), run, CPU)
        changed.append(not torch.equal(before, weights))
    assert changed == [False, False, True, True]


def test_teacher_has_the_momentum_of_the_step() -> None:
    """The first step has the initial momentum; the cosine reaches 1 after the last step."""
    for step, momentum in ((0, 0.5), (3, 0.75)):
        method = dino(momentum=0.5, momentum_end=1.0)
        before = [parameter.clone() for parameter in method.teacher.parameters()]
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(1)
        method.after_step(Carry(torch.zeros(64), torch.ones(())), CLOCK._replace(step=step))
        for old, parameter in zip(before, method.teacher.parameters(), strict=True):
            torch.testing.assert_close(parameter, old + (1 - momentum))


@pytest.mark.parametrize(("step", "teacher_temp"), [(0, 0.04), (1, 0.04), (2, 0.08), (5, 0.08)])
def test_loss_has_the_teacher_temperature_of_the_epoch(step: int, teacher_temp: float) -> None:
    """The loss is Eq. 3 of the teacher's outputs for the two global views and the student's for all views."""
    method = dino(warmup_teacher_temp=0.04, teacher_temp=0.08, warmup_teacher_temp_epochs=2)
    images = batch_to_device(batch(), CPU)
    loss = method(images, CLOCK._replace(step=step)).loss
    student, teacher = method.student(images.views), method.teacher(images.views[:1])
    expected = dino_loss(student, teacher, center=method.center, student_temp=0.1, teacher_temp=teacher_temp)
    torch.testing.assert_close(loss, expected)


def test_teacher_uses_batch_statistics() -> None:
    """The teacher stays in training mode as in the authors' code, so its batch norm normalises over the batch."""
    method = dino(head_norm="batch")
    before = {name: value.clone() for name, value in method.teacher.named_buffers()}
    method(batch_to_device(batch(), CPU), CLOCK)
    means = [name for name in before if name.endswith("running_mean")]
    assert means
    assert not [name for name in means if torch.equal(before[name], method.teacher.get_buffer(name))]


def test_center_weighs_images_and_not_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may hold unequal numbers of images, because unreadable ones are skipped."""
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    carries = [Carry(part.sum(0), torch.tensor(float(len(part)))) for part in (logits[:2], logits[2:])]

    def all_ranks(tensor: Tensor) -> list[Tensor]:
        """Return the values of both ranks, given a sum or mean of logits, or a count, of rank 0."""
        if tensor.ndim == 0:
            return [carry.count for carry in carries]
        is_mean = torch.equal(tensor, carries[0].logits / carries[0].count)
        return [carry.logits / carry.count if is_mean else carry.logits for carry in carries]

    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: torch.stack(all_ranks(tensor)).sum(0))
    monkeypatch.setattr(distributed, "all_reduce_mean", lambda tensor: torch.stack(all_ranks(tensor)).mean(0))
    method = dino(center_momentum=0.0)
    method.after_step(carries[0], CLOCK)
    torch.testing.assert_close(method.center, logits.mean(0))


def test_random_numbers_differ_between_steps_ranks_and_seeds() -> None:
    """Drop-path is a function of (seed, step, rank)."""

    def draw(seed: int, step: int, rank: int) -> float:
        Runtime(CPU.device, "float32", rank=rank, world_size=4).seed_step(seed, step)
        return torch.rand(()).item()

    keys = [(seed, step, rank) for seed in range(2) for step in range(3) for rank in range(4)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, 2, 3) == draw(1, 2, 3)
