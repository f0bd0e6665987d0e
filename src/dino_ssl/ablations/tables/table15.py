"""Table 15: what the teacher does to its outputs, with and without momentum."""

from dino_ssl.ablations.bases import conv, vit_300
from dino_ssl.ablations.table import ENTROPY, KNN, LINEAR, Row, Table

TARGETS = {"centering": "centering", "batch-softmax": "softmax over the batch", "sinkhorn": "Sinkhorn-Knopp"}


def _row(teacher: str, targets: str, linear: float, note: str = "") -> Row:
    what = f"{'momentum' if teacher == 'momentum' else 'copy of the student'}, {TARGETS[targets]}"
    change = {"method": {"teacher": teacher, "targets": targets}}
    return Row(f"{teacher}-{targets}", what, change, paper={"linear": linear}, note=note)


TABLE = Table(
    name="table15",
    title="Table 15: operations of the teacher",
    protocol="ViT-S/16 on ImageNet, 300 epochs; linear top-1. Without momentum the teacher is a copy of the student.",
    paper=vit_300,
    small=conv,
    figures=(LINEAR, KNN, ENTROPY),
    rows=(
        _row("momentum", "centering", 76.1),
        _row("momentum", "batch-softmax", 75.8),
        _row("momentum", "sinkhorn", 76.0),
        _row("student", "centering", 0.1),
        _row("student", "batch-softmax", 72.2),
        _row("student", "sinkhorn", 71.8, "SwAV, in the paper's words; Table 7 has the method of that name"),
    ),
    shows="With momentum the three are alike; without it, centering alone is not enough.",
)
