"""The matrix product for tiny feature maps equals nn.Conv2d: values and gradients; other layers are unchanged."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dino_ssl.config import edit
from dino_ssl.kernels import small_conv
from dino_ssl.models.timm import Timm
from dino_ssl.run import Run
from dino_ssl.state import build_method

NETWORK = Timm(name="resnet18", args=(("channels", "(8, 8, 8, 8)"), ("layers", "(1, 1, 1, 1)")))
TINY = [  # kernel, stride, padding, height, width: every output depends on every input
    (3, 1, 1, 1, 1),
    (3, 1, 1, 2, 2),
    (3, 2, 1, 2, 2),
    (3, 1, 1, 1, 2),
    (5, 2, 2, 3, 1),
    (2, 2, 0, 2, 2),
    ((3, 5), (2, 1), (1, 2), 1, 3),
]


def images(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), TINY)
def test_tiny_maps_have_the_same_outputs_and_gradients(kernel, stride, padding, height, width, bias) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, kernel, stride, padding, bias=bias).double()
    reference = copy.deepcopy(layer)
    x, y = images(height, width).requires_grad_(), images(height, width).requires_grad_()
    assert small_conv._taps((height, width), layer.kernel_size, layer.stride, layer.padding) is not None
    actual, expected = small_conv.conv2d(layer, x), reference(y)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(x.grad, y.grad)
    for mine, right in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.Conv2d(4, 8, 1),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_other_convolutions_of_a_tiny_map_are_those_of_torch(
    layer: nn.Conv2d, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(small_conv.F, "linear")
    x = images(size, size).float()
    assert torch.equal(small_conv.conv2d(layer, x), layer(x))


@pytest.mark.parametrize(("kernel", "size"), [(3, 3), (7, 4)])
def test_a_larger_map_is_convolved(kernel: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If opposite corners do not see each other, or there are more than MAX_TAPS."""
    layer, x = nn.Conv2d(4, 8, kernel, padding=kernel // 2), images(size, size).float()
    monkeypatch.delattr(small_conv.F, "linear")
    assert torch.equal(small_conv.conv2d(layer, x), layer(x))


def test_autocast_convolves() -> None:
    layer, x = nn.Conv2d(4, 8, 3, padding=1), images(2, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small_conv.conv2d(layer, x), layer(x))


@pytest.mark.parametrize(("channels", "size"), [(8, 2), (4, 0)])
def test_wrong_inputs_are_refused_as_by_torch(channels: int, size: int) -> None:
    layer = nn.Conv2d(4, 8, 3)
    with pytest.raises(RuntimeError):
        small_conv.conv2d(layer, torch.zeros(2, channels, size, size))
    padded = nn.Conv2d(4, 8, 3, padding=1)
    with pytest.raises(RuntimeError):
        small_conv.conv2d(padded, torch.zeros(2, 8, 2, 2))


def test_an_empty_batch_has_an_empty_output() -> None:
    assert small_conv.conv2d(nn.Conv2d(4, 6, 3, padding=1), images(2, 2).float()[:0]).shape == (0, 6, 2, 2)


def test_training_after_an_evaluation_has_gradients() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1), images(2, 2).float()
    small_conv._taps.cache_clear()
    with torch.inference_mode():
        small_conv.conv2d(layer, x)
    small_conv.conv2d(layer, x).sum().backward()
    assert layer.weight.grad is not None


def test_a_network_uses_it_for_small_crops_and_so_does_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(small_conv.F, "linear", lambda *args: products.append(args[0].shape) or linear(*args))
    net = NETWORK.build()
    net.use_kernels(conv2d=small_conv.conv2d)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        assert net(torch.randn(2, 3, 24, 24)).abs().max() == 0
        assert copied(torch.randn(2, 3, 24, 24)).abs().max() > 0  # its layers use its own weights
    assert products
    count = len(products)
    net.use_kernels()
    net(torch.randn(2, 3, 24, 24))
    assert len(products) == count


def test_optimized_training_uses_it() -> None:
    run = edit(Run(), backbone=NETWORK, method=dict(out_dim=32, head_hidden=16, head_bottleneck=8))
    for optimized in (True, False):
        layer = build_method(run, optimized=optimized).backbone.get_submodule("net.conv1")
        assert ("forward" in vars(layer)) == optimized
