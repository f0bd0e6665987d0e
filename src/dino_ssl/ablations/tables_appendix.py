"""The tables of the paper's appendix: Tables 13 to 15, and the unnumbered ones of App. C, D and E."""

from collections.abc import Callable
from dataclasses import replace

from dino_ssl.ablations.baselines import byol, moco, results, swav
from dino_ssl.ablations.bases import NO_MULTI_CROP, conv, longer, narrow, vit_100, vit_300
from dino_ssl.ablations.table import Changes, Configuration, Table
from dino_ssl.config import edit
from dino_ssl.presets.paper import resnet50_800
from dino_ssl.run import Run

# -- Table 13 ----------------------------------------------------------------------------------------------


def _resnet(run: Run) -> Changes:
    """Return the settings of the released ResNet-50 at the base's length: batch norm in the head, K 60000."""
    released = resnet50_800()
    optim = edit(released.optim, epochs=run.optim.epochs)
    return {"backbone": released.backbone, "method": released.method, "optim": optim, "views": released.views}


def _small_resnet(run: Run) -> Changes:
    base = conv()
    return {"backbone": base.backbone, "optim": {"lr": base.optim.lr}, "online_eval": {"size": base.online_eval.size}}


def _with_method(network: Callable[[Run], Changes], method: Changes) -> Callable[[Run], Changes]:
    """Return the network's changes with the method and the views of `method`, if it changes them."""
    kept = {name: method[name] for name in ("method", "views") if name in method}
    return lambda run: {**network(run), **kept}


def _on_resnet(method: Configuration, linear: float, knn: float) -> Configuration:
    change, small = method.change, method.change if method.small is None else method.small
    assert not callable(change)
    assert not callable(small)
    return replace(
        method,
        name=f"{method.name}-resnet",
        title=f"{method.title}, ResNet-50",
        change=_with_method(_resnet, change),
        small=_with_method(_small_resnet, small),
        paper=results(knn, linear),
        note="a ResNet-10 of half the width at scale small",
    )


def _on_vit(method: Configuration, linear: float, knn: float) -> Configuration:
    name, title = f"{method.name}-vit", f"{method.title}, ViT-S/16"
    return replace(method, name=name, title=title, paper=results(knn, linear))


DINO = Configuration("dino", "DINO")

TABLE13 = Table(
    name="table13",
    title="Table 13: methods on a ConvNet and on a ViT",
    protocol="ResNet-50 and ViT-S/16 on ImageNet, 300 epochs; linear top-1 and 20-NN. SwAV and DINO with multi-crop.",
    paper=vit_300,
    small=narrow,
    metrics=("linear", "20-NN"),
    configurations=(
        _on_resnet(moco(), 71.1, 62.9),
        _on_resnet(byol(), 72.7, 65.4),
        _on_resnet(swav(), 74.1, 65.4),
        _on_resnet(DINO, 74.5, 65.6),
        _on_vit(moco(), 71.6, 62.0),
        _on_vit(byol(), 71.4, 66.6),
        _on_vit(swav(), 71.8, 64.7),
        _on_vit(DINO, 76.1, 72.8),
    ),
    conclusion="On a ResNet-50 DINO is as good as the others; on a ViT it is better, above all in 20-NN.",
)

# -- Tables 14 and 15 --------------------------------------------------------------------------------------

MSE = {"method": {"loss": "mse"}}
PREDICTOR = {"method": {"predictor": True}}

TABLE14 = Table(
    name="table14",
    title="Table 14: from DINO to MoCo-v2 and BYOL",
    protocol="ViT-S/16 on ImageNet, 300 epochs; linear top-1. MSE compares l2-normalized outputs, without sharpening.",
    paper=vit_300,
    small=conv,
    metrics=("linear", "20-NN"),
    configurations=(
        Configuration("dino", "DINO: cross-entropy, multi-crop, center", paper=results(linear=76.1)),
        Configuration("mse", "MSE, multi-crop, center", MSE, paper=results(linear=62.4)),
        Configuration(
            "predictor", "cross-entropy, multi-crop, center, predictor", PREDICTOR, paper=results(linear=75.6)
        ),
        Configuration("no-multi-crop", "cross-entropy, center", NO_MULTI_CROP, paper=results(linear=72.5)),
        moco(title="MoCo-v2: InfoNCE, batch norm", linear=71.4),
        moco("moco-v2-crops", "InfoNCE, multi-crop, batch norm", multi_crop=True, linear=73.4),
        byol(title="BYOL: MSE, batch norm, predictor", linear=71.4),
        byol("byol-no-predictor", "MSE, batch norm", predictor=False, linear=0.1),
        Configuration("mse-no-multi-crop", "MSE, center", {**MSE, **NO_MULTI_CROP}, paper=results(linear=52.6)),
        byol("byol-crops", "MSE, multi-crop, batch norm, predictor", multi_crop=True, linear=64.8),
    ),
    conclusion="With centering neither a predictor nor batch norm is needed; centering works well only with "
    "cross-entropy; multi-crop helps InfoNCE and harms BYOL.",
)

TARGETS = {"centering": "centering", "batch-softmax": "softmax over the batch", "sinkhorn": "Sinkhorn-Knopp"}


def _table15(teacher: str, targets: str, linear: float, note: str = "") -> Configuration:
    title = f"{'momentum' if teacher == 'momentum' else 'copy of the student'}, {TARGETS[targets]}"
    change = {"method": {"teacher": teacher, "targets": targets}}
    return Configuration(f"{teacher}-{targets}", title, change, paper=results(linear=linear), note=note)


TABLE15 = Table(
    name="table15",
    title="Table 15: operations on the teacher's outputs",
    protocol="ViT-S/16 on ImageNet, 300 epochs; linear top-1. Without momentum the teacher is a copy of the student.",
    paper=vit_300,
    small=conv,
    metrics=("linear", "20-NN", "entropy"),
    configurations=(
        _table15("momentum", "centering", 76.1),
        _table15("momentum", "batch-softmax", 75.8),
        _table15("momentum", "sinkhorn", 76.0),
        _table15("student", "centering", 0.1),
        _table15("student", "batch-softmax", 72.2),
        _table15("student", "sinkhorn", 71.8, "the paper calls this SwAV; Table 7 has the method of that name"),
    ),
    conclusion="With momentum all three perform equally well; without it, centering is not enough.",
)

# -- App. C: the projection head -----------------------------------------------------------------------------

HEAD_NORM = Table(
    name="head-norm",
    title="App. C: batch norm and activation of the head",
    protocol="ViT-S/16 on ImageNet, 100 epochs; 20-NN.",
    paper=vit_100,
    small=conv,
    configurations=(
        Configuration("no-norm", "no batch norm, GELU", {"method": {"head_norm": "none"}}, paper=results(69.7)),
        Configuration("batch-norm", "batch norm", {"method": {"head_norm": "batch"}}, paper=results(68.6)),
        Configuration("relu", "ReLU", {"method": {"head_act": "relu"}}, paper=results(68.9)),
    ),
    conclusion="The head needs no batch norm, so a ViT can be trained without any batch norm.",
)


def _head_layers(total: int, l2: bool, knn: float) -> Configuration:
    """Count all linear layers, as the paper does: with the l2 bottleneck also the weight-normalized last one."""
    method = {"head_layers": total - 1} if l2 else {"head_layers": total, "head_bottleneck": 0}
    return Configuration(
        f"{total}-{'l2' if l2 else 'plain'}",
        f"{total} linear layer{'s' if total > 1 else ''}, {'with' if l2 else 'without'} the l2 bottleneck",
        {"method": {**method, "out_dim": 4096}},
        {"method": method},
        results(knn),
    )


HEAD_LAYERS = Table(
    name="head-layers",
    title="App. C: layers of the head, with and without the l2-normalized bottleneck",
    protocol="ViT-S/16 on ImageNet, 100 epochs, K = 4096; 20-NN.",
    paper=vit_100,
    small=conv,
    configurations=(
        *(_head_layers(total, True, knn) for total, knn in ((2, 62.2), (3, 68.0), (4, 69.3))),
        *(_head_layers(total, False, knn) for total, knn in ((1, 61.6), (2, 62.9), (3, 0.1), (4, 0.1))),
    ),
    conclusion="Deep heads train only with the l2 bottleneck, and then deeper is better.",
)

PROTOTYPES = Table(
    name="prototypes",
    title="App. C: K, the number of prototypes",
    protocol="ViT-S/16 on ImageNet, 100 epochs; 20-NN.",
    paper=vit_100,
    small=conv,
    configurations=tuple(
        Configuration(
            str(k),
            f"K = {k}",
            {"method": {"out_dim": k}},
            {"method": {"out_dim": k // 16}},
            results(knn),
            f"K = {k // 16} at scale small",
        )
        for k, knn in ((1024, 67.8), (4096, 69.3), (16384, 69.2), (65536, 69.7), (262144, 69.1))
    ),
    conclusion="Large K is better, up to 65536.",
)

# -- App. D: temperature, center, length, heads ------------------------------------------------------------


def _temperature(tau: float, knn: float, title: str = "") -> Configuration:
    settings = {"teacher_temp": tau, "warmup_teacher_temp": tau, "warmup_teacher_temp_epochs": 0}
    return Configuration(f"{tau:g}", title or f"tau_t {tau:g}", {"method": settings}, paper=results(knn))


def _warmup(run: Run) -> Changes:
    epochs = round(0.3 * run.optim.epochs)
    return {"method": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": epochs}}


TEMPERATURES = Table(
    name="temperatures",
    title="App. D: teacher temperature",
    protocol="ViT-S/16 on ImageNet, 100 epochs; 20-NN.",
    paper=vit_100,
    small=conv,
    metrics=("20-NN", "entropy"),
    curves=("20-NN", "loss", "teacher_entropy"),
    configurations=(
        _temperature(0, 43.9, "tau_t 0: the largest output (argmax)"),
        _temperature(0.02, 66.7),
        _temperature(0.04, 69.6),
        _temperature(0.06, 68.7),
        _temperature(0.08, 0.1),
        Configuration("0.04-0.07", "tau_t 0.04 to 0.07, warm-up over 30 % of the epochs", _warmup, paper=results(69.7)),
    ),
    conclusion="A constant temperature must not exceed 0.06; 0.08 ends at ln K; a warm-up allows 0.07.",
)

CENTER_MOMENTUM = Table(
    name="center-momentum",
    title="App. D: momentum of the center (m of Eq. 4)",
    protocol="ViT-S/16 on ImageNet, 100 epochs; 20-NN.",
    paper=vit_100,
    small=conv,
    metrics=("20-NN", "entropy"),
    curves=("20-NN", "loss", "teacher_entropy"),
    configurations=tuple(
        Configuration(f"{m:g}", f"m = {m:g}", {"method": {"center_momentum": m}}, paper=results(knn))
        for m, knn in ((0.0, 69.1), (0.9, 69.7), (0.99, 69.4), (0.999, 0.1))
    ),
    conclusion="The center may be updated fast or slowly, but 0.999 is too slow.",
)


def _ten_local_crops() -> Run:
    """Return `vit_100()` with 10 local crops: the likely reason for 70.9 here and 69.7 elsewhere in the appendix."""
    return edit(vit_100(), views=dict(local=10))


LENGTH = Table(
    name="length",
    title="App. D: training length",
    protocol="ViT-S/16 on ImageNet; 20-NN.",
    paper=_ten_local_crops,
    small=conv,
    metrics=("20-NN", "linear", "hours"),
    configurations=(
        Configuration("100", "100 epochs", paper=results(70.9)),
        Configuration("300", "300 epochs", longer(3), paper=results(72.8), note="3 times the base at scale small"),
        Configuration("800", "800 epochs", longer(8), paper=results(74.5), note="8 times the base at scale small"),
    ),
    conclusion="Longer training is better, with diminishing returns.",
)


def _width_96() -> Run:
    """Return `narrow()` with a width of 96, which is divisible by 3, 4, 6 and 8 heads."""
    return edit(narrow(), backbone=dict(width=96, heads=3))


def _heads(heads: int, knn: float, speed: float) -> Configuration:
    small = heads // 2
    return Configuration(
        str(heads),
        f"{heads} heads of {384 // heads}",
        {"backbone": {"heads": heads}},
        {"backbone": {"heads": small}},
        results(knn) | {"throughput": speed},
        f"{small} heads of {96 // small} at scale small",
    )


ATTENTION_HEADS = Table(
    name="attention-heads",
    title="App. D: number of attention heads",
    protocol="ViT-S/16 (width 384) on ImageNet, 300 epochs; 20-NN, and throughput in images/s on a V100.",
    paper=vit_300,
    small=_width_96,
    metrics=("20-NN", "linear", "throughput"),
    configurations=(_heads(6, 72.8, 1007), _heads(8, 73.1, 971), _heads(12, 73.7, 927), _heads(16, 73.8, 860)),
    conclusion="More heads are slightly better and slightly slower.",
)

# -- App. E: multi-crop ------------------------------------------------------------------------------------


def _six_local_crops() -> Run:
    """Return `vit_300()` with 6 local crops: here DINO reaches 72.7 / 75.9, and 72.8 / 76.1 in Table 7."""
    return edit(vit_300(), views=dict(local=6))


MULTI_CROP = Table(
    name="multi-crop",
    title="App. E: multi-crop in other methods",
    protocol="ViT-S/16 on ImageNet, 300 epochs, without and with 6 local crops; 20-NN and linear top-1.",
    paper=_six_local_crops,
    small=conv,
    configurations=(
        byol(knn=66.6, linear=71.4),
        byol("byol-crops", "BYOL with multi-crop", multi_crop=True, knn=59.8, linear=64.8),
        swav(multi_crop=False, knn=60.5, linear=68.5),
        swav("swav-crops", "SwAV with multi-crop", knn=64.7, linear=71.8),
        moco(knn=62.0, linear=71.6),
        moco("moco-v2-crops", "MoCo-v2 with multi-crop", multi_crop=True, knn=65.4, linear=73.4),
        Configuration("dino", "DINO", NO_MULTI_CROP, paper=results(67.9, 72.5)),
        Configuration("dino-crops", "DINO with multi-crop", paper=results(72.7, 75.9)),
    ),
    conclusion="Multi-crop helps all methods except BYOL, and DINO most.",
)

CROP_SCALES = Table(
    name="crop-scales",
    title="App. E: scales of the crops, (0.05, s) and (s, 1)",
    protocol="ViT-S/16 on ImageNet, 100 epochs, 2x224 + 6x96; 20-NN.",
    paper=vit_100,
    small=conv,
    configurations=tuple(
        Configuration(
            f"{s:g}",
            f"local 0.05 to {s:g}, global {s:g} to 1",
            {"views": {"local_scale": (0.05, s), "global_scale": (s, 1.0)}},
            paper=results(knn),
        )
        for s, knn in ((0.08, 65.6), (0.16, 68.0), (0.24, 69.7), (0.32, 69.8), (0.48, 69.5))
    ),
    conclusion="s around 0.3 is best.",
)

TABLES = [table for table in globals().values() if isinstance(table, Table)]
