"""Fig. 7: what centering and sharpening are for."""

from dino_ssl.ablations.bases import conv, vit_300
from dino_ssl.ablations.table import ENTROPIES, ENTROPY, KL, KLS, KNN, QUALITY, Row, Table

TABLE = Table(
    name="fig7",
    title="Fig. 7: collapse without centering or without sharpening",
    protocol="H(P_t, P_s) = h(P_t) + KL(P_t || P_s) while training (Eq. 5). Entropy: share of ln K, its largest value. "
    "A plot without figures; where the curves end is said in the text.",
    paper=vit_300,
    small=conv,
    figures=(ENTROPY, KL, KNN),
    curves=(ENTROPIES, KLS, QUALITY),
    rows=(
        Row("both", "centering and sharpening", {"method": {"targets": "centering", "sharpening": True}}),
        Row(
            "sharpening",
            "sharpening alone: no centering",
            {"method": {"targets": "none", "sharpening": True}},
            paper={"entropy": 0.0, "kl": 0.0},
            note="one prototype takes everything",
        ),
        Row(
            "centering",
            "centering alone: no sharpening",
            {"method": {"targets": "centering", "sharpening": False}},
            paper={"entropy": 100.0, "kl": 0.0},
            note="every picture gets all prototypes alike",
        ),
    ),
    shows="KL goes to 0 in both failures, entropy to 0 without centering and to ln K without sharpening. "
    "With both, neither happens.",
)
