"""App. D: the number of attention heads."""

from dino_ssl.ablations.bases import narrow, vit_300
from dino_ssl.ablations.table import KNN, LINEAR, SPEED, Row, Table
from dino_ssl.config import edit
from dino_ssl.run import Run


def small() -> Run:
    """A width of 96, which 3, 4, 6 and 8 heads divide."""
    return edit(narrow(), backbone=dict(width=96, heads=3))


def _row(heads: int, knn: float, speed: float) -> Row:
    return Row(
        str(heads),
        f"{heads} heads of {384 // heads}",
        {"backbone": {"heads": heads}},
        {"backbone": {"heads": heads // 2}},
        paper={"20-NN": knn, "throughput": speed},
        note=f"{heads // 2} heads of {96 // (heads // 2)} at scale small",
    )


TABLE = Table(
    name="attention-heads",
    title="App. D: number of attention heads",
    protocol="ViT-S/16 (width 384) on ImageNet, 300 epochs; 20-NN, and images/s through the network on a V100.",
    paper=vit_300,
    small=small,
    figures=(KNN, LINEAR, SPEED),
    rows=(_row(6, 72.8, 1007), _row(8, 73.1, 971), _row(12, 73.7, 927), _row(16, 73.8, 860)),
    shows="More heads are a little better and a little slower.",
)
