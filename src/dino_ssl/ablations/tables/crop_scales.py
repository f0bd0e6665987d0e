"""App. E: where local crops end and global ones begin."""

from dino_ssl.ablations.bases import conv, vit_100
from dino_ssl.ablations.table import KNN, LINEAR, Row, Table


def _row(s: float, knn: float) -> Row:
    views = {"local_scale": (0.05, s), "global_scale": (s, 1.0)}
    return Row(f"{s:g}", f"local 0.05 to {s:g}, global {s:g} to 1", {"views": views}, paper={"20-NN": knn})


TABLE = Table(
    name="crop-scales",
    title="App. E: scales of the crops, (0.05, s) and (s, 1)",
    protocol="ViT-S/16 on ImageNet, 100 epochs, 2x224 + 6x96; 20-NN.",
    paper=vit_100,
    small=conv,
    figures=(KNN, LINEAR),
    rows=(_row(0.08, 65.6), _row(0.16, 68.0), _row(0.24, 69.7), _row(0.32, 69.8), _row(0.48, 69.5)),
    shows="Around s = 0.3 it is best.",
)
