"""Table 9: small batches."""

from dino_ssl.ablations.bases import NO_MULTI_CROP, conv, longer, vit_100
from dino_ssl.ablations.table import KNN, LINEAR, Row, Table


def _row(batch: int, small: int, knn: float) -> Row:
    return Row(
        str(batch),
        f"batch {batch}",
        {"optim": {"batch_size": batch}, **NO_MULTI_CROP},
        {"optim": {"batch_size": small}, **NO_MULTI_CROP},
        paper={"20-NN": knn},
        note=f"batch {small} at scale small",
    )


TABLE = Table(
    name="table9",
    title="Table 9: size of the batch",
    protocol="ViT-S/16 on ImageNet, 100 epochs, no multi-crop, learning rate 5e-4 x batch / 256; 20-NN.",
    paper=vit_100,
    small=conv,
    figures=(KNN, LINEAR),
    rows=(
        _row(128, 16, 57.9),
        _row(256, 32, 59.1),
        _row(512, 64, 59.6),
        _row(1024, 128, 59.9),
        Row(
            "8",
            "batch 8, half the epochs",
            lambda run: {"optim": {"batch_size": 8, **longer(0.5)(run)["optim"]}, **NO_MULTI_CROP},
            paper={"20-NN": 35.2},
            note="Sec. 5.5, after 50 epochs",
        ),
    ),
    shows="Small batches lose little; a batch of 8 needs other settings, and still learns.",
)
