"""The packed ViT and the attention kernel equal the reference: values, gradients and drop-path."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_ssl import objectives
from dino_ssl.kernels import attention, loss, packed_vit
from dino_ssl.models import blocks
from dino_ssl.models.blocks import Block
from dino_ssl.models.heads import Network
from dino_ssl.models.vit import ViT


def network(**changes) -> Network:
    torch.manual_seed(0)
    settings = dict(width=24, depth=3, heads=3, patch=8, image_size=32, drop_path=0.0) | changes
    net = Network(ViT(**settings).build(), nn.Identity())
    nn.init.normal_(net.backbone.get_parameter("pos_embed"))  # images of another size must find other positions
    return net


def views() -> list[Tensor]:
    seeded = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 3, h, w, generator=seeded) for n, h, w in ((2, 32, 32), (3, 16, 24))]


@pytest.mark.parametrize("settings", [{}, {"registers": 2}, {"stem": "conv"}], ids=str)
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_packed_views_have_the_same_features_and_gradients(settings: dict[str, Any], grad_checkpointing: bool) -> None:
    net = network(**settings)
    expected = net.backbone.forward_views(views())
    expected.square().sum().backward()
    right = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    net.backbone.set_grad_checkpointing(grad_checkpointing)
    actual = packed_vit.forward_views(net.backbone, views())
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    assert actual.shape == (2 * 3 + 3 * 3, 24)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name], atol=1e-4, rtol=1e-4, msg=name)


def test_one_resolution_uses_the_reference_implementation() -> None:
    net = network()
    assert torch.equal(packed_vit.forward_views(net.backbone, views()[:1]), net.backbone.forward_views(views()[:1]))


def test_drop_path_skips_dropped_branches_and_rescales_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the definition per image, with known random draws."""
    torch.manual_seed(0)
    block = Block(12, 2, 2.0, 0.25).train()
    stacks = [torch.randn(3, 5, 12), torch.randn(2, 4, 12)]
    shapes = [(3, 5), (2, 4)]
    draws = iter([[0.9, 0.1, 0.3], [0.2, 0.8], [0.1, 0.1, 0.9], [0.3, 0.0]])  # the first branch's, then the second's
    monkeypatch.setattr(torch, "rand", lambda count: torch.tensor(next(draws)))
    x = torch.cat([stack.flatten(0, 1) for stack in stacks]).requires_grad_()
    actual = packed_vit.split_by_resolution(packed_vit.block_forward(block, x, shapes), shapes)
    keeps = [([0.9, 0.1, 0.3], [0.1, 0.1, 0.9]), ([0.2, 0.8], [0.3, 0.0])]
    for stack, out, (first, second) in zip(stacks, actual, keeps, strict=True):
        for image, got, one, two in zip(stack, out, first, second, strict=True):
            expected = image[None]
            if one >= 0.25:
                expected = expected + block.attn(block.norm1(expected)) / 0.75
            if two >= 0.25:
                expected = expected + block.mlp(block.norm2(expected)) / 0.75
            torch.testing.assert_close(got[None], expected)


def test_all_branches_may_be_dropped() -> None:
    block = Block(12, 2, 2.0, 0.999999).train()
    x = torch.randn(3 * 5, 12)
    assert torch.equal(packed_vit.block_forward(block, x, [(3, 5)]), x)
    assert not torch.equal(packed_vit.block_forward(block.eval(), x, [(3, 5)]), x)


@pytest.mark.parametrize("tokens", [37, attention.MAX_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_kernels_are_equal(tokens: int, dtype: torch.dtype) -> None:
    seeded = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 16, generator=seeded) for _ in range(3))
    expected = blocks.scaled_dot_product(q, k, v)
    actual = attention.scaled_dot_product(q.to(dtype), k.to(dtype), v.to(dtype)).float()
    torch.testing.assert_close(actual, expected, **({} if dtype == torch.float32 else dict(atol=0.02, rtol=0.02)))


def test_kernels_are_passed_when_a_method_is_built() -> None:
    """Only a student packs its views; the reference implementations are used if asked for."""
    from dino_ssl.run import Run
    from dino_ssl.state import build_method

    run = Run(backbone=ViT(width=24, depth=1, heads=3, patch=8, image_size=16))
    optimized, reference = build_method(run), build_method(run, optimized=False)
    assert optimized.implementations.loss_from_bottleneck is loss.loss_from_bottleneck
    assert reference.implementations.loss_from_bottleneck is objectives.loss_from_bottleneck
    attends = {part.attend for part in optimized.modules() if isinstance(part, blocks.Attention)}
    assert attends == {attention.scaled_dot_product}
    attends = {part.attend for part in reference.modules() if isinstance(part, blocks.Attention)}
    assert attends == {blocks.scaled_dot_product}
    forward = [network.backbone._forward_views for network in (optimized.student, optimized.teacher)]
    assert forward == [packed_vit.forward_views, None]
