"""Table 7: the parts of the method, taken away or replaced one by one, beside the methods it is made of."""

from dino_ssl.ablations.bases import NO_MULTI_CROP, conv, vit_300
from dino_ssl.ablations.table import KNN, LINEAR, Row, Table
from dino_ssl.ablations.tables.baselines import byol, moco, swav


def _row(name: str, what: str, change: dict, knn: float, linear: float) -> Row:
    return Row(name, what, change, paper={"20-NN": knn, "linear": linear})


TABLE = Table(
    name="table7",
    title="Table 7: what matters in the method",
    protocol="ViT-S/16 on ImageNet, 300 epochs; 20-NN and linear top-1. Ten local crops: the first row is Table 8's.",
    paper=vit_300,
    small=conv,
    figures=(KNN, LINEAR),
    rows=(
        _row("dino", "DINO", {}, 72.8, 76.1),
        _row("no-momentum", "no momentum teacher", {"method": {"teacher": "student"}}, 0.1, 0.1),
        _row("sinkhorn", "Sinkhorn-Knopp for the center", {"method": {"targets": "sinkhorn"}}, 72.2, 76.0),
        _row("no-multi-crop", "no multi-crop", NO_MULTI_CROP, 67.9, 72.5),
        _row("mse", "MSE for cross-entropy", {"method": {"loss": "mse"}}, 52.6, 62.4),
        _row("predictor", "with a predictor", {"method": {"predictor": True}}, 71.8, 75.6),
        byol({"20-NN": 66.6, "linear": 71.4}),
        moco({"20-NN": 62.0, "linear": 71.6}),
        swav({"20-NN": 64.7, "linear": 71.8}),
    ),
    shows="Without momentum nothing is learned; multi-crop and cross-entropy matter most; Sinkhorn-Knopp and a "
    "predictor hardly change anything.",
)
