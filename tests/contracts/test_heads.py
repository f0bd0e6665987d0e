"""Heads equal Fig. 9 and the variants of App. C; a network is the head after the backbone, for all views."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dino_ssl.models import Backbone, DINOHead, Network
from dino_ssl.models.heads import WeightNormLinear


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_outputs_are_cosines_to_the_prototypes():
    head = DINOHead(12, 40, hidden=16, bottleneck=8)
    x = torch.randn(5, 12)
    bottleneck = head.mlp(x)
    cosines = F.cosine_similarity(bottleneck[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), cosines)


def test_the_predictor_is_byols_between_mlp_and_normalization():
    head = DINOHead(12, 40, hidden=16, bottleneck=8, predictor=True)
    linear, norm, relu, last = head.predictor.mlp
    x = torch.randn(5, 12)
    predictions = last(relu(norm(linear(head.mlp(x)))))
    assert predictions.shape == (5, 8)
    cosines = F.cosine_similarity(predictions[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), cosines)


def test_weight_norm_equals_torchs():
    ours = WeightNormLinear(6, 9, learn_scale=True)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9, bias=False), dim=0)
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2)
        reference.parametrizations.weight.original0.copy_(ours.weight_g)
        reference.parametrizations.weight.original1.copy_(ours.weight_v)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), reference(x))
    ours(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_g.grad, reference.parametrizations.weight.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, reference.parametrizations.weight.original1.grad)


def test_norm_last_keeps_unit_length():
    fixed, free = DINOHead(12, 40), DINOHead(12, 40, norm_last=False)
    assert not fixed.last_layer.weight_g.requires_grad
    assert free.last_layer.weight_g.requires_grad
    assert (fixed.last_layer.weight_g == 1).all()
    assert (free.last_layer.weight_g == 1).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("bottleneck", [8, None])
def test_layers_is_the_number_of_linear_layers(layers: int, bottleneck: int | None):
    """App. C counts `layers` in all without the bottleneck, and with it one more, weight-normalized."""
    head = DINOHead(12, 40, layers=layers, hidden=16, bottleneck=bottleneck)
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == layers
    x, widths = torch.randn(5, 12), [12, *[16] * (layers - 1), bottleneck or 40]
    assert [m.in_features for m in linear] + [linear[-1].out_features] == widths
    for i, module in enumerate(linear):  # the definition, layer by layer
        y = module(x if i == 0 else y)  # noqa: F821
        y = F.gelu(y) if i < layers - 1 else y
    torch.testing.assert_close(head(x), head.last_layer(F.normalize(y, dim=-1)) if bottleneck else y)


def test_activation_and_norm_are_between_layers_only():
    head = DINOHead(12, 40, hidden=16, bottleneck=8, norm="batch", act="relu")
    kinds = [type(module) for module in head.mlp]
    inner = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*inner, *inner, nn.Linear]


def test_initial_weights_are_small_and_biases_zero():
    head = DINOHead(64, 40, hidden=128, bottleneck=32)
    for module in head.mlp:
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert (module.bias == 0).all()
    assert head.last_layer.weight_v.std().item() == pytest.approx((1 / 3 / 32) ** 0.5, rel=0.1)


def test_l2_norm_is_computed_in_float32_under_autocast():
    """float16 would underflow at small bottleneck values and overflow at large ones."""
    head = DINOHead(12, 40, layers=1, bottleneck=8)
    x = torch.randn(5, 12)
    seen = []
    head.last_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(x)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0].norm(dim=-1), torch.ones(5))


class MeanColor(Backbone):
    """A backbone whose feature vector is the mean color; counts its calls."""

    embed_dim = 3
    calls = 0

    def forward(self, images):
        self.calls += 1
        return images.mean((2, 3))

    def features(self, images, layers=1):
        raise NotImplementedError


def test_network_keeps_the_order_of_views_and_images():
    network = Network(MeanColor(), nn.Identity())  # pyright: ignore[reportArgumentType]
    views = [torch.randn(2, 4, 3, 8, 8), torch.randn(5, 4, 3, 6, 6)]
    expected = torch.cat([stack.mean((3, 4)) for stack in views])
    torch.testing.assert_close(network(views), expected)
    assert network.backbone.calls == 2, "one pass per resolution"


def test_head_runs_once_on_all_views():
    """Batch norm in the head normalises over all crops, as in the authors' code."""
    network = Network(MeanColor(), nn.BatchNorm1d(3, affine=False))  # pyright: ignore[reportArgumentType]
    out = network([torch.randn(2, 4, 3, 8, 8) + 5, torch.randn(6, 4, 3, 4, 4)])
    torch.testing.assert_close(out.flatten(0, 1).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
