"""The fast twin of the last layer and the loss equals the plain one: values, gradients, center and shares."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_ssl import objectives
from dino_ssl.kernels import loss as fast
from dino_ssl.models.heads import MLPHead, WeightNormLinear

V, G, B, D, K = 5, 2, 7, 6, 40


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 rows a chunk: views end in the middle of one, and the last is smaller."""
    monkeypatch.setitem(fast.CHUNK, "cpu", 3 * K)


def bottlenecks(views: int, seed: int) -> Tensor:
    return objectives.l2_normalize(torch.randn(views, B, D, generator=torch.Generator().manual_seed(seed)))


def layers(*, learn_scale: bool = False) -> tuple[WeightNormLinear, WeightNormLinear]:
    torch.manual_seed(0)
    student, teacher = (WeightNormLinear(D, K, learn_scale=learn_scale) for _ in range(2))
    with torch.no_grad():
        student.weight_g.mul_(torch.rand(K, 1) + 0.5)
    return student, teacher


def asked(module: Any, student: Tensor, teacher: Tensor, both: tuple[nn.Module, nn.Module], **how: Any) -> Any:
    """(what was found, the gradients of student, lengths and directions)"""
    student = student.clone().requires_grad_()
    how = dict(center=0.1 * torch.randn(K, generator=torch.Generator().manual_seed(9)), loss="cross-entropy") | how
    found = module.distil(student, teacher, *both, **{"student_temp": 0.1, "teacher_temp": 0.04} | how)
    moving = [parameter for parameter in both[0].parameters() if parameter.requires_grad]
    return found, torch.autograd.grad(3 * found.loss, [student, *moving])


CASES = {
    "the paper's": dict(views=V, globals_=G, how={}),
    "global views alone": dict(views=G, globals_=G, how={}),
    "fewer student views than teacher views": dict(views=1, globals_=2, how={}),
    "a warm teacher": dict(views=V, globals_=G, how=dict(teacher_temp=0.1)),
    "a center of each view": dict(
        views=V, globals_=G, how=dict(center=torch.linspace(-9, 9, G * K).sin().view(G, 1, K))
    ),
    "mse": dict(views=V, globals_=G, how=dict(loss="mse")),
    "argmax targets": dict(views=V, globals_=G, how=dict(teacher_temp=0.0)),
}


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_plain_ones(case: str, learn_scale: bool) -> None:
    views, globals_, how = CASES[case].values()
    x, y, both = bottlenecks(views, 1), bottlenecks(globals_, 2), layers(learn_scale=learn_scale)
    (one, gradients), (other, expected) = (asked(module, x, y, both, **how) for module in (fast, objectives))
    for found, right in zip(one, other, strict=True):
        assert (found is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-5)
    assert one.loss.requires_grad
    for found, right in zip(gradients, expected, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-4)
    assert not any(value.requires_grad for value in one[1:] if value is not None)


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_batch_is_spread_as_plainly(iterations: int) -> None:
    teacher, layer = bottlenecks(G, 2), layers()[1]
    found, right = (module.spread(teacher, layer, 0.05, iterations) for module in (fast, objectives))
    assert found.shape == right.shape == (G, 1, K)
    torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-5)
    assert right.std() > 0.01


def test_in_bfloat16_it_rounds_as_the_plain_one_does() -> None:
    """Both are as far from float32 as rounding logits to 8 bits puts them."""
    x, y, both = bottlenecks(V, 1), bottlenecks(G, 2), layers()
    (_, exact) = asked(objectives, x, y, both)
    with torch.autocast("cpu", torch.bfloat16):
        (one, gradients), (other, expected) = (asked(module, x, y, both) for module in (fast, objectives))
    torch.testing.assert_close(one.loss, other.loss, atol=0.02, rtol=0.01)
    for found, right, true in zip(gradients, expected, exact, strict=True):
        assert found.dtype == right.dtype
        assert (found - true).norm() < 1.5 * (right - true).norm() + 0.01 * true.norm()


def test_what_float16_multiplies_is_as_large_for_many_pictures_as_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over many pairs is below what float16 holds, and loss scaling comes too late for what is computed before
    it: of 512 pictures and 65536 prototypes the gradient was off by more than a percent."""
    multiplied: list[float] = []
    product = fast._add_product

    def watched(total: Tensor, q: Tensor, x: Tensor, scale: float = 1) -> None:
        multiplied.append(x.abs().max().item())
        product(total, q, x, scale)

    monkeypatch.setattr(fast, "_add_product", watched)
    x, y, both = bottlenecks(V, 1), bottlenecks(G, 2), layers()
    few = asked(fast, x, y, both)[1]
    largest = max(multiplied)
    many = asked(fast, x.repeat(1, 50, 1), y.repeat(1, 50, 1), both)[1]
    assert max(multiplied) == largest > 0.1
    torch.testing.assert_close(many[1], few[1], atol=1e-5, rtol=1e-3)  # the same pictures 50 times: the same mean
    with torch.autocast("cpu", torch.float16):
        rounded = asked(fast, x, y, both)[1]
    for found, right in zip(rounded, few, strict=True):
        assert (found - right).norm() < 0.01 * right.norm()


def test_a_predictor_behind_the_prototypes_is_left_to_the_plain_one() -> None:
    x, y, (student, teacher) = bottlenecks(V, 1), bottlenecks(G, 2), layers()
    predictor = MLPHead(K, K, hidden=8, norm="none")
    both = (nn.Sequential(student, predictor), teacher)
    (one, gradients), (other, expected) = (asked(module, x, y, both) for module in (fast, objectives))
    assert torch.equal(one.loss, other.loss)
    assert all(torch.equal(found, right) for found, right in zip(gradients, expected, strict=True))


def test_nothing_k_wide_is_held_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that any operation makes has a chunk's rows, or is a gradient of the prototypes."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[-1] == K:
                largest = max(largest, len(out))
            return out

    x, y, both = bottlenecks(V, 1), bottlenecks(G, 2), layers()
    with Watch():
        asked(fast, x, y, both)
        fast.batch_center(y, both[1], 0.05, 3)
    assert largest == max(3, D)  # weight.T has D rows
