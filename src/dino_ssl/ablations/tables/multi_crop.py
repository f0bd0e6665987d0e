"""App. E: multi-crop in four methods."""

from dino_ssl.ablations.bases import NO_MULTI_CROP, conv, vit_300
from dino_ssl.ablations.table import KNN, LINEAR, Row, Table
from dino_ssl.ablations.tables.baselines import byol, moco, swav
from dino_ssl.config import edit
from dino_ssl.run import Run


def base() -> Run:
    """6 local crops here: DINO's 72.7 / 75.9, where Table 7 has 72.8 / 76.1."""
    return edit(vit_300(), views=dict(local=6))


def _figures(knn: float, linear: float) -> dict[str, float]:
    return {"20-NN": knn, "linear": linear}


TABLE = Table(
    name="multi-crop",
    title="App. E: multi-crop in other methods",
    protocol="ViT-S/16 on ImageNet, 300 epochs, without and with 6 local crops; 20-NN and linear top-1.",
    paper=base,
    small=conv,
    figures=(KNN, LINEAR),
    rows=(
        byol(_figures(66.6, 71.4)),
        byol(_figures(59.8, 64.8), crops=True, name="byol-crops", what="BYOL with multi-crop"),
        swav(_figures(60.5, 68.5), crops=False),
        swav(_figures(64.7, 71.8), name="swav-crops", what="SwAV with multi-crop"),
        moco(_figures(62.0, 71.6)),
        moco(_figures(65.4, 73.4), crops=True, name="moco-v2-crops", what="MoCo-v2 with multi-crop"),
        Row("dino", "DINO", NO_MULTI_CROP, paper=_figures(67.9, 72.5)),
        Row("dino-crops", "DINO with multi-crop", paper=_figures(72.7, 75.9)),
    ),
    shows="Multi-crop helps all but BYOL, and DINO most.",
)
