"""The paper's equations equal loops over pairs, images and prototypes."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from dino_ssl.objectives import H, P, dino_loss, h, log_P, momentum_update, update_center


def logits(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    exponentials = [math.exp((value - top) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def slow_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> float:
    """Eq. 1, 2, 3 as printed, averaged over the pairs: x over the teacher's views, x' != x in V."""
    pairs = []
    for x in range(teacher.shape[0]):
        for other in range(student.shape[0]):
            if other == x:
                continue
            for image in range(student.shape[1]):
                raw = [float(t) - float(c) for t, c in zip(teacher[x, image], center, strict=True)]
                target = slow_softmax(raw, teacher_temp)
                guess = slow_softmax([float(s) for s in student[other, image]], student_temp)
                pairs.append(-sum(a * math.log(b) for a, b in zip(target, guess, strict=True)))
    return sum(pairs) / len(pairs)


SIZES = {
    "2 global, 3 local": (5, 2, 3, 7),
    "2 global, none local": (2, 2, 4, 5),
    "one image": (4, 2, 1, 6),
    "one global": (3, 1, 2, 5),
    "three global": (5, 3, 2, 4),
}


@pytest.mark.parametrize(("V", "G", "B", "K"), SIZES.values(), ids=SIZES.keys())
def test_eq3_is_the_mean_over_pairs_of_different_views(V: int, G: int, B: int, K: int) -> None:
    student, teacher, center = logits(V, B, K), logits(G, B, K, seed=1), logits(K, seed=2)
    loss = dino_loss(student, teacher, center=center, student_temp=0.3, teacher_temp=0.2)
    assert loss.item() == pytest.approx(slow_loss(student, teacher, center, 0.3, 0.2), rel=1e-5)


def test_eq3_gradient_is_prediction_minus_target_over_temperature() -> None:
    """d H(p, softmax(s / tau)) / d s = (softmax(s / tau) - p) / tau, summed over each view's pairs."""
    V, G, B, K = 4, 2, 3, 6
    student, teacher, center = logits(V, B, K).requires_grad_(), logits(G, B, K, seed=1), logits(K, seed=2)
    dino_loss(student, teacher, center=center, student_temp=0.2, teacher_temp=0.1).backward()
    expected = torch.zeros(V, B, K)
    for view in range(V):
        for x in range(G):
            if x != view:
                guess = torch.softmax(student[view].detach() / 0.2, -1)
                target = torch.softmax((teacher[x] - center) / 0.1, -1)
                expected[view] += (guess - target) / 0.2
    torch.testing.assert_close(student.grad, expected / (B * (G * V - G)), atol=1e-6, rtol=1e-5)


def test_eq3_does_not_depend_on_the_order_of_the_views() -> None:
    student, teacher = logits(6, 3, 8), logits(2, 3, 8, seed=1)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return dino_loss(student, teacher, center=0.0, student_temp=0.1, teacher_temp=0.04)

    before = loss(student, teacher)
    torch.testing.assert_close(loss(student[[0, 1, 5, 3, 2, 4]], teacher), before)
    torch.testing.assert_close(loss(student[[1, 0, 2, 3, 4, 5]], teacher[[1, 0]]), before)
    assert not torch.allclose(loss(student, teacher[[1, 0]]), before)  # which view is whose does matter


def test_eq3_excludes_pairs_of_a_view_with_itself() -> None:
    """The loss does not reward a student that equals the teacher on the same view."""
    teacher = logits(2, 3, 8, seed=1, scale=3)
    student = logits(2, 3, 8)
    settings = dict(center=0.0, student_temp=0.1, teacher_temp=0.04)
    swapped = dino_loss(teacher[[1, 0]], teacher, **settings)
    own = dino_loss(teacher, teacher, **settings)
    assert swapped < 0.2 * own
    assert own == pytest.approx(slow_loss(teacher, teacher, torch.zeros(8), 0.1, 0.04), rel=1e-4)
    changed = student.clone()
    changed[0] += 1.0  # softmax ignores a shift of all: so does the loss
    torch.testing.assert_close(dino_loss(changed, teacher, **settings), dino_loss(student, teacher, **settings))


def test_eq1_subtracts_the_center() -> None:
    raw = torch.tensor([2.0, 1.0, 0.0])
    center = torch.tensor([2.0, 0.0, 0.0])
    assert P(raw, 0.5).argmax() == 0
    assert P(raw, 0.5, center).argmax() == 1
    torch.testing.assert_close(P(raw, 0.5, center), torch.softmax(torch.tensor([0.0, 1.0, 0.0]) / 0.5, -1))
    torch.testing.assert_close(log_P(raw, 0.5, center), P(raw, 0.5, center).log())


def test_eq1_is_sharper_at_lower_temperature_and_argmax_at_zero() -> None:
    raw, center = logits(4, 9), logits(9, seed=1)
    entropies = [h(P(raw, t, center)).mean().item() for t in (1.0, 0.1, 0.04, 1e-4, 0.0)]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] == 0
    expected = torch.zeros(4, 9)
    for row in range(4):
        expected[row, (raw - center)[row].argmax()] = 1
    assert torch.equal(P(raw, 0, center), expected)
    torch.testing.assert_close(P(raw, 1e-4, center), expected)


def test_eq3_at_temperature_zero_is_the_log_likelihood_of_the_argmax() -> None:
    student, teacher = logits(2, 3, 5).requires_grad_(), logits(2, 3, 5, seed=1)
    loss = dino_loss(student, teacher, center=0.0, student_temp=0.1, teacher_temp=0)
    expected = sum(
        -torch.log_softmax(student[1 - x, b].detach() / 0.1, -1)[teacher[x, b].argmax()]
        for x in range(2)
        for b in range(3)
    )
    torch.testing.assert_close(loss.detach(), torch.as_tensor(expected) / 6)
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_large_logits_do_not_overflow_or_underflow() -> None:
    student = torch.tensor([[[0.0, 500.0]], [[500.0, 0.0]]]).requires_grad_()
    teacher = torch.tensor([[[0.0, 500.0]], [[500.0, 0.0]]])
    loss = dino_loss(student, teacher, center=0.0, student_temp=0.1, teacher_temp=0.04)
    assert loss.item() == pytest.approx(5000)
    loss.backward()
    assert torch.isfinite(student.grad).all()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = logits(4, 3, 50).to(dtype), logits(2, 3, 50, seed=1).to(dtype)
    center = logits(50, seed=2)
    loss = partial(dino_loss, center=center, student_temp=0.1, teacher_temp=0.04)
    assert loss(student, teacher).dtype == torch.float32
    assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))
    for of in (P, log_P):
        for c in (center, 0.0):  # a center of float32 alone would lift them
            assert of(student, 0.1, c).dtype == torch.float32
            assert torch.equal(of(student, 0.1, c), of(student.float(), 0.1, c))
    assert h(P(student, 0.1).to(dtype)).dtype == torch.float32


def test_eq2_is_minus_the_sum_of_p_log_q() -> None:
    p, q = [0.5, 0.25, 0.25], [0.1, 0.6, 0.3]
    expected = -(0.5 * math.log(0.1) + 0.25 * math.log(0.6) + 0.25 * math.log(0.3))
    assert H(torch.tensor(p), torch.tensor(q).log()).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.04, 0.0])
def test_eq5_cross_entropy_is_entropy_plus_divergence(temperature: float) -> None:
    p, log_q = P(logits(6, 20), temperature), log_P(logits(6, 20, seed=1), 0.1)
    entropy = torch.tensor([-sum(a * math.log(a) for a in row if a > 0) for row in p.tolist()])
    torch.testing.assert_close(h(p), entropy, atol=1e-5, rtol=1e-5)
    divergence = [
        sum(a * (math.log(a) - b) for a, b in zip(*rows, strict=True) if a > 0)
        for rows in zip(p.tolist(), log_q.tolist(), strict=True)
    ]
    torch.testing.assert_close(H(p, log_q) - h(p), torch.tensor(divergence), atol=1e-5, rtol=1e-5)


def test_eq5_divergence_from_itself_is_zero_and_entropy_has_its_bounds() -> None:
    p = P(logits(6, 20), 0.5)
    torch.testing.assert_close(H(p, p.log()) - h(p), torch.zeros(6), atol=1e-6, rtol=0)
    assert h(torch.full((20,), 1 / 20)).item() == pytest.approx(math.log(20), rel=1e-6)
    assert h(torch.eye(20)).tolist() == [0.0] * 20


def test_eq4_center_is_an_ema_of_the_batch_mean() -> None:
    teacher = [logits(2, 3, 4, seed=s) for s in range(5)]
    center = torch.zeros(4)
    by_hand = [0.0] * 4
    for batch in teacher:
        center = update_center(center, batch.mean((0, 1)), 0.9)
        for k in range(4):
            mean = sum(float(batch[g, b, k]) for g in range(2) for b in range(3)) / 6
            by_hand[k] = 0.9 * by_hand[k] + 0.1 * mean
    torch.testing.assert_close(center, torch.tensor(by_hand))
    assert torch.equal(update_center(center, teacher[0][0, 0], 0.0), teacher[0][0, 0])  # m = 0: this batch alone


def test_momentum_update_is_an_ema_of_the_student() -> None:
    teacher = [logits(3, 2), logits(4, seed=1)]
    student = [logits(3, 2, seed=2), logits(4, seed=3)]
    expected = [
        torch.tensor(
            [0.996 * a + (1 - 0.996) * b for a, b in zip(t.flatten().tolist(), s.flatten().tolist(), strict=True)]
        )
        for t, s in zip(teacher, student, strict=True)
    ]
    kept = [s.clone() for s in student]
    momentum_update(teacher, student, 0.996)
    for moved, by_hand in zip(teacher, expected, strict=True):
        torch.testing.assert_close(moved.flatten(), by_hand)
    assert all(torch.equal(a, b) for a, b in zip(student, kept, strict=True))
    before = [t.clone() for t in teacher]
    momentum_update(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher, before, strict=True))
    momentum_update(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))
