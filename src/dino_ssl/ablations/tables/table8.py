"""Table 8: what multi-crop costs and brings."""

from dino_ssl.ablations.bases import NO_MULTI_CROP, conv, longer, vit_100
from dino_ssl.ablations.table import HOURS, KNN, LINEAR, MEMORY, Row, Table


def _row(local: int, length: int, linear: float, hours: float, memory: float) -> Row:
    crops = {"views": {"local": local}} if local else NO_MULTI_CROP
    what = f"2x224 + {local}x96" if local else "2x224"
    return Row(
        f"{local}-local-{length}",
        f"{what}, {length} epochs",
        lambda run: {**crops, **(longer(3)(run) if length == 300 else {})},
        paper={"linear": linear, "hours": hours, "memory": memory},
    )


TABLE = Table(
    name="table8",
    title="Table 8: time, memory and accuracy by the number of crops",
    protocol="ViT-S/16 on ImageNet on two machines of 8 GPUs; linear top-1, hours, memory of one GPU.",
    paper=vit_100,
    small=conv,
    figures=(LINEAR, KNN, HOURS, MEMORY),
    rows=(
        _row(0, 100, 67.8, 15.3, 9.3),
        _row(0, 300, 72.5, 45.9, 9.3),
        _row(2, 100, 71.5, 17.0, 10.5),
        _row(2, 300, 74.5, 51.0, 10.5),
        _row(6, 100, 73.8, 20.3, 12.9),
        _row(6, 300, 75.9, 60.9, 12.9),
        _row(10, 100, 74.6, 24.2, 15.4),
        _row(10, 300, 76.1, 72.6, 15.4),
    ),
    shows="More crops reach the same accuracy in less time, for some memory.",
)
