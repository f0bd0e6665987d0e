"""App. D: the center's momentum m of Eq. 4."""

from dino_ssl.ablations.bases import conv, vit_100
from dino_ssl.ablations.table import ENTROPIES, ENTROPY, KNN, LOSS, QUALITY, Row, Table


def _row(momentum: float, knn: float) -> Row:
    change = {"method": {"center_momentum": momentum}}
    return Row(f"{momentum:g}", f"m = {momentum:g}", change, paper={"20-NN": knn})


TABLE = Table(
    name="center-momentum",
    title="App. D: momentum of the center",
    protocol="ViT-S/16 on ImageNet, 100 epochs; 20-NN.",
    paper=vit_100,
    small=conv,
    figures=(KNN, ENTROPY),
    curves=(QUALITY, LOSS, ENTROPIES),
    rows=(_row(0.0, 69.1), _row(0.9, 69.7), _row(0.99, 69.4), _row(0.999, 0.1)),
    shows="The center may follow at once or slowly, but not as slowly as 0.999.",
)
