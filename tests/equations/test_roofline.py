"""FLOPs and bytes of a step: torch's counter against formulas, published figures, and parameters counted by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods import BYOLConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.presets import resolve
from dino_ssl.profiling.roofline import bytes_per_step, count_flops
from dino_ssl.run import Run

TINY_VIT = ViT(width=48, depth=3, heads=3, patch=8, image_size=32, registers=2, mlp_ratio=3.0, drop_path=0.5)
TINY = Run(
    backbone=TINY_VIT,
    method=DINOConfig(out_dim=80, head_hidden=40, head_bottleneck=24),
    views=MultiCrop(global_size=32, local_size=20, local=3),  # 20 is not a multiple of the patch
    optim=Optim(batch_size=4),
)
HEAD = 2 * (48 * 40 + 40 * 40 + 40 * 24 + 24 * 80)
"""FLOPs of the head's four layers."""


def vit_flops(vit: ViT, side: int, *, drop: bool = False) -> tuple[float, float]:
    """FLOPs of our ViT's patch embedding and blocks on one view; the last block computes only the [CLS] token.

    drop: leave out the mean share of branches that stochastic depth drops, which grows linearly to `drop_path`.
    """
    width, depth, _ = vit.shape
    patches = (side // vit.patch) ** 2
    tokens = 1 + vit.registers + patches
    blocks = 0.0
    for block in range(depth):
        queries = 1 if block == depth - 1 else tokens
        projections = 4 * width**2 * (tokens + queries)
        attention = 4 * width * tokens * queries
        mlp = 4 * width * int(width * vit.mlp_ratio) * queries
        share = 1 - vit.drop_path * block / (depth - 1) if drop else 1.0
        blocks += share * (projections + attention + mlp)
    return 2 * patches * 3 * vit.patch**2 * width, blocks


def test_flops_of_dino_follow_the_formula() -> None:
    """Teacher on two global views, student on all; images need no gradient; stochastic depth skips branches."""
    counted = count_flops(TINY)
    assert counted["teacher forward"] == pytest.approx(2 * (sum(vit_flops(TINY_VIT, 32)) + HEAD))
    student = [(n, *vit_flops(TINY_VIT, side, drop=True)) for n, side in TINY.views.view_shapes]
    assert counted["student forward"] == pytest.approx(sum(n * (embed + blocks + HEAD) for n, embed, blocks in student))
    assert counted["backward"] == pytest.approx(
        sum(n * (embed + 2 * blocks + 2 * HEAD) for n, embed, blocks in student)
    )


def test_vit_has_its_published_flops() -> None:
    """4.6 billion multiply-adds of ViT-S/16 at 224 x 224: the table of DeiT III's README (Touvron et al., 2022)."""
    head = 2 * (384 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536)
    run = edit(Run(), backbone=ViT(size="small", patch=16), views=dict(local=0))
    counted = count_flops(run)["teacher forward"] / 2 - head
    skipped = 196 * 2 * 384**2 * (2 + 8) + 196 * 4 * 197 * 384  # last block, without [CLS]
    assert (counted + skipped) / 2 == pytest.approx(4.6e9, rel=0.005)


def test_resnet_has_its_published_flops() -> None:
    """ResNet-50: 4.1 billion multiply-adds (timm's model card)."""
    run = edit(Run(), backbone=Timm(name="resnet50"), method=dict(out_dim=2, head_hidden=2), views=dict(local=0))
    counted = count_flops(run)
    assert round(counted["teacher forward"] / 2 / 2e9, 1) == 4.1
    stem = 2 * 112 * 112 * 64 * 3 * 49  # images need no gradient
    assert counted["backward"] == pytest.approx(2 * counted["student forward"] - 2 * stem)


def test_other_methods_are_counted() -> None:
    """BYOL's student has a predictor; SwAV has no teacher."""
    byol = BYOLConfig(head_dim=16, head_hidden=32)
    with_predictor, without = (count_flops(edit(TINY, method=edit(byol, predictor=on))) for on in (True, False))
    assert with_predictor["teacher forward"] == without["teacher forward"]
    predictor = 5 * 2 * (16 * 32 + 32 * 16)
    assert with_predictor["student forward"] - without["student forward"] == pytest.approx(predictor)
    assert count_flops(edit(resolve("swav"), backbone=TINY_VIT))["teacher forward"] == 0


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


def test_docs_match_the_counts() -> None:
    run = resolve("vits16")
    flops, moved = count_flops(run), bytes_per_step(run, 64)
    total, per_image = sum(flops.values()), sum(moved.values()) / 64
    for name, count in flops.items():
        assert f"| {name} | {count / 1e9:.3f} | {count / total:.1%} |" in PAGE
    assert f"| total | {total / 1e9:.3f} | 100.0% |" in PAGE
    vit, undropped = ViT(size="small", patch=16), total
    for n, side in run.views.view_shapes:
        undropped += 3 * n * (vit_flops(vit, side)[1] - vit_flops(vit, side, drop=True)[1])
    assert f"{undropped / 1e9:.3f} GFLOPs without skipping" in PAGE
    width, last_block = 384, 0
    for views, patches in ((2 + 3 * 2, 196), (3 * 8, 36)):  # forward of the teacher; forward, backward of the student
        last_block += views * patches * (2 * width**2 * (2 + 8) + 4 * (patches + 1) * width)
    assert f"{(undropped + last_block) / 1e9:.3f} GFLOPs with every token of the last block" in PAGE
    for name, count in moved.items():
        assert f"| {name} | {count / 1e6:.1f} |" in PAGE
    assert f"| all | {64 * per_image / 1e6:.1f} |" in PAGE
    assert f"({per_image / 1e6:.1f} MB per image)" in PAGE
    assert f"{total / per_image:,.0f} FLOPs per byte" in PAGE
