"""The kernel of last layer and loss equals the reference: values, gradients, center and prototype usage."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_ssl import objectives
from dino_ssl.kernels import loss as kernel
from dino_ssl.models.heads import WeightNormLinear

V, G, B, D, K = 5, 2, 7, 6, 40


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 rows per chunk: views end inside a chunk, and the last chunk is smaller."""
    monkeypatch.setitem(kernel.CHUNK, "cpu", 3 * K)


def bottlenecks(views: int, seed: int) -> Tensor:
    return objectives.l2_normalize(torch.randn(views, B, D, generator=torch.Generator().manual_seed(seed)))


def layers(*, learn_scale: bool = False) -> tuple[WeightNormLinear, WeightNormLinear]:
    torch.manual_seed(0)
    student, teacher = (WeightNormLinear(D, K, learn_scale=learn_scale) for _ in range(2))
    with torch.no_grad():
        student.weight_g.mul_(torch.rand(K, 1) + 0.5)
    return student, teacher


def loss_and_gradients(
    module: Any, student: Tensor, teacher: Tensor, both: tuple[nn.Module, nn.Module], **how: Any
) -> Any:
    """(the loss terms; the gradients of student, scales and directions)"""
    student = student.clone().requires_grad_()
    how = dict(center=0.1 * torch.randn(K, generator=torch.Generator().manual_seed(9)), loss="cross-entropy") | how
    terms = module.loss_from_bottleneck(student, teacher, *both, **{"student_temp": 0.1, "teacher_temp": 0.04} | how)
    trainable = [parameter for parameter in both[0].parameters() if parameter.requires_grad]
    return terms, torch.autograd.grad(3 * terms.loss, [student, *trainable])


CASES = {
    "paper": dict(views=V, globals_=G, how={}),
    "global views only": dict(views=G, globals_=G, how={}),
    "fewer student views than teacher views": dict(views=1, globals_=2, how={}),
    "high teacher temperature": dict(views=V, globals_=G, how=dict(teacher_temp=0.1)),
    "one center per view": dict(views=V, globals_=G, how=dict(center=torch.linspace(-9, 9, G * K).sin().view(G, 1, K))),
    "mse": dict(views=V, globals_=G, how=dict(loss="mse")),
    "argmax targets": dict(views=V, globals_=G, how=dict(teacher_temp=0.0)),
}


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case: str, learn_scale: bool) -> None:
    views, globals_, how = CASES[case].values()
    x, y, both = bottlenecks(views, 1), bottlenecks(globals_, 2), layers(learn_scale=learn_scale)
    (one, gradients), (other, expected) = (
        loss_and_gradients(module, x, y, both, **how) for module in (kernel, objectives)
    )
    for actual, target in zip(one, other, strict=True):
        assert (actual is None) == (target is None)
        if target is not None:
            torch.testing.assert_close(actual, target, atol=1e-6, rtol=1e-5)
    assert one.loss.requires_grad
    for actual, target in zip(gradients, expected, strict=True):
        assert target.abs().max() > 1e-3
        torch.testing.assert_close(actual, target, atol=1e-6, rtol=1e-4)
    assert not any(value.requires_grad for value in one[1:] if value is not None)


@pytest.mark.parametrize("iterations", [1, 3])
def test_batch_center_equals_the_reference(iterations: int) -> None:
    teacher, layer = bottlenecks(G, 2), layers()[1]
    actual, target = (module.batch_center(teacher, layer, 0.05, iterations) for module in (kernel, objectives))
    assert actual.shape == target.shape == (G, 1, K)
    torch.testing.assert_close(actual, target, atol=1e-6, rtol=1e-5)
    assert target.std() > 0.01


def test_bfloat16_rounding_errors_are_those_of_the_reference() -> None:
    """Both differ from float32 by the rounding of logits to 8 bits."""
    x, y, both = bottlenecks(V, 1), bottlenecks(G, 2), layers()
    (_, exact) = loss_and_gradients(objectives, x, y, both)
    with torch.autocast("cpu", torch.bfloat16):
        (one, gradients), (other, expected) = (
            loss_and_gradients(module, x, y, both) for module in (kernel, objectives)
        )
    torch.testing.assert_close(one.loss, other.loss, atol=0.02, rtol=0.01)
    for actual, target, exact_value in zip(gradients, expected, exact, strict=True):
        assert actual.dtype == target.dtype
        assert (actual - exact_value).norm() < 1.5 * (target - exact_value).norm() + 0.01 * exact_value.norm()


def test_float16_factors_do_not_shrink_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a mean over many pairs underflow in float16 before loss scaling.

    With 512 images and 65536 prototypes the gradient was off by more than a percent.
    """
    factors: list[float] = []
    product = kernel._add_product

    def watched(total: Tensor, q: Tensor, x: Tensor, scale: float = 1) -> None:
        factors.append(x.abs().max().item())
        product(total, q, x, scale)

    monkeypatch.setattr(kernel, "_add_product", watched)
    x, y, both = bottlenecks(V, 1), bottlenecks(G, 2), layers()
    few = loss_and_gradients(kernel, x, y, both)[1]
    largest = max(factors)
    many = loss_and_gradients(kernel, x.repeat(1, 50, 1), y.repeat(1, 50, 1), both)[1]
    assert max(factors) == largest > 0.1
    torch.testing.assert_close(many[1], few[1], atol=1e-5, rtol=1e-3)  # the same images 50 times have the same mean
    with torch.autocast("cpu", torch.float16):
        rounded = loss_and_gradients(kernel, x, y, both)[1]
    for actual, target in zip(rounded, few, strict=True):
        assert (actual - target).norm() < 0.01 * target.norm()


def test_reference_is_used_without_weight_normalization() -> None:
    x, y, both = bottlenecks(V, 1), bottlenecks(G, 2), (nn.Linear(D, K), nn.Linear(D, K))
    (one, gradients), (other, expected) = (loss_and_gradients(module, x, y, both) for module in (kernel, objectives))
    assert torch.equal(one.loss, other.loss)
    assert all(torch.equal(actual, target) for actual, target in zip(gradients, expected, strict=True))


def test_no_tensor_is_k_wide_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest output of any operation has the rows of a chunk, or is a gradient of the prototypes."""
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
        loss_and_gradients(kernel, x, y, both)
        kernel.batch_center(y, both[1], 0.05, 3)
    assert largest == max(3, D)  # weight.T has D rows
