"""Table 13: four methods on two networks."""

from dataclasses import replace

from dino_ssl.ablations.bases import conv, narrow, vit_300
from dino_ssl.ablations.table import KNN, LINEAR, Change, Changes, Row, Table
from dino_ssl.ablations.tables.baselines import byol, moco, swav
from dino_ssl.config import edit
from dino_ssl.presets.paper import resnet50_800
from dino_ssl.run import Run


def _resnet(run: Run) -> Changes:
    """The settings of the released ResNet-50 at 300 epochs; DINO's head has batch norm there, and K = 60000."""
    told = resnet50_800()
    return {
        "backbone": told.backbone,
        "method": told.method,
        "optim": edit(told.optim, epochs=run.optim.epochs),
        "views": told.views,
    }


def _small_resnet(run: Run) -> Changes:
    return {
        "backbone": conv().backbone,
        "optim": {"lr": conv().optim.lr},
        "online_eval": {"size": conv().online_eval.size},
    }


def _over(first: Change, then: Change) -> Change:
    """Both; the second's views and method stand where both name them."""

    def both(run: Run) -> Changes:
        mine = first(run) if callable(first) else first
        named = then(run) if callable(then) else then
        views = {"views": edit(run.views, **named["views"])} if "views" in named else {}
        method = {"method": named["method"]} if "method" in named else {}
        return {**mine, **method, **views}

    return both


def _on_resnet(row: Row, linear: float, knn: float) -> Row:
    small = row.change if row.small is None else row.small
    return replace(
        row,
        name=f"{row.name}-resnet",
        what=f"{row.what}, ResNet-50",
        change=_over(_resnet, row.change),
        small=_over(_small_resnet, small),
        paper={"20-NN": knn, "linear": linear},
        note="a ResNet-10 of half the width at scale small",
    )


def _on_vit(row: Row, linear: float, knn: float) -> Row:
    return replace(row, name=f"{row.name}-vit", what=f"{row.what}, ViT-S/16", paper={"20-NN": knn, "linear": linear})


MOCO, BYOL, SWAV, DINO = moco({}), byol({}), swav({}), Row("dino", "DINO")

TABLE = Table(
    name="table13",
    title="Table 13: methods on a ConvNet and on a ViT",
    protocol="ResNet-50 and ViT-S/16 on ImageNet, 300 epochs; linear top-1 and 20-NN. SwAV and DINO with multi-crop.",
    paper=vit_300,
    small=narrow,
    figures=(LINEAR, KNN),
    rows=(
        _on_resnet(MOCO, 71.1, 62.9),
        _on_resnet(BYOL, 72.7, 65.4),
        _on_resnet(SWAV, 74.1, 65.4),
        _on_resnet(DINO, 74.5, 65.6),
        _on_vit(MOCO, 71.6, 62.0),
        _on_vit(BYOL, 71.4, 66.6),
        _on_vit(SWAV, 71.8, 64.7),
        _on_vit(DINO, 76.1, 72.8),
    ),
    shows="On a ResNet-50 DINO is level with the others, on a ViT it is ahead, most of all in 20-NN.",
)
