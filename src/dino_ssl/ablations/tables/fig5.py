"""Fig. 5: patch size."""

from collections.abc import Mapping
from typing import Any

from dino_ssl.ablations.bases import narrow, vit_300
from dino_ssl.ablations.table import KNN, LINEAR, SPEED, Row, Table

SMALL_PATCH = {16: 12, 8: 6, 5: 4}
"""Patches of 48 pixels that stand for those of 224: 16, 64 and 144 of them for 196, 784 and 1936."""


def _row(size: str, patch: int, paper: Mapping[str, float], note: str = "") -> Row:
    wide: dict[str, Any] = {} if size == "small" else {"size": size}
    small_wide = {} if size == "small" else {"width": 256, "heads": 8}
    stands = SMALL_PATCH[patch]
    return Row(
        f"{size[0]}{patch}",
        f"ViT-{size[0].upper()}/{patch}",
        {"backbone": {**wide, "patch": patch, **({"image_size": 225} if patch == 5 else {})}, **_views(patch)},
        {"backbone": {**small_wide, "patch": stands}},
        paper=paper,
        note=f"{note}patches of {stands} px at scale small",
    )


def _views(patch: int) -> dict[str, Any]:
    """224 and 96 are no multiples of 5."""
    return {"views": {"global_size": 225, "local_size": 95}} if patch == 5 else {}


TABLE = Table(
    name="fig5",
    title="Fig. 5: size of the patches",
    protocol="ViTs on ImageNet, 300 epochs; 20-NN against images/s through the network on a V100. The figure is a "
    "plot: only what text and tables say stands here.",
    paper=vit_300,
    small=narrow,
    figures=(KNN, LINEAR, SPEED),
    rows=(
        _row("small", 16, {"20-NN": 72.8, "throughput": 1007}, "Table 7; "),
        _row("small", 8, {"throughput": 180}),
        _row("small", 5, {"throughput": 44}),
        _row("base", 16, {"throughput": 312}),
        _row("base", 8, {"20-NN": 77.4, "throughput": 63}, "Table 2; "),
    ),
    shows="Smaller patches are much better, without more parameters, and slower.",
)
