"""Table 14: between DINO, MoCo-v2 and BYOL."""

from dino_ssl.ablations.bases import NO_MULTI_CROP, conv, vit_300
from dino_ssl.ablations.table import KNN, LINEAR, Row, Table
from dino_ssl.ablations.tables import baselines

MSE = {"method": {"loss": "mse"}}

TABLE = Table(
    name="table14",
    title="Table 14: the way from DINO to MoCo-v2 and BYOL",
    protocol="ViT-S/16 on ImageNet, 300 epochs; linear top-1. MSE compares l2-normalised outputs, without sharpening.",
    paper=vit_300,
    small=conv,
    figures=(LINEAR, KNN),
    rows=(
        Row("dino", "DINO: cross-entropy, multi-crop, center", paper={"linear": 76.1}),
        Row("mse", "MSE, multi-crop, center", MSE, paper={"linear": 62.4}),
        Row(
            "predictor",
            "cross-entropy, multi-crop, center, predictor",
            {"method": {"predictor": True}},
            paper={"linear": 75.6},
        ),
        Row("no-multi-crop", "cross-entropy, center", NO_MULTI_CROP, paper={"linear": 72.5}),
        baselines.moco({"linear": 71.4}, what="MoCo-v2: InfoNCE, batch norm"),
        baselines.moco({"linear": 73.4}, crops=True, name="moco-v2-crops", what="InfoNCE, multi-crop, batch norm"),
        baselines.byol({"linear": 71.4}, what="BYOL: MSE, batch norm, predictor"),
        baselines.row(
            "byol-no-predictor",
            "MSE, batch norm",
            baselines.BYOL_NO_PREDICTOR,
            baselines.BYOL_NO_PREDICTOR_SMALL,
            crops=False,
            paper={"linear": 0.1},
        ),
        Row("mse-no-multi-crop", "MSE, center", {**MSE, **NO_MULTI_CROP}, paper={"linear": 52.6}),
        baselines.byol({"linear": 64.8}, crops=True, name="byol-crops", what="MSE, multi-crop, batch norm, predictor"),
    ),
    shows="With centering no predictor and no batch norm are needed; cross-entropy is what makes centering work well; "
    "multi-crop helps InfoNCE and harms BYOL.",
)
