"""App. D: the teacher's temperature."""

from dino_ssl.ablations.bases import conv, vit_100
from dino_ssl.ablations.table import ENTROPIES, ENTROPY, KNN, LOSS, QUALITY, Row, Table


def _constant(tau: float, knn: float, what: str = "") -> Row:
    settings = {"teacher_temp": tau, "warmup_teacher_temp": tau, "warmup_teacher_temp_epochs": 0}
    return Row(f"{tau:g}", what or f"tau_t {tau:g}", {"method": settings}, paper={"20-NN": knn})


TABLE = Table(
    name="temperatures",
    title="App. D: the teacher's temperature",
    protocol="ViT-S/16 on ImageNet, 100 epochs; 20-NN.",
    paper=vit_100,
    small=conv,
    figures=(KNN, ENTROPY),
    curves=(QUALITY, LOSS, ENTROPIES),
    rows=(
        _constant(0, 43.9, "tau_t 0: the largest output (argmax)"),
        _constant(0.02, 66.7),
        _constant(0.04, 69.6),
        _constant(0.06, 68.7),
        _constant(0.08, 0.1),
        Row(
            "0.04-0.07",
            "tau_t 0.04 to 0.07 by a warm-up over 30 % of the epochs",
            lambda run: {
                "method": {
                    "teacher_temp": 0.07,
                    "warmup_teacher_temp": 0.04,
                    "warmup_teacher_temp_epochs": round(0.3 * run.optim.epochs),
                }
            },
            paper={"20-NN": 69.7},
        ),
    ),
    shows="Up to 0.06 is needed to begin with; 0.08 ends at ln K; a warm-up allows 0.07.",
)
