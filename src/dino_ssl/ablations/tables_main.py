"""The tables and figures of the paper's main text: Tables 7, 8 and 9, Figs. 5, 6 and 7."""

from typing import Any

from dino_ssl.ablations.baselines import byol, moco, results, swav
from dino_ssl.ablations.bases import NO_MULTI_CROP, conv, longer, narrow, vit_100, vit_300
from dino_ssl.ablations.table import Changes, Configuration, Table
from dino_ssl.config import edit
from dino_ssl.run import Run


def _table7(name: str, title: str, change: Changes, knn: float, linear: float) -> Configuration:
    return Configuration(name, title, change, paper=results(knn, linear))


TABLE7 = Table(
    name="table7",
    title="Table 7: what matters in the method",
    protocol="ViT-S/16 on ImageNet, 300 epochs; 20-NN and linear top-1. Ten local crops: the result of DINO equals the "
    "last line of Table 8.",
    paper=vit_300,
    small=conv,
    configurations=(
        _table7("dino", "DINO", {}, 72.8, 76.1),
        _table7("no-momentum", "no momentum teacher", {"method": {"teacher": "student"}}, 0.1, 0.1),
        _table7("sinkhorn", "Sinkhorn-Knopp instead of centering", {"method": {"targets": "sinkhorn"}}, 72.2, 76.0),
        _table7("no-multi-crop", "no multi-crop", NO_MULTI_CROP, 67.9, 72.5),
        _table7("mse", "MSE instead of cross-entropy", {"method": {"loss": "mse"}}, 52.6, 62.4),
        _table7("predictor", "with a predictor", {"method": {"predictor": True}}, 71.8, 75.6),
        byol(knn=66.6, linear=71.4),
        moco(knn=62.0, linear=71.6),
        swav(knn=64.7, linear=71.8),
    ),
    conclusion="Without the momentum teacher nothing is learned; multi-crop and cross-entropy matter most; "
    "Sinkhorn-Knopp and a predictor change little.",
)


def _table8(local: int, epochs: int, linear: float, hours: float, memory: float) -> Configuration:
    crops = {"views": {"local": local}} if local else NO_MULTI_CROP
    return Configuration(
        f"{local}-local-{epochs}",
        f"{f'2x224 + {local}x96' if local else '2x224'}, {epochs} epochs",
        lambda run: {**crops, **(longer(3)(run) if epochs == 300 else {})},
        paper={"linear": linear, "hours": hours, "memory": memory},
    )


TABLE8 = Table(
    name="table8",
    title="Table 8: time, memory and accuracy by the number of crops",
    protocol="ViT-S/16 on ImageNet on two machines with 8 GPUs each; linear top-1, hours, memory of one GPU.",
    paper=vit_100,
    small=conv,
    metrics=("linear", "20-NN", "hours", "memory"),
    configurations=(
        _table8(0, 100, 67.8, 15.3, 9.3),
        _table8(0, 300, 72.5, 45.9, 9.3),
        _table8(2, 100, 71.5, 17.0, 10.5),
        _table8(2, 300, 74.5, 51.0, 10.5),
        _table8(6, 100, 73.8, 20.3, 12.9),
        _table8(6, 300, 75.9, 60.9, 12.9),
        _table8(10, 100, 74.6, 24.2, 15.4),
        _table8(10, 300, 76.1, 72.6, 15.4),
    ),
    conclusion="More crops reach the same accuracy in less time, at the cost of some memory.",
)


def _table9(batch: int, small: int, knn: float) -> Configuration:
    change, small_change = ({"optim": {"batch_size": size}, **NO_MULTI_CROP} for size in (batch, small))
    note = f"batch {small} at scale small"
    return Configuration(str(batch), f"batch {batch}", change, small_change, results(knn), note)


TABLE9 = Table(
    name="table9",
    title="Table 9: batch size",
    protocol="ViT-S/16 on ImageNet, 100 epochs, no multi-crop, learning rate 5e-4 x batch / 256; 20-NN.",
    paper=vit_100,
    small=conv,
    configurations=(
        _table9(128, 16, 57.9),
        _table9(256, 32, 59.1),
        _table9(512, 64, 59.6),
        _table9(1024, 128, 59.9),
        Configuration(
            "8",
            "batch 8, half the epochs",
            lambda run: {"optim": {"batch_size": 8, **longer(0.5)(run)["optim"]}, **NO_MULTI_CROP},
            paper=results(35.2),
            note="Sec. 5.5, after 50 epochs",
        ),
    ),
    conclusion="Small batches lose little; a batch of 8 needs other settings and still learns.",
)

SMALL_PATCH = {16: 12, 8: 6, 5: 4}
"""Patch sizes at scale small, by the paper's: 16, 64 and 144 patches of a 48-pixel crop replace 196, 784 and 1936."""


def _fig5(size: str, patch: int, speed: float, *, knn: float | None = None, source: str = "") -> Configuration:
    change: dict[str, Any] = {"backbone": {"patch": patch} | ({} if size == "small" else {"size": size})}
    if patch == 5:  # 224 and 96 are not multiples of 5
        change["backbone"]["image_size"] = 225
        change["views"] = {"global_size": 225, "local_size": 95}
    small = {"patch": SMALL_PATCH[patch]} | ({} if size == "small" else {"width": 256, "heads": 8})
    return Configuration(
        f"{size[0]}{patch}",
        f"ViT-{size[0].upper()}/{patch}",
        change,
        {"backbone": small},
        results(knn) | {"throughput": speed},
        f"{source}patches of {SMALL_PATCH[patch]} px at scale small",
    )


FIG5 = Table(
    name="fig5",
    title="Fig. 5: patch size",
    protocol="ViTs on ImageNet, 300 epochs; 20-NN against the throughput in images/s on a V100. The figure is a plot: "
    "only the values that text and tables give are listed.",
    paper=vit_300,
    small=narrow,
    metrics=("20-NN", "linear", "throughput"),
    configurations=(
        _fig5("small", 16, 1007, knn=72.8, source="Table 7; "),
        _fig5("small", 8, 180),
        _fig5("small", 5, 44),
        _fig5("base", 16, 312),
        _fig5("base", 8, 63, knn=77.4, source="Table 2; "),
    ),
    conclusion="Smaller patches are much better, add no parameters, and are slower.",
)


def _fig6_small() -> Run:
    """Return `conv()` with an evaluation after every epoch: the figure shows the curves."""
    return edit(conv(), online_eval=dict(every_epochs=1))


FIG6 = Table(
    name="fig6",
    title="Fig. 6: teacher and student over time, and four teachers",
    protocol="ViT-S/16 on ImageNet, 300 epochs; 20-NN. Left: both networks during training. Right: at the end. The "
    "left figure is a plot: by eye about 67 (student) and 68 (teacher) after 100 epochs, 72.2 and 72.4 after 300.",
    paper=vit_300,
    small=_fig6_small,
    metrics=("20-NN", "student 20-NN"),
    curves=("20-NN", "student 20-NN", "loss"),
    evaluate_student=True,
    configurations=tuple(
        Configuration(teacher, title, {"method": {"teacher": teacher}}, paper=results(knn))
        for teacher, title, knn in (
            ("momentum", "momentum teacher", 72.8),
            ("student", "copy of the student", 0.1),
            ("previous-step", "student of the previous iteration", 0.1),
            ("previous-epoch", "student of the previous epoch", 66.6),
        )
    ),
    conclusion="The teacher is better than the student during the whole training. A teacher without momentum must at "
    "least be older than one step: a copy and the previous iteration fail, the previous epoch learns.",
)


def _fig7(name: str, title: str, targets: str, sharpening: bool, **more: Any) -> Configuration:
    return Configuration(name, title, {"method": {"targets": targets, "sharpening": sharpening}}, **more)


FIG7 = Table(
    name="fig7",
    title="Fig. 7: collapse without centering or without sharpening",
    protocol="H(P_t, P_s) = h(P_t) + KL(P_t || P_s) during training (Eq. 5). Entropy in percent of ln K, its maximum. "
    "The figure is a plot without numbers; the text gives the final values of the curves.",
    paper=vit_300,
    small=conv,
    metrics=("entropy", "kl", "20-NN"),
    curves=("teacher_entropy", "kl", "20-NN"),
    configurations=(
        _fig7("both", "centering and sharpening", "centering", True),
        _fig7(
            "sharpening",
            "sharpening only: no centering",
            "none",
            True,
            paper={"entropy": 0.0, "kl": 0.0},
            note="all images are assigned to one prototype",
        ),
        _fig7(
            "centering",
            "centering only: no sharpening",
            "centering",
            False,
            paper={"entropy": 100.0, "kl": 0.0},
            note="the targets are uniform over the prototypes",
        ),
    ),
    conclusion="KL falls to 0 in both failures; the entropy falls to 0 without centering and rises to ln K without "
    "sharpening. With both, neither happens.",
)

TABLES = [table for table in globals().values() if isinstance(table, Table)]
