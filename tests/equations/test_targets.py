"""Targets and losses of DINO's switches equal loops written from the paper."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_ssl.data.batch import Batch
from dino_ssl.errors import UserError
from dino_ssl.methods.dino import DINO, DINOConfig
from dino_ssl.methods.method import BuildContext
from dino_ssl.models import Backbone, BackboneConfig
from dino_ssl.models.backbone import Features
from dino_ssl.objectives import h, sinkhorn_knopp
from dino_ssl.schedules import Clock


def logits(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_sinkhorn(rows: list[list[float]], temperature: float, iterations: int) -> list[list[float]]:
    """Table 15: x = exp(x / tau), then repeatedly: divide columns by their sums, then rows by reference."""
    x = [[math.exp(value / temperature) for value in row] for row in rows]
    for _ in range(iterations):
        columns = [sum(row[k] for row in x) for k in range(len(x[0]))]
        x = [[value / columns[k] for k, value in enumerate(row)] for row in x]
        x = [[value / sum(row) for value in row] for row in x]
    return x


def slow_softmax_over_batch(rows: list[list[float]], temperature: float) -> list[list[float]]:
    """Table 15: x = softmax(x / tau, dim=0), then x /= x.sum(1)."""
    columns = [[math.exp(row[k] / temperature) for row in rows] for k in range(len(rows[0]))]
    columns = [[value / sum(column) for value in column] for column in columns]
    x = [[column[b] for column in columns] for b in range(len(rows))]
    return [[value / sum(row) for value in row] for row in x]


@pytest.mark.parametrize(("B", "K"), [(5, 3), (4, 9), (1, 6)])
@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_sinkhorn_knopp_is_the_papers_loop_for_each_view(B: int, K: int, iterations: int) -> None:
    x = logits(2, B, K)
    expected = torch.tensor([slow_sinkhorn(view.tolist(), 0.3, iterations) for view in x])
    torch.testing.assert_close(sinkhorn_knopp(x, 0.3, iterations), expected, atol=1e-6, rtol=1e-4)
    if iterations == 3:
        torch.testing.assert_close(sinkhorn_knopp(x, 0.3), expected, atol=1e-6, rtol=1e-4)  # the default


def test_softmax_over_batch_is_the_papers_loop() -> None:
    x = logits(2, 5, 7)
    expected = torch.tensor([slow_softmax_over_batch(view.tolist(), 0.3) for view in x])
    torch.testing.assert_close(sinkhorn_knopp(x, 0.3, iterations=1), expected, atol=1e-6, rtol=1e-4)


def test_sinkhorn_knopp_tends_to_uniform_marginals() -> None:
    """Rows sum to 1, and columns to B / K in the limit, for uneven logits too."""
    B, K = 12, 5
    x = logits(B, K) + torch.arange(K)
    assert sinkhorn_knopp(x, 0.5, iterations=1).sum(0).std() > 0.1
    spread = sinkhorn_knopp(x, 0.5, iterations=200)
    torch.testing.assert_close(spread.sum(0), torch.full((K,), B / K), atol=1e-3, rtol=0)
    torch.testing.assert_close(sinkhorn_knopp(x, 0.5).sum(1), torch.ones(B))
    # invariant to a constant per prototype and to a constant over all logits
    torch.testing.assert_close(sinkhorn_knopp(x - torch.arange(K) + 7, 0.5), sinkhorn_knopp(x, 0.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("of", [sinkhorn_knopp, partial(sinkhorn_knopp, iterations=1)])
def test_sinkhorn_targets_do_not_overflow_or_underflow(of: Any) -> None:
    """exp(500 / 0.04) overflows; an image with logits far below all others still gets a distribution."""
    x = torch.tensor([[500.0, 0.0, 1.0], [0.0, 500.0, 1.0], [-900.0, -900.5, -901.0]])
    targets = of(x, 0.04)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    half = of(x.to(torch.bfloat16), 0.04)
    assert half.dtype == torch.float32
    assert torch.equal(half, of(x.to(torch.bfloat16).float(), 0.04))


class Pixels(Backbone):
    """A backbone whose features are the image's pixels."""

    embed_dim = 3 * 2 * 2

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError


V, G, B, K = 4, 2, 5, 6
VIEWS = logits(V, B, 3, 2, 2, seed=3)


class PixelsConfig(BackboneConfig):
    def build(self, *, drop_path: float | None = None) -> Pixels:
        return Pixels()


def method(**settings: Any) -> DINO:
    """A method whose teacher differs from its student, and whose center is not 0."""
    torch.manual_seed(1)
    config = DINOConfig(out_dim=K, head_layers=2, head_hidden=8, head_bottleneck=5, **settings)
    dino = config.build(BuildContext(PixelsConfig()))
    for parameter in dino.teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if config.targets == "centering":
        dino.center += 0.2 * torch.randn(K)
    return dino


@torch.no_grad()
def slow_loss(dino: DINO, targets: Any) -> float:
    """Eq. 3, averaged over pairs, for given targets [G][B][K]."""
    student, total, pairs = dino.student([VIEWS]), 0.0, 0
    for x in range(G):
        for other in range(V):
            for b in range(B if other != x else 0):
                guess = torch.log_softmax(student[other, b] / 0.1, -1)
                total -= sum(float(targets[x][b][k]) * float(guess[k]) for k in range(K))
                pairs += 1
    return total / pairs


TARGETS = {
    "centering": lambda view, center: [torch.softmax((row - center) / 0.05, -1) for row in view],
    "sinkhorn": lambda view, _: slow_sinkhorn(view.tolist(), 0.05, 3),
    "batch-softmax": lambda view, _: slow_softmax_over_batch(view.tolist(), 0.05),
    "none": lambda view, _: [torch.softmax(row / 0.05, -1) for row in view],
}


@pytest.mark.parametrize("targets", TARGETS)
def test_loss_of_each_kind_of_targets_equals_a_loop(targets: Any) -> None:
    dino = method(targets=targets, teacher_temp=0.05)
    out = dino(Batch((VIEWS[:G], VIEWS[G:])), Clock(0, 4, 2))
    expected = [TARGETS[targets](view, dino.center) for view in dino.teacher([VIEWS[:G]])]
    assert out.loss.item() == pytest.approx(slow_loss(dino, expected), rel=1e-5)
    rows = torch.stack([torch.stack([torch.as_tensor(row) for row in view]) for view in expected])
    assert out.metrics["teacher_entropy"].item() == pytest.approx(h(rows).mean().item(), rel=1e-4)
    assert (out.metrics["teacher_entropy"] + out.metrics["kl"]).item() == pytest.approx(out.loss.item())
    dino.after_step(out.carry, Clock(0, 4, 2))
    moved = dino.teacher([VIEWS[:G]])
    assert (dino.center != 0).any() == (targets == "centering")
    assert torch.isfinite(moved).all()


def test_without_sharpening_the_teacher_has_the_students_temperature() -> None:
    dino = method(sharpening=False, teacher_temp=0.05)
    expected = [torch.softmax((view - dino.center) / 0.1, -1) for view in dino.teacher([VIEWS[:G]])]
    out = dino(Batch((VIEWS[:G], VIEWS[G:])), Clock(0, 4, 2))
    assert out.loss.item() == pytest.approx(slow_loss(dino, expected), rel=1e-5)


def test_temperature_zero_targets_are_the_argmax() -> None:
    dino = method(teacher_temp=0.0)
    expected = torch.zeros(G, B, K)
    for x, view in enumerate(dino.teacher([VIEWS[:G]])):
        for b in range(B):
            expected[x, b, (view[b] - dino.center).argmax()] = 1
    out = dino(Batch((VIEWS[:G], VIEWS[G:])), Clock(0, 4, 2))
    assert out.loss.item() == pytest.approx(slow_loss(dino, expected), rel=1e-5)
    assert out.metrics["teacher_entropy"] == 0


@torch.no_grad()
def test_mse_compares_centered_normalised_outputs_without_temperatures() -> None:
    dino = method(loss="mse", teacher_temp=0.04)
    student, teacher = dino.student([VIEWS]), dino.teacher([VIEWS[:G]])
    squares = []
    for x in range(G):
        for other in range(V):
            for b in range(B if other != x else 0):
                s, t = student[other, b], teacher[x, b] - dino.center
                squares.append(float(((s / s.norm() - t / t.norm()) ** 2).sum()))
    batch = Batch((VIEWS[:G], VIEWS[G:]))
    out = dino(batch, Clock(0, 4, 2))
    assert out.loss.item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert "teacher_entropy" not in out.metrics  # there is no distribution
    assert dino.config.num_prototypes is None
    warm = method(loss="mse", teacher_temp=0.5, student_temp=0.7, sharpening=False)
    assert torch.equal(warm(batch, Clock(0, 4, 2)).loss, out.loss)
    before = dino.center.clone()
    dino.after_step(out.carry, Clock(0, 4, 2))
    torch.testing.assert_close(dino.center, 0.9 * before + 0.1 * teacher.mean((0, 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(targets="sinkhorn", loss="mse"), "mse needs `method.targets` centering or none"),
        (dict(targets="batch-softmax", teacher_temp=0.0), "above 0"),
        (dict(targets="sinkhorn", warmup_teacher_temp=0.0, warmup_teacher_temp_epochs=2), "above 0"),
    ],
)
def test_incompatible_switches_raise(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DINOConfig(**settings)
    DINOConfig(targets="sinkhorn", teacher_temp=0.0, sharpening=False)  # its temperature is the student's
