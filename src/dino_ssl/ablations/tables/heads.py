"""App. C: the projection head. Its norm and activation, its layers with and without the bottleneck, and K."""

from dino_ssl.ablations.bases import conv, vit_100
from dino_ssl.ablations.table import KNN, LINEAR, Row, Table

PROTOCOL = "ViT-S/16 on ImageNet, 100 epochs; 20-NN."

HEAD_NORM = Table(
    name="head-norm",
    title="App. C: batch norm and activation of the head",
    protocol=PROTOCOL,
    paper=vit_100,
    small=conv,
    figures=(KNN, LINEAR),
    rows=(
        Row("no-norm", "no batch norm, GELU", {"method": {"head_norm": "none"}}, paper={"20-NN": 69.7}),
        Row("batch-norm", "batch norm", {"method": {"head_norm": "batch"}}, paper={"20-NN": 68.6}),
        Row("relu", "ReLU", {"method": {"head_act": "relu"}}, paper={"20-NN": 68.9}),
    ),
    shows="The head needs no batch norm, which makes the whole ViT free of it.",
)


def _layers(total: int, l2: bool, knn: float) -> Row:
    """The paper counts all linear layers; with l2 the last one is the weight-normalised one."""
    method = {"head_layers": total - 1} if l2 else {"head_layers": total, "head_bottleneck": 0}
    return Row(
        f"{total}-{'l2' if l2 else 'plain'}",
        f"{total} linear layer{'s' if total > 1 else ''}, {'with' if l2 else 'without'} the l2 bottleneck",
        {"method": {**method, "out_dim": 4096}},
        {"method": method},
        paper={"20-NN": knn},
    )


HEAD_LAYERS = Table(
    name="head-layers",
    title="App. C: layers of the head, with and without the l2-normalised bottleneck",
    protocol="ViT-S/16 on ImageNet, 100 epochs, K = 4096; 20-NN.",
    paper=vit_100,
    small=conv,
    figures=(KNN, LINEAR),
    rows=(
        _layers(2, True, 62.2),
        _layers(3, True, 68.0),
        _layers(4, True, 69.3),
        _layers(1, False, 61.6),
        _layers(2, False, 62.9),
        _layers(3, False, 0.1),
        _layers(4, False, 0.1),
    ),
    shows="Deep heads train only with the l2 bottleneck, and then deeper is better.",
)


def _prototypes(count: int, knn: float) -> Row:
    return Row(
        str(count),
        f"K = {count}",
        {"method": {"out_dim": count}},
        {"method": {"out_dim": count // 16}},
        paper={"20-NN": knn},
        note=f"K = {count // 16} at scale small",
    )


PROTOTYPES = Table(
    name="prototypes",
    title="App. C: K, the number of prototypes",
    protocol=PROTOCOL,
    paper=vit_100,
    small=conv,
    figures=(KNN, LINEAR),
    rows=(
        _prototypes(1024, 67.8),
        _prototypes(4096, 69.3),
        _prototypes(16384, 69.2),
        _prototypes(65536, 69.7),
        _prototypes(262144, 69.1),
    ),
    shows="Large K is better, up to 65536.",
)
