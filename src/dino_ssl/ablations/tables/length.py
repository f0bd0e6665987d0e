"""App. D: how long to train."""

from dino_ssl.ablations.bases import conv, longer, vit_100
from dino_ssl.ablations.table import HOURS, KNN, LINEAR, Row, Table
from dino_ssl.config import edit
from dino_ssl.run import Run


def base() -> Run:
    """100 epochs with 10 local crops: 70.9 here and 69.7 elsewhere in the appendix is most likely this."""
    return edit(vit_100(), views=dict(local=10))


TABLE = Table(
    name="length",
    title="App. D: length of the training",
    protocol="ViT-S/16 on ImageNet; 20-NN.",
    paper=base,
    small=conv,
    figures=(KNN, LINEAR, HOURS),
    rows=(
        Row("100", "100 epochs", paper={"20-NN": 70.9}),
        Row("300", "300 epochs", longer(3), paper={"20-NN": 72.8}, note="3 times the base's at scale small"),
        Row("800", "800 epochs", longer(8), paper={"20-NN": 74.5}, note="8 times the base's at scale small"),
    ),
    shows="Longer is better, ever more slowly.",
)
