"""What a step must cost: the formulas against torch's counter on real networks, known figures, and bytes by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods import BYOLConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.presets import resolve
from dino_ssl.profiling.roofline import (
    Part,
    Roofline,
    bytes_per_step,
    counted_method,
    flops,
    head_operations,
    network_operations,
    parameter_counts,
    roofline,
    timm_operations,
    vit_operations,
)
from dino_ssl.run import Run

TINY = Run(
    backbone=ViT(width=48, depth=3, heads=3, patch=8, image_size=32, registers=2, mlp_ratio=3.0),
    method=DINOConfig(out_dim=80, head_hidden=40, head_bottleneck=24),
    views=MultiCrop(global_size=32, local_size=20, local=3),  # 20 is not a multiple of the patch
    optim=Optim(batch_size=4),
)
VARIANTS = {
    "as it is": {},
    "one layer in the head": {"method": {"head_layers": 1}},
    "no bottleneck": {"method": {"head_bottleneck": 0}},
    "batch norm": {"method": {"head_norm": "batch"}},
    "predictor": {"method": {"predictor": True}},
    "global views alone": {"views": {"local": 0}},
    "one block": {"backbone": {"depth": 1}},
    "a ConvNet": {"backbone": Timm(name="resnet18", args=(("channels", "(8, 8, 16, 16)"),))},
    "timm's ViT": {"backbone": Timm(name="test_vit")},
}


def total(parts: list[Part]) -> float:
    return sum(part.total for part in parts)


@pytest.mark.parametrize("change", VARIANTS.values(), ids=list(VARIANTS))
def test_the_parts_sum_to_what_torch_counts_of_the_whole_step(change: dict) -> None:
    """Forward and backward of the real method, loss included: not one operation apart."""
    run = edit(TINY, **change)
    parts, (convolutions, products) = flops(run, as_written=True), counted_method(run)
    forward = sum(part.teacher + part.student for part in parts)
    assert forward == convolutions.student + products.student
    assert total(parts) == total([convolutions, products])


@pytest.mark.parametrize("side", [32, 24, 20])
def test_a_network_with_numbers_is_counted_alike(side: int) -> None:
    """The processor's own attention kernel included, whose backward pass computes the weights again: 5 products, where
    4 must be."""
    network, method = TINY.backbone, TINY.method
    assert isinstance(network, ViT)
    assert isinstance(method, DINOConfig)
    ops = vit_operations(network, side)
    body, head = network.build(drop_path=0.0), method.head(48)
    with FlopCounterMode(display=False) as counter:
        out = head(body(torch.randn(2, 3, side, side)))
        forward = counter.get_total_flops()
        out.sum().backward()
    backward = counter.get_total_flops() - forward
    of_head = sum(head_operations(method, 48).values())
    assert forward == 2 * (sum(part.forward for part in ops.values()) + of_head)
    again = ops["attention"].forward / 2
    assert backward == 2 * (sum(part.backward for part in ops.values()) + 2 * of_head + again)


def test_the_last_block_and_stochastic_depth_are_counted_where_they_are_needed() -> None:
    """By hand: 16 of 17 tokens of the last block are asked for nothing but keys and values."""
    network = ViT(width=48, depth=3, heads=3, patch=8, image_size=32, drop_path=0.0)
    least, written = vit_operations(network, 32), vit_operations(network, 32, whole=True)
    tokens, width, hidden = 17, 48, 192
    spared = tokens - 1  # tokens that nobody asks for
    assert written["blocks' MLP"].forward - least["blocks' MLP"].forward == spared * 2 * 2 * width * hidden
    assert written["attention"].forward - least["attention"].forward == spared * 2 * 2 * tokens * width
    name = "queries, keys, values, projection"
    assert written[name].forward - least[name].forward == spared * 2 * 2 * width * width
    assert written["patch embedding"] == least["patch embedding"]
    half = vit_operations(network, 32, drop_path=1.0, whole=True)  # rates 0, 1/2 and 1
    for part in ("attention", "blocks' MLP", name):
        assert half[part].forward == pytest.approx(written[part].forward * (1 + 0.5 + 0) / 3)


def test_the_student_alone_leaves_branches_out() -> None:
    parts = {part.name: part for part in flops(TINY)}
    still = {part.name: part for part in flops(edit(TINY, backbone=dict(drop_path=0.0)))}
    assert parts["blocks' MLP"].teacher == still["blocks' MLP"].teacher
    assert parts["blocks' MLP"].student < still["blocks' MLP"].student
    assert total(flops(TINY)) < total(flops(TINY, as_written=True))


@pytest.mark.parametrize(("size", "billions"), [("small", 4.6), ("base", 17.5)])
def test_known_figures(size: Literal["small", "base"], billions: float) -> None:
    """Multiply-adds of ViT-S/16 and ViT-B/16 at 224 x 224: the table of DeiT III's README (Touvron et al., 2022)."""
    ops = vit_operations(ViT(size=size, patch=16), 224, whole=True)
    assert sum(part.forward for part in ops.values()) / 2 == pytest.approx(1e9 * billions, rel=0.005)


def test_a_resnet_has_its_known_figure() -> None:
    """ResNet-50: 4.1 billion multiply-adds (timm's card), 2 million of them in the classifier, which ours has not."""
    ops = timm_operations(Timm(name="resnet50"), 224)
    assert round(sum(part.forward for part in ops.values()) / 2e9, 1) == 4.1
    stem = 2 * 112 * 112 * 64 * 3 * 49  # the pictures need no gradient
    assert ops["convolutions"].backward == 2 * ops["convolutions"].forward - stem


def test_other_methods_are_counted_too() -> None:
    run = edit(TINY, method=BYOLConfig(head_dim=16, head_hidden=32))
    convolutions, products = counted_method(run)
    embedding = network_operations(run, "teacher")["patch embedding"].forward
    embedding += sum(network_operations(run, "student")["patch embedding"])
    assert convolutions.total == embedding
    assert products.backward > products.student
    assert flops(run) == [convolutions, products]


# -- bytes -------------------------------------------------------------------------------------------------

LINEAR = edit(
    TINY,
    backbone=ViT(width=4, depth=1, heads=1, patch=2, image_size=2, mlp_ratio=1.0),
    method=dict(out_dim=5, head_layers=1, head_bottleneck=3),
    views=MultiCrop(global_size=2, local_size=2, local=1),
)


def test_parameters_by_hand() -> None:
    """Patches 4 x 12 + 4, [CLS] 4, positions 2 x 4; a block: norms 2 x 8, q k v 12 x 4 + 12, projection 4 x 4 + 4, MLP
    2 x (4 x 4 + 4); the last norm 8; the head 3 x 4 + 3, prototypes 5 x 3 and their fixed lengths 5."""
    body = 52 + 4 + 8 + 16 + 60 + 20 + 40 + 8
    assert parameter_counts(LINEAR) == (body + 15 + 15, body + 15 + 15 + 5, 5)


def test_bytes_by_hand() -> None:
    trained, followed, center = parameter_counts(LINEAR)
    assert bytes_per_step(LINEAR, 7) == {
        "views": 7 * 3 * 12,
        "weights, read by the passes": 4 * (trained + trained + followed),
        "gradients": 4 * (trained + trained),
        "optimizer": 4 * 6 * trained,
        "teacher and center": 8 * (followed + center),
    }
    half = bytes_per_step(replace(LINEAR, precision="bfloat16"), 7)
    assert half["weights, read by the passes"] == 2 * (trained + trained + followed)
    assert half["gradients"] == 8 * trained
    assert bytes_per_step(replace(LINEAR, precision="float16"), 7) == half
    for algorithm in ("sgd", "lars"):  # one moment
        assert bytes_per_step(edit(LINEAR, optim=dict(algorithm=algorithm)), 7)["optimizer"] == 4 * 4 * trained


def test_one_network_has_no_teacher_to_move() -> None:
    run = edit(resolve("swav"), backbone=LINEAR.backbone)
    trained, *rest = parameter_counts(run)
    assert trained > 0
    assert rest == [0, 0]


def test_the_slower_of_the_two_is_the_floor() -> None:
    one = Roofline(flops=100.0, bytes=10.0)
    assert (one.by_products(1000.0), one.by_memory(50.0)) == (10.0, 5.0)
    assert one.images_per_s(1000.0, 50.0) == 5.0
    assert one.images_per_s(1000.0, 500.0) == 10.0


def test_a_larger_batch_shares_the_weights() -> None:
    alone, many = roofline(TINY, 1), roofline(TINY, 100)
    views = 3 * (2 * 32**2 + 3 * 20**2)
    assert alone.flops == many.flops == total(flops(TINY))
    assert (alone.bytes - views) / 100 == pytest.approx(many.bytes - views)


# -- the page ----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()


def row(name: str) -> list[str]:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")][-1:]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_page_says_what_is_counted() -> None:
    run = resolve("vits16")
    parts = flops(run)
    everything = total(parts)
    for part in parts:
        ops = (part.teacher, part.student, part.backward, part.total)
        assert row(part.name) == [*(f"{each / 1e9:.3f}" for each in ops), f"{part.total / everything:.1%}"]
    sums = [sum(getattr(part, name) for part in parts) for name in ("teacher", "student", "backward")]
    assert f"| all | {' | '.join(f'{ops / 1e9:.3f}' for ops in (*sums, everything))} | 100.0% |" in PAGE
    assert f"Plain code does {total(flops(run, as_written=True)) / 1e9:.3f}" in PAGE
    counted = bytes_per_step(run, 64)
    for name, count in counted.items():
        assert row(name)[0] == f"{count / 1e6:.1f}"
    each = sum(counted.values()) / 64
    assert row("all")[0] == f"{64 * each / 1e6:.1f}"
    assert f"({each / 1e6:.1f} a picture)" in PAGE
    assert f"{everything / each:,.0f} operations for each byte" in PAGE
