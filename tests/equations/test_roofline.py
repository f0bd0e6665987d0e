"""FLOPs and bytes of a step: torch's counter against formulas, published figures, and parameters counted by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods import BYOLConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.methods.method import BuildContext
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.presets import resolve
from dino_ssl.profiling.roofline import Part, bytes_per_step, count_flops
from dino_ssl.run import Run
from dino_ssl.schedules import Clock

TINY_VIT = ViT(width=48, depth=3, heads=3, patch=8, image_size=32, registers=2, mlp_ratio=3.0)
TINY = Run(
    backbone=TINY_VIT,
    method=DINOConfig(out_dim=80, head_hidden=40, head_bottleneck=24),
    views=MultiCrop(global_size=32, local_size=20, local=3),  # 20 is not a multiple of the patch
    optim=Optim(batch_size=4),
)
VARIANTS = {
    "default": {},
    "no bottleneck": {"method": {"head_bottleneck": 0}},
    "batch norm": {"method": {"head_norm": "batch"}},
    "predictor": {"method": {"predictor": True}},
    "ConvNet": {"backbone": Timm(name="resnet18", args=(("channels", "(8, 8, 16, 16)"),))},
    "timm ViT": {"backbone": Timm(name="test_vit")},
}


def total(parts: list[Part]) -> float:
    return sum(part.total for part in parts)


def by_name(run: Run, **options: bool) -> dict[str, Part]:
    return {part.name: part for part in count_flops(run, **options)}


def vit_forward(vit: ViT, side: int, shares: list[float] | None = None) -> dict[str, float]:
    """FLOPs of our ViT's forward pass on one view by formula; the last block computes only the [CLS] token.

    shares: of images for which the branches of each block are computed.
    """
    width, depth, _ = vit.shape
    patches = (side // vit.patch) ** 2
    tokens = 1 + vit.registers + patches
    flops: dict[str, float] = dict.fromkeys(
        ("patch embedding", "query, key, value, projection", "attention", "block MLP"), 0.0
    )
    flops["patch embedding"] = 2 * patches * 3 * vit.patch**2 * width
    for block, share in enumerate(shares or [1.0] * depth):
        queries = 1 if block == depth - 1 else tokens
        flops["query, key, value, projection"] += share * 2 * width * 2 * width * (tokens + queries)
        flops["attention"] += share * 2 * 2 * width * tokens * queries
        flops["block MLP"] += share * 2 * 2 * width * int(width * vit.mlp_ratio) * queries
    return flops


@pytest.mark.parametrize("change", VARIANTS.values(), ids=list(VARIANTS))
def test_parts_sum_to_the_flops_of_a_step(change: dict) -> None:
    run = edit(TINY, **change)
    parts = count_flops(run, skip_dropped=False)
    with torch.device("meta"):
        method = run.method.build(BuildContext(run.backbone, classes=10)).train()
        batch = Batch(tuple(torch.empty(n, 2, 3, side, side) for n, side in run.views.view_shapes))
        with FlopCounterMode(display=False) as counter:
            loss = method(batch, Clock(0, 1, 1)).loss
            forward = counter.get_total_flops()
            loss.backward()
    assert 2 * sum(part.teacher + part.student for part in parts) == pytest.approx(forward, rel=1e-12)
    assert 2 * total(parts) == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize("side", [32, 24, 20])
def test_flops_of_a_vit_follow_its_formula(side: int) -> None:
    """Forward and backward; images need no gradient."""
    parts = by_name(edit(TINY, views=dict(global_size=side, local=0)), skip_dropped=False)
    for name, flops in vit_forward(TINY_VIT, side).items():
        passes = 1 if name == "patch embedding" else 2
        assert parts[name][1:] == pytest.approx((2 * flops, 2 * flops, passes * 2 * flops))


def test_flops_of_the_head_follow_its_formula() -> None:
    parts = by_name(TINY)
    mlp, last = 2 * (48 * 40 + 40 * 40 + 40 * 24), 2 * 24 * 80
    assert parts["head MLP"][1:] == pytest.approx((2 * mlp, 5 * mlp, 10 * mlp))
    assert parts["last layer"][1:] == pytest.approx((2 * last, 5 * last, 10 * last))


def test_stochastic_depth_skips_branches_of_the_student() -> None:
    run = edit(TINY, backbone=dict(drop_path=0.5))
    parts, shares = by_name(run), [1.0, 0.75, 0.5]
    for name, flops in vit_forward(TINY_VIT, 32).items():
        assert parts[name].teacher == pytest.approx(2 * flops)
        student = sum(n * vit_forward(TINY_VIT, side, shares)[name] for n, side in run.views.view_shapes)
        assert parts[name].student == pytest.approx(student)
    assert total(count_flops(run)) < total(count_flops(run, skip_dropped=False))


def run_on_global_views(backbone: ViT | Timm) -> Run:
    return edit(Run(), backbone=backbone, views=dict(local=0))


@pytest.mark.parametrize(("size", "billions"), [("small", 4.6), ("base", 17.5)])
def test_vit_has_its_published_flops(size: Literal["small", "base"], billions: float) -> None:
    """Multiply-adds of ViT-S/16 and ViT-B/16 at 224 x 224: the table of DeiT III's README (Touvron et al., 2022)."""
    vit = ViT(size=size, patch=16, drop_path=0.0)
    parts = by_name(run_on_global_views(vit))
    skipped = 196 * 2 * vit.shape.width**2 * (2 + 8) + 196 * 4 * 197 * vit.shape.width  # last block, without [CLS]
    counted = sum(parts[name].teacher for name in vit_forward(vit, 224)) / 2 + skipped
    assert counted / 2 == pytest.approx(1e9 * billions, rel=0.005)


def test_resnet_has_its_published_flops() -> None:
    """ResNet-50: 4.1 billion multiply-adds (timm's model card)."""
    convolutions = by_name(run_on_global_views(Timm(name="resnet50")))["convolutions"]
    assert round(convolutions.teacher / 2 / 2e9, 1) == 4.1
    stem = 2 * 112 * 112 * 64 * 3 * 49  # images need no gradient
    assert convolutions.backward == pytest.approx(2 * convolutions.student - 2 * stem)


def test_other_methods_are_counted_by_part() -> None:
    run = edit(TINY, method=BYOLConfig(head_dim=16, head_hidden=32))
    parts, dino = by_name(run), by_name(TINY)
    assert parts["predictor"].student == pytest.approx(5 * 2 * (16 * 32 + 32 * 16))
    assert parts["predictor"].teacher == 0
    assert parts["block MLP"] == pytest.approx(dino["block MLP"])


# -- bytes -------------------------------------------------------------------------------------------------

LINEAR = edit(
    TINY,
    backbone=ViT(width=4, depth=1, heads=1, patch=2, image_size=2, mlp_ratio=1.0),
    method=dict(out_dim=5, head_layers=1, head_bottleneck=3),
    views=MultiCrop(global_size=2, local_size=2, local=1),
)


def test_bytes_by_hand() -> None:
    """Patches 4 x 12 + 4, [CLS] 4, positions 2 x 4; a block: norms 2 x 8, q k v 12 x 4 + 12, projection 4 x 4 + 4, MLP
    2 x (4 x 4 + 4); the last norm 8; the head 3 x 4 + 3, prototypes 5 x 3, whose 5 lengths only the teacher counts."""
    student = 52 + 4 + 8 + 16 + 60 + 20 + 40 + 8 + 15 + 15
    teacher, center = student + 5, 5
    expected = {
        "views": 7 * 3 * 12,
        "weights": 4 * (student + student + teacher),
        "gradients": 4 * (student + student),
        "optimizer": 4 * 6 * student,
        "teacher and center": 8 * (teacher + center),
    }
    assert bytes_per_step(LINEAR, 7) == expected
    half = expected | {"weights": 2 * (student + student + teacher)}
    assert bytes_per_step(replace(LINEAR, precision="bfloat16"), 7) == half
    assert bytes_per_step(replace(LINEAR, precision="float16"), 7) == half
    for algorithm in ("sgd", "lars"):  # one moment
        assert bytes_per_step(edit(LINEAR, optim=dict(algorithm=algorithm)), 7)["optimizer"] == 4 * 4 * student


def test_swav_has_no_teacher() -> None:
    counted = bytes_per_step(edit(resolve("swav"), backbone=LINEAR.backbone), 7)
    assert counted["gradients"] > 0
    assert counted["teacher and center"] == 0


# -- the page ----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()


def row(name: str) -> list[str]:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")][-1:]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_docs_match_the_counts() -> None:
    run = resolve("vits16")
    parts = count_flops(run)
    for part in parts:
        flops = (*part[1:], part.total)
        assert row(part.name) == [*(f"{each / 1e9:.3f}" for each in flops), f"{part.total / total(parts):.1%}"]
    sums = [sum(getattr(part, name) for part in parts) for name in ("teacher", "student", "backward")]
    assert f"| total | {' | '.join(f'{flops / 1e9:.3f}' for flops in (*sums, total(parts)))} | 100.0% |" in PAGE
    written = total(count_flops(run, skip_dropped=False))
    assert f"{written / 1e9:.3f} GFLOPs without skipping" in PAGE
    width, last_block = 384, 0
    for views, patches in (
        (2 + 3 * 2, 196),
        (3 * 8, 36),
    ):  # forward of the teacher, forward and backward of the student
        last_block += views * patches * (2 * width**2 * (2 + 8) + 4 * (patches + 1) * width)
    assert f"{(written + last_block) / 1e9:.3f} GFLOPs with every token of the last block" in PAGE
    counted = bytes_per_step(run, 64)
    for name, count in counted.items():
        assert row(name)[0] == f"{count / 1e6:.1f}"
    per_image = sum(counted.values()) / 64
    assert row("all")[0] == f"{64 * per_image / 1e6:.1f}"
    assert f"({per_image / 1e6:.1f} MB per image)" in PAGE
    assert f"{total(parts) / per_image:,.0f} FLOPs per byte" in PAGE
