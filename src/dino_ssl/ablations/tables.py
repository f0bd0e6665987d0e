"""The tables and figures of the paper's main text: Tables 7, 8 and 9, Figs. 5, 6 and 7; and all tables by name."""

from typing import Any

from dino_ssl.ablations.baselines import NO_MULTI_CROP, byol, method, moco, swav
from dino_ssl.ablations.bases import Changes, conv, longer, narrow, vit_100
from dino_ssl.ablations.table import Configuration, Table, row
from dino_ssl.ablations.tables_appendix import APPENDIX
from dino_ssl.config import edit
from dino_ssl.errors import UserError, did_you_mean

TABLE7 = Table(
    name="table7",
    title="Table 7: what matters in the method",
    configurations=(
        row("dino", "DINO", {}, 72.8, 76.1),
        row("no-momentum", "no momentum teacher", method(teacher="student"), 0.1, 0.1),
        row("sinkhorn", "Sinkhorn-Knopp instead of centering", method(targets="sinkhorn"), 72.2, 76.0),
        row("no-multi-crop", "no multi-crop", NO_MULTI_CROP, 67.9, 72.5),
        row("mse", "MSE instead of cross-entropy", method(loss="mse"), 52.6, 62.4),
        row("predictor", "with a predictor", method(predictor=True), 71.8, 75.6),
        byol("byol", "BYOL", 66.6, 71.4),
        moco("moco-v2", "MoCo-v2", 62.0, 71.6),
        swav("swav", "SwAV", 64.7, 71.8),
    ),
    note="Ten local crops: the result of DINO equals the last line of Table 8.",
    conclusion="Without the momentum teacher nothing is learned; multi-crop and cross-entropy matter most; "
    "Sinkhorn-Knopp and a predictor change little.",
)


def _table8(local: int, epochs: int, *paper: float | None) -> Configuration:
    crops = {"views": {"local": local}} if local else NO_MULTI_CROP
    title = f"2x224 + {local}x96" if local else "2x224"
    change = (lambda run: {**crops, **longer(3)(run)}) if epochs == 300 else crops
    return row(f"{local}-local-{epochs}", f"{title}, {epochs} epochs", change, *paper)


TABLE8 = Table(
    name="table8",
    title="Table 8: time, memory and accuracy by the number of crops",
    paper_base=vit_100,
    metrics=("linear", "20-NN", "hours", "memory"),
    configurations=(
        _table8(0, 100, 67.8, None, 15.3, 9.3),
        _table8(0, 300, 72.5, None, 45.9, 9.3),
        _table8(2, 100, 71.5, None, 17.0, 10.5),
        _table8(2, 300, 74.5, None, 51.0, 10.5),
        _table8(6, 100, 73.8, None, 20.3, 12.9),
        _table8(6, 300, 75.9, None, 60.9, 12.9),
        _table8(10, 100, 74.6, None, 24.2, 15.4),
        _table8(10, 300, 76.1, None, 72.6, 15.4),
    ),
    note="On two machines with 8 GPUs each; memory of one GPU.",
    conclusion="More crops reach the same accuracy in less time, at the cost of some memory.",
)


def _batch(size: int, **optim: Any) -> Changes:
    return {"optim": {"batch_size": size, **optim}, **NO_MULTI_CROP}


TABLE9 = Table(
    name="table9",
    title="Table 9: batch size",
    paper_base=vit_100,
    configurations=(
        *(
            row(str(size), f"batch {size}", _batch(size), knn, small=_batch(size // 8))
            for size, knn in ((128, 57.9), (256, 59.1), (512, 59.6), (1024, 59.9))
        ),
        row("8", "batch 8, half the epochs", lambda run: _batch(8, epochs=max(1, round(run.optim.epochs / 2))), 35.2),
    ),
    note="Learning rate 5e-4 x batch / 256. Batch 8: Sec. 5.5, after 50 epochs.",
    conclusion="Small batches lose little; a batch of 8 needs other settings and still learns.",
)

SMALL_PATCH = {16: 12, 8: 6, 5: 4}
"""Patch sizes at scale small, by the paper's: 16, 64 and 144 patches of a 48-pixel crop replace 196, 784 and 1936."""


def _fig5(size: str, patch: int, *paper: float | None) -> Configuration:
    change: dict[str, Any] = {"backbone": {"size": size, "patch": patch}}
    if patch == 5:  # 224 and 96 are not multiples of 5
        change["backbone"]["image_size"] = 225
        change["views"] = {"global_size": 225, "local_size": 95}
    small = {"patch": SMALL_PATCH[patch]} | ({"width": 256, "heads": 8} if size == "base" else {})
    name = f"{size[0]}{patch}"
    return row(name, f"ViT-{size[0].upper()}/{patch}", change, *paper, small={"backbone": small})


FIG5 = Table(
    name="fig5",
    title="Fig. 5: patch size",
    small_base=narrow,
    metrics=("20-NN", "linear", "throughput"),
    configurations=(
        _fig5("small", 16, 72.8, None, 1007),
        _fig5("small", 8, None, None, 180),
        _fig5("small", 5, None, None, 44),
        _fig5("base", 16, None, None, 312),
        _fig5("base", 8, 77.4, None, 63),
    ),
    note="Throughput in images/s on a V100. The figure is a plot: 20-NN is listed where Tables 2 and 7 give it.",
    conclusion="Smaller patches are much better, add no parameters, and are slower.",
)

FIG6 = Table(
    name="fig6",
    title="Fig. 6: teacher and student over time, and four teachers",
    small_base=lambda: edit(conv(), online_eval=dict(every_epochs=1)),  # the figure shows the curves
    metrics=("20-NN", "student 20-NN"),
    curves=("20-NN", "student 20-NN", "loss"),
    configurations=(
        row("momentum", "momentum teacher", method(teacher="momentum"), 72.8),
        row("student", "copy of the student", method(teacher="student"), 0.1),
        row("previous-step", "student of the previous iteration", method(teacher="previous-step"), 0.1),
        row("previous-epoch", "student of the previous epoch", method(teacher="previous-epoch"), 66.6),
    ),
    note="Left: both networks during training; a plot: by eye about 67 (student) and 68 (teacher) after 100 epochs, "
    "72.2 and 72.4 after 300. Right: at the end.",
    conclusion="The teacher is better than the student during the whole training. A teacher without momentum must at "
    "least be older than one step: a copy and the previous iteration fail, the previous epoch learns.",
)

FIG7 = Table(
    name="fig7",
    title="Fig. 7: collapse without centering or without sharpening",
    metrics=("entropy", "kl", "20-NN"),
    curves=("teacher_entropy", "kl", "20-NN"),
    configurations=(
        row("both", "centering and sharpening", {}),
        row("sharpening", "sharpening only: no centering", method(targets="none"), 0.0, 0.0),
        row("centering", "centering only: no sharpening", method(sharpening=False), 100.0, 0.0),
    ),
    note="H(P_t, P_s) = h(P_t) + KL(P_t || P_s) during training (Eq. 5). Entropy in percent of ln K, its maximum. The "
    "figure is a plot without numbers; the text gives the final values of the curves. Without centering all images are "
    "assigned to one prototype; without sharpening the targets are uniform over the prototypes.",
    conclusion="KL falls to 0 in both failures; the entropy falls to 0 without centering and rises to ln K without "
    "sharpening. With both, neither happens.",
)

TABLES = {table.name: table for table in (TABLE7, TABLE8, TABLE9, FIG5, FIG6, FIG7, *APPENDIX)}
"""All tables and figures that are reproduced, by the name of `dino ablate NAME`; main text first."""


def get_table(name: str) -> Table:
    """Return the table of this name. Raise UserError with similar names if there is none."""
    if name not in TABLES:
        raise UserError(f"Unknown table {name!r}{did_you_mean(name, TABLES)}\nTables: {', '.join(TABLES)}.")
    return TABLES[name]
