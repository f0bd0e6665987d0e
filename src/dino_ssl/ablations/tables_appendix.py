"""The tables of the paper's appendix: Tables 13 to 15, and the unnumbered ones of App. C, D and E."""

from collections.abc import Callable
from dataclasses import replace

from dino_ssl.ablations.baselines import NO_MULTI_CROP, byol, method, moco, swav
from dino_ssl.ablations.bases import Changes, conv, longer, narrow, vit_100, vit_300
from dino_ssl.ablations.table import Configuration, Scale, Table, row
from dino_ssl.config import edit
from dino_ssl.presets.paper import resnet50_800
from dino_ssl.run import Run

# -- methods -----------------------------------------------------------------------------------------------


def _resnet(run: Run) -> Changes:
    """Return the settings of the released ResNet-50 at the base's length: batch norm in the head, K 60000."""
    released = resnet50_800()
    optim = edit(released.optim, epochs=run.optim.epochs)
    return {"backbone": released.backbone, "method": released.method, "optim": optim, "views": released.views}


def _small_resnet(run: Run) -> Changes:
    base = conv()
    return {"backbone": base.backbone, "optim": {"lr": base.optim.lr}, "online_eval": {"size": base.online_eval.size}}


def _on_resnet(item: Configuration) -> Configuration:
    """Return a method on a ResNet: its method and views, with the optimizer of the network."""

    def change(scale: Scale, network: Callable[[Run], Changes]) -> Callable[[Run], Changes]:
        kept = ("method", "views")
        return lambda run: {**network(run), **{k: v for k, v in item.changes(scale, run).items() if k in kept}}

    return replace(item, change=change("paper", _resnet), small=change("small", _small_resnet))


TABLE13 = Table(
    name="table13",
    title="Table 13: methods on a ConvNet and on a ViT",
    small_base=narrow,
    metrics=("linear", "20-NN"),
    configurations=(
        _on_resnet(moco("moco-v2-resnet", "MoCo-v2, ResNet-50", 71.1, 62.9)),
        _on_resnet(byol("byol-resnet", "BYOL, ResNet-50", 72.7, 65.4)),
        _on_resnet(swav("swav-resnet", "SwAV, ResNet-50", 74.1, 65.4)),
        _on_resnet(row("dino-resnet", "DINO, ResNet-50", {}, 74.5, 65.6)),
        moco("moco-v2-vit", "MoCo-v2, ViT-S/16", 71.6, 62.0),
        byol("byol-vit", "BYOL, ViT-S/16", 71.4, 66.6),
        swav("swav-vit", "SwAV, ViT-S/16", 71.8, 64.7),
        row("dino-vit", "DINO, ViT-S/16", {}, 76.1, 72.8),
    ),
    note="SwAV and DINO with multi-crop. ResNet-50: a ResNet-10 of half the width at scale small.",
    conclusion="On a ResNet-50 DINO is as good as the others; on a ViT it is better, above all in 20-NN.",
)

TABLE14 = Table(
    name="table14",
    title="Table 14: from DINO to MoCo-v2 and BYOL",
    metrics=("linear", "20-NN"),
    configurations=(
        row("dino", "DINO: cross-entropy, multi-crop, center", {}, 76.1),
        row("mse", "MSE, multi-crop, center", method(loss="mse"), 62.4),
        row("predictor", "cross-entropy, multi-crop, center, predictor", method(predictor=True), 75.6),
        row("no-multi-crop", "cross-entropy, center", NO_MULTI_CROP, 72.5),
        moco("moco-v2", "MoCo-v2: InfoNCE, batch norm", 71.4),
        moco("moco-v2-crops", "InfoNCE, multi-crop, batch norm", 73.4, multi_crop=True),
        byol("byol", "BYOL: MSE, batch norm, predictor", 71.4),
        byol("byol-no-predictor", "MSE, batch norm", 0.1, predictor=False),
        row("mse-no-multi-crop", "MSE, center", {**method(loss="mse"), **NO_MULTI_CROP}, 52.6),
        byol("byol-crops", "MSE, multi-crop, batch norm, predictor", 64.8, multi_crop=True),
    ),
    note="MSE compares l2-normalized outputs, without sharpening.",
    conclusion="With centering neither a predictor nor batch norm is needed; centering works well only with "
    "cross-entropy; multi-crop helps InfoNCE and harms BYOL.",
)

TARGETS = {"centering": "centering", "batch-softmax": "softmax over the batch", "sinkhorn": "Sinkhorn-Knopp"}
TEACHERS = {"momentum": "momentum", "student": "copy of the student"}


def _table15(teacher: str, targets: str, linear: float) -> Configuration:
    title = f"{TEACHERS[teacher]}, {TARGETS[targets]}"
    return row(f"{teacher}-{targets}", title, method(teacher=teacher, targets=targets), linear)


TABLE15 = Table(
    name="table15",
    title="Table 15: operations on the teacher's outputs",
    metrics=("linear", "20-NN", "entropy"),
    configurations=(
        _table15("momentum", "centering", 76.1),
        _table15("momentum", "batch-softmax", 75.8),
        _table15("momentum", "sinkhorn", 76.0),
        _table15("student", "centering", 0.1),
        _table15("student", "batch-softmax", 72.2),
        _table15("student", "sinkhorn", 71.8),
    ),
    note="Without momentum the teacher is a copy of the student. The paper calls the last line SwAV; Table 7 has the "
    "method of that name.",
    conclusion="With momentum all three perform equally well; without it, centering is not enough.",
)

# -- App. C: the projection head ---------------------------------------------------------------------------

HEAD_NORM = Table(
    name="head-norm",
    title="App. C: batch norm and activation of the head",
    paper_base=vit_100,
    configurations=(
        row("no-norm", "no batch norm, GELU", method(head_norm="none"), 69.7),
        row("batch-norm", "batch norm", method(head_norm="batch"), 68.6),
        row("relu", "ReLU", method(head_act="relu"), 68.9),
    ),
    conclusion="The head needs no batch norm, so a ViT can be trained without any batch norm.",
)


def _head_layers(total: int, l2: bool, knn: float) -> Configuration:
    """Count all linear layers, as the paper does: with the l2 bottleneck also the weight-normalized last one."""
    layers = {"head_layers": total - 1} if l2 else {"head_layers": total, "head_bottleneck": 0}
    title = f"{total} linear layer{'s' if total > 1 else ''}, {'with' if l2 else 'without'} the l2 bottleneck"
    return row(f"{total}-{'l2' if l2 else 'plain'}", title, method(**layers, out_dim=4096), knn, small=method(**layers))


HEAD_LAYERS = Table(
    name="head-layers",
    title="App. C: layers of the head, with and without the l2-normalized bottleneck",
    paper_base=vit_100,
    configurations=(
        *(_head_layers(total, True, knn) for total, knn in ((2, 62.2), (3, 68.0), (4, 69.3))),
        *(_head_layers(total, False, knn) for total, knn in ((1, 61.6), (2, 62.9), (3, 0.1), (4, 0.1))),
    ),
    note="K = 4096.",
    conclusion="Deep heads train only with the l2 bottleneck, and then deeper is better.",
)

PROTOTYPES = Table(
    name="prototypes",
    title="App. C: K, the number of prototypes",
    paper_base=vit_100,
    configurations=tuple(
        row(str(k), f"K = {k}", method(out_dim=k), knn, small=method(out_dim=k // 16))
        for k, knn in ((1024, 67.8), (4096, 69.3), (16384, 69.2), (65536, 69.7), (262144, 69.1))
    ),
    conclusion="Large K is better, up to 65536.",
)

# -- App. D: temperature, center, length, heads ------------------------------------------------------------


def _temperature(tau: float, knn: float, title: str = "") -> Configuration:
    change = method(teacher_temp=tau, warmup_teacher_temp=tau, warmup_teacher_temp_epochs=0)
    return row(f"{tau:g}", title or f"tau_t {tau:g}", change, knn)


def _warmup(run: Run) -> Changes:
    epochs = round(0.3 * run.optim.epochs)
    return method(teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=epochs)


TEMPERATURES = Table(
    name="temperatures",
    title="App. D: teacher temperature",
    paper_base=vit_100,
    metrics=("20-NN", "entropy"),
    curves=("20-NN", "loss", "teacher_entropy"),
    configurations=(
        _temperature(0, 43.9, "tau_t 0: the largest output (argmax)"),
        _temperature(0.02, 66.7),
        _temperature(0.04, 69.6),
        _temperature(0.06, 68.7),
        _temperature(0.08, 0.1),
        row("0.04-0.07", "tau_t 0.04 to 0.07, warm-up over 30 % of the epochs", _warmup, 69.7),
    ),
    conclusion="A constant temperature must not exceed 0.06; 0.08 ends at ln K; a warm-up allows 0.07.",
)

CENTER_MOMENTUM = Table(
    name="center-momentum",
    title="App. D: momentum of the center (m of Eq. 4)",
    paper_base=vit_100,
    metrics=("20-NN", "entropy"),
    curves=("20-NN", "loss", "teacher_entropy"),
    configurations=tuple(
        row(f"{m:g}", f"m = {m:g}", method(center_momentum=m), knn)
        for m, knn in ((0.0, 69.1), (0.9, 69.7), (0.99, 69.4), (0.999, 0.1))
    ),
    conclusion="The center may be updated fast or slowly, but 0.999 is too slow.",
)

LENGTH = Table(
    name="length",
    title="App. D: training length",
    paper_base=lambda: vit_100(local=10),  # the likely reason for 70.9 here and 69.7 elsewhere in the appendix
    metrics=("20-NN", "linear", "hours"),
    configurations=(
        row("100", "100 epochs", {}, 70.9),
        row("300", "300 epochs", longer(3), 72.8),
        row("800", "800 epochs", longer(8), 74.5),
    ),
    note="At scale small, 300 and 800 stand for 3 and 8 times the epochs of the base.",
    conclusion="Longer training is better, with diminishing returns.",
)


def _heads(heads: int, knn: float, speed: float) -> Configuration:
    change, small = ({"backbone": {"heads": n}} for n in (heads, heads // 2))
    return row(str(heads), f"{heads} heads of {384 // heads}", change, knn, None, speed, small=small)


ATTENTION_HEADS = Table(
    name="attention-heads",
    title="App. D: number of attention heads",
    small_base=lambda: edit(narrow(), backbone=dict(width=96, heads=3)),  # 96 is divisible by 3, 4, 6 and 8
    metrics=("20-NN", "linear", "throughput"),
    configurations=(_heads(6, 72.8, 1007), _heads(8, 73.1, 971), _heads(12, 73.7, 927), _heads(16, 73.8, 860)),
    note="Throughput in images/s on a V100. At scale small, half as many heads.",
    conclusion="More heads are slightly better and slightly slower.",
)

# -- App. E: multi-crop ------------------------------------------------------------------------------------

MULTI_CROP = Table(
    name="multi-crop",
    title="App. E: multi-crop in other methods",
    paper_base=lambda: vit_300(local=6),  # here DINO reaches 72.7 / 75.9, and 72.8 / 76.1 in Table 7
    configurations=(
        byol("byol", "BYOL", 66.6, 71.4),
        byol("byol-crops", "BYOL with multi-crop", 59.8, 64.8, multi_crop=True),
        swav("swav", "SwAV", 60.5, 68.5, multi_crop=False),
        swav("swav-crops", "SwAV with multi-crop", 64.7, 71.8),
        moco("moco-v2", "MoCo-v2", 62.0, 71.6),
        moco("moco-v2-crops", "MoCo-v2 with multi-crop", 65.4, 73.4, multi_crop=True),
        row("dino", "DINO", NO_MULTI_CROP, 67.9, 72.5),
        row("dino-crops", "DINO with multi-crop", {}, 72.7, 75.9),
    ),
    conclusion="Multi-crop helps all methods except BYOL, and DINO most.",
)


def _crop_scale(s: float, knn: float) -> Configuration:
    views = {"local_scale": (0.05, s), "global_scale": (s, 1.0)}
    return row(f"{s:g}", f"local 0.05 to {s:g}, global {s:g} to 1", {"views": views}, knn)


CROP_SCALES = Table(
    name="crop-scales",
    title="App. E: scales of the crops, (0.05, s) and (s, 1)",
    paper_base=vit_100,
    configurations=tuple(
        _crop_scale(s, knn) for s, knn in ((0.08, 65.6), (0.16, 68.0), (0.24, 69.7), (0.32, 69.8), (0.48, 69.5))
    ),
    conclusion="s around 0.3 is best.",
)

APPENDIX = [table for table in globals().values() if isinstance(table, Table)]
