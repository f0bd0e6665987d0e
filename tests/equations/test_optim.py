"""Optimizers, parameter groups and clipping equal loops over single numbers."""

import math

import pytest
import torch
from torch import Tensor, nn

from dino_ssl.errors import UserError
from dino_ssl.models.heads import Network
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.optim import (
    LARS,
    Optim,
    clip_grad_norm_per_tensor_,
    group_name,
    lr_scales,
    parameter_groups,
    set_lr_and_weight_decay,
)
from dino_ssl.schedules import Clock


class Odd(nn.Module):
    """A module with each kind of parameter that the rule for groups distinguishes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.pos_embed = parameter(1, 3, 4)
        self.linear = nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(3, 2, 2)
        self.weight_g = nn.Parameter(torch.ones(5, 1), requires_grad=False)
        self.weight_v = parameter(5, 2)
        self.table = nn.ParameterDict({"bias": parameter(2, 2)})


def put_gradients(module: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def norm(tensor: Tensor) -> float:
    return math.sqrt(sum(value**2 for value in tensor.flatten().tolist()))


def test_groups_follow_the_published_rule() -> None:
    groups = {name: group_name(name, parameter) for name, parameter in Odd().named_parameters()}
    assert groups == {
        "pos_embed": "decayed",  # more than 1-d, though no weight of a layer
        "linear.weight": "decayed",
        "linear.bias": "not_decayed",
        "norm.weight": "not_decayed",
        "norm.bias": "not_decayed",
        "conv.weight": "decayed",
        "conv.bias": "not_decayed",
        "weight_g": "frozen",
        "weight_v": "decayed",
        "table.bias": "not_decayed",  # the name alone is enough
    }


def test_trainable_weight_g_is_decayed() -> None:
    module = Odd()
    module.weight_g.requires_grad_(True)
    assert group_name("weight_g", module.weight_g) == "decayed"


def test_groups_have_every_trainable_parameter_once() -> None:
    module = Odd()
    groups = parameter_groups(module)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_only_the_decayed_group_has_weight_decay() -> None:
    """With zero gradients, AdamW changes a parameter by its decay only: p (1 - lr * decay)."""
    module = Odd()
    optimizer = Optim(algorithm="adamw").build(module)
    before = copies(module)
    put_gradients(module, 0, scale=0.0)
    set_lr_and_weight_decay(optimizer, lr=0.1, weight_decay=0.4)
    optimizer.step()
    for name, parameter in module.named_parameters():
        kept = 1 - 0.1 * 0.4 if group_name(name, parameter) == "decayed" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, msg=name)


def test_no_step_is_taken_before_rates_are_set() -> None:
    for algorithm in ("adamw", "sgd", "lars"):
        module = Odd()
        before = copies(module)
        optimizer = Optim(algorithm=algorithm).build(module)
        put_gradients(module, 0)
        optimizer.step()
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters()), algorithm


def adamw_loop(p: float, grads: list[float], lrs: list[float], decays: list[float]) -> float:
    first = second = 0.0
    for t, (g, lr, decay) in enumerate(zip(grads, lrs, decays, strict=True), start=1):
        p *= 1 - lr * decay
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        p -= lr * (first / (1 - 0.9**t)) / (math.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return p


def sgd_loop(p: float, grads: list[float], lrs: list[float], decays: list[float]) -> float:
    mu = 0.0
    for g, lr, decay in zip(grads, lrs, decays, strict=True):
        mu = 0.9 * mu + g + decay * p
        p -= lr * mu
    return p


@pytest.mark.parametrize(("algorithm", "loop"), [("adamw", adamw_loop), ("sgd", sgd_loop)])
def test_adamw_and_sgd_equal_a_loop(algorithm, loop) -> None:
    module, lrs, decays = Odd(), [0.1, 0.05, 0.2], [0.04, 0.3, 0.1]
    optimizer = Optim(algorithm=algorithm).build(module)
    before, gradients = copies(module), []
    for step in range(3):
        put_gradients(module, step)
        gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
        set_lr_and_weight_decay(optimizer, lr=lrs[step], weight_decay=decays[step])
        optimizer.step()
    for name, parameter in module.named_parameters():
        group = group_name(name, parameter)
        if group == "frozen":
            assert torch.equal(parameter, before[name])
            continue
        used = decays if group == "decayed" else [0.0] * 3
        expected = [
            loop(value, [float(g[name].flatten()[i]) for g in gradients], lrs, used)
            for i, value in enumerate(before[name].flatten().tolist())
        ]
        torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected), atol=1e-5, rtol=1e-4, msg=name)


def test_lars_equals_a_loop() -> None:
    module, lrs, decays = Odd(), [0.3, 0.1, 0.2], [0.0, 0.05, 0.1]
    optimizer = Optim(algorithm="lars").build(module)
    expected = copies(module)
    mu = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        put_gradients(module, step)
        for name, parameter in module.named_parameters():
            if parameter.grad is None:
                continue
            change = parameter.grad.clone()
            if parameter.ndim != 1:  # 1-d tensors: neither decay nor adaptation
                decay = decays[step] if group_name(name, parameter) == "decayed" else 0.0
                change = change + decay * expected[name]
                change = change * (0.001 * norm(expected[name]) / norm(change))
            mu[name] = 0.9 * mu[name] + change
            expected[name] = expected[name] - lrs[step] * mu[name]
        set_lr_and_weight_decay(optimizer, lr=lrs[step], weight_decay=decays[step])
        optimizer.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


def test_lars_does_not_scale_the_update_of_a_zero_tensor() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    still = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([{"params": [weight, still]}], lr=0.5)
    weight.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))
    assert torch.equal(still.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("algorithm", ["adamw", "sgd", "lars"])
def test_parameter_without_gradient_is_not_updated(algorithm) -> None:
    """The frozen last layer: neither weight decay nor momentum may change it."""
    module = Odd()
    optimizer = Optim(algorithm=algorithm).build(module)
    for step in range(3):
        put_gradients(module, step)
        if step == 1:
            module.weight_v.grad = None
            before = module.weight_v.detach().clone()
        set_lr_and_weight_decay(optimizer, lr=0.1, weight_decay=0.1)
        optimizer.step()
        if step == 1:
            assert torch.equal(module.weight_v, before)
    assert not torch.equal(module.weight_v, before)


@pytest.mark.parametrize("algorithm", ["adamw", "sgd", "lars"])
def test_optimizer_resume_is_bit_equal(algorithm) -> None:
    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            put_gradients(module, step)
            set_lr_and_weight_decay(optimizer, lr=0.1, weight_decay=0.04)
            optimizer.step()

    settings, whole, half = Optim(algorithm=algorithm), Odd(), Odd()
    half.load_state_dict(whole.state_dict())
    steps(whole, settings.build(whole), range(4))
    first = settings.build(half)
    steps(half, first, range(2))
    second = settings.build(half)
    second.load_state_dict(first.state_dict())
    steps(half, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))


def test_clipping_is_per_tensor() -> None:
    module = Odd()
    put_gradients(module, 0)
    module.norm.weight.grad = 1e-3 * torch.ones(4)  # small: stays as it is
    module.conv.weight.grad = None
    module.linear.bias.grad = torch.zeros(2)
    before = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    clip_grad_norm_per_tensor_(module.parameters(), 0.5)
    clipped = 0
    for name, parameter in module.named_parameters():
        if name not in before:
            assert parameter.grad is None
            continue
        scale = 0.5 / (norm(before[name]) + 1e-6)
        clipped += scale < 1
        torch.testing.assert_close(parameter.grad, before[name] * min(1.0, scale), msg=name)
    assert clipped >= 4
    assert torch.equal(module.norm.weight.grad, before["norm.weight"])


def test_clip_grad_zero_disables_clipping() -> None:
    module = Odd()
    put_gradients(module, 0, scale=100.0)
    before = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    clip_grad_norm_per_tensor_(module.parameters(), 0.0)
    assert all(torch.equal(p.grad, before[n]) for n, p in module.named_parameters() if p.grad is not None)
    clip_grad_norm_per_tensor_([nn.Parameter(torch.ones(2))], 1.0)  # nobody has a gradient: nothing to do


def test_schedules_scale_with_the_batch_and_have_their_final_values() -> None:
    settings = Optim(epochs=10, batch_size=1024, lr=5e-4, min_lr=1e-6, warmup_epochs=2)
    lr, decay = settings.lr_schedule(), settings.weight_decay_schedule()
    values = [lr(Clock(step, 5, 10)) for step in range(51)]
    assert values[0] == 0
    assert max(values) == values[9] == pytest.approx(5e-4 * 4)
    assert values[50] == pytest.approx(1e-6)
    assert decay(Clock(0, 5, 10)) == pytest.approx(0.04)
    assert decay(Clock(50, 5, 10)) == pytest.approx(0.4)
    later = Optim(epochs=10, batch_size=512, lr=1e-3, warmup_epochs=2, warmup_lr=1e-6).lr_schedule()
    assert later(Clock(0, 5, 10)) == 1e-6
    assert later(Clock(9, 5, 10)) == pytest.approx(2e-3)
    constant = Optim(weight_decay=0.1, weight_decay_end=0.1).weight_decay_schedule()
    assert {constant(Clock(step, 5, 10)) for step in range(50)} == {0.1}


@pytest.mark.parametrize(
    "wrong",
    [
        dict(epochs=0),
        dict(batch_size=0),
        dict(lr=-1e-3),
        dict(clip_grad=float("nan")),
        dict(warmup_epochs=-1),
        dict(warmup_lr=-1.0),
        dict(layer_decay=0.0),
        dict(layer_decay=1.5),
    ],
)
def test_error_names_a_setting_out_of_range(wrong) -> None:
    with pytest.raises(UserError, match=f"optim.{next(iter(wrong))}"):
        Optim(**wrong)


# -- a rate for each layer ----------------------------------------------------------------------------------


def classifier(vit: ViT) -> Network:
    backbone = vit.build()
    return Network(backbone, nn.Linear(backbone.embed_dim, 3))


def test_layer_decay_gives_later_layers_larger_rates() -> None:
    """Stem 0.5^4, blocks 0.5^3, 0.5^2 and, with the last norm, 0.5^1; the head at the full rate."""
    network = classifier(ViT(width=8, depth=3, heads=2, patch=8, image_size=16, registers=1))
    scales = lr_scales(network, 0.5)
    for name, _ in network.named_parameters():
        part = name.split(".")
        if part[0] == "head":
            assert name not in scales
        elif part[1] == "blocks":
            assert scales[name] == [0.125, 0.25, 0.5][int(part[2])], name
        else:
            assert part[1] in ("cls_token", "pos_embed", "register_tokens", "patch_embed", "norm")
            assert scales[name] == (0.5 if part[1] == "norm" else 0.0625), name


def test_each_parameter_has_the_rate_of_its_layer() -> None:
    """One step of SGD with gradients of one: p - lr scale (1 + decay p)."""
    network = classifier(ViT(width=8, depth=2, heads=2, patch=8, image_size=16))
    optimizer = Optim(algorithm="sgd", layer_decay=0.5).build(network)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())
    before, scales = copies(network), lr_scales(network, 0.5)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr_and_weight_decay(optimizer, lr=0.1, weight_decay=0.2)
    optimizer.step()
    for name, parameter in network.named_parameters():
        decay = 0.2 if group_name(name, parameter) == "decayed" else 0.0
        moved = before[name] - 0.1 * scales.get(name, 1.0) * (1 + decay * before[name])
        torch.testing.assert_close(parameter.detach(), moved, msg=name)


@pytest.mark.parametrize("algorithm", ["adamw", "lars"])
def test_layer_decay_works_with_adamw_and_lars(algorithm) -> None:
    network = classifier(ViT(width=8, depth=1, heads=2, patch=8, image_size=16))
    optimizer = Optim(algorithm=algorithm, layer_decay=0.5).build(network)
    before = copies(network)
    put_gradients(network, 0)
    set_lr_and_weight_decay(optimizer, lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert not [name for name, p in network.named_parameters() if torch.equal(p, before[name])]


def test_without_layer_decay_there_are_two_groups() -> None:
    groups = parameter_groups(Odd())
    assert [(group["decayed"], group["lr_scale"]) for group in groups] == [(True, 1.0), (False, 1.0)]


def test_layer_ids_equal_timms() -> None:
    """Its ViT and ours have equal layer numbers; a ResNet has them too."""
    ours = ViT(size="tiny", depth=2, patch=16, image_size=32).build().layer_ids()
    reference = Timm(name="vit_tiny_patch16_224", args=(("depth", "2"), ("img_size", "32"))).build()
    assert {f"net.{name}": depth for name, depth in ours.items()} == reference.layer_ids()
    resnet = Timm(name="resnet18").build()
    assert resnet.layer_ids().keys() == dict(resnet.named_parameters()).keys()
    assert resnet.layer_ids()["net.layer4.1.conv2.weight"] == max(resnet.layer_ids().values()) == 8


def test_layer_decay_without_a_backbone_raises() -> None:
    with pytest.raises(UserError, match="layer_decay"):
        lr_scales(Odd(), 0.5)
