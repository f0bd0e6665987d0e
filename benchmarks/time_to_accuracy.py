"""20-NN accuracy against wall-clock time, trained from scratch on images in class folders.

    python benchmarks/time_to_accuracy.py DATA --recipe small --minutes 30 --seeds 0 1 2 --json curves.json

DATA has the folders train/ and val/. Training uses train/ without its labels; every few minutes the features of val/
are classified by their 20 nearest neighbors in train/. The clock excludes these evaluations. The number of epochs is
what fits into the time at the speed measured before; training stops when the time is over. Seeds run one after
another; those that the output file has already are kept.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import about, save
from dino_ssl.config import edit, from_dict, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import steps_per_epoch
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.knn import KNN
from dino_ssl.events import EpochDone, Logged, Started
from dino_ssl.models.timm import Timm
from dino_ssl.presets.benchmark_step import measure
from dino_ssl.presets.plan import short_schedule
from dino_ssl.presets.small import narrow_vit, small, small_vit, vit_tiny
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, machine, start
from dino_ssl.state import export_backbone
from dino_ssl.training import train

RECIPES: dict[str, Callable[[], Run]] = {
    "vit-tiny": vit_tiny,
    "small": small,
    "small-vit": small_vit,
    "narrow-vit": narrow_vit,
    "resnet18d": lambda: edit(  # for a GPU: twice the width and depth of `small`
        small(),
        backbone=Timm(name="resnet18d"),
        views=dict(global_size=64, local_size=32),
        online_eval=dict(size=88),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--recipe", choices=list(RECIPES), default="small")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="minutes between two evaluations")
    parser.add_argument("--workers", type=int, default=1, help="processes that load images; 0: the training process")
    parser.add_argument("--images-per-second", type=float, help="expected speed; measured by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_accuracy"))
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    console, device_info = Console(), machine()
    train_set, val_set = (Folder(path=str(options.data / name)).open() for name in ("train", "val"))
    length = dict(minutes=options.minutes, images_per_second=options.images_per_second)
    run = plan(options.recipe, options.data / "train", train_set, device_info, workers=options.workers, **length)
    curves = {entry["seed"]: entry for entry in known_curves(options.json, run)}
    for seed in sorted({*options.seeds} - curves.keys()):
        console.print(f"{options.recipe}, seed {seed}: {run.optim.epochs} epochs, {run.precision}")
        seeded = edit(run, seed=seed, out=str(options.out / options.recipe / f"seed{seed}"))
        curve = list(train_and_evaluate(seeded, train_set, val_set, options.minutes, options.every, console))
        table = Table("minutes", "images", "epochs", "loss", "teacher entropy", "20-NN %", title=f"seed {seed}")
        for point in curve:
            table.add_row(*map(format_cell, point.values()))
        console.print(table)
        description = about(vars(options))
        provenance = {name: description[name] for name in ("date", "machine")}
        curves[seed] = {"seed": seed, **provenance, "run": portable(seeded), "curve": curve}
        entries = [curves[known] for known in sorted(curves)]
        description["machine"] = "; ".join(dict.fromkeys(entry["machine"] for entry in entries))
        save(options.json, {"benchmark": "time_to_accuracy", **description, "curves": entries})


def portable(run: Run) -> dict[str, Any]:
    """Return the settings without paths of this machine."""
    assert isinstance(run.data, Folder)
    data = Path(run.data.path)
    anywhere = f"{data.resolve().parent.name}/{data.name}"
    return to_dict(edit(run, data=dict(path=anywhere), out="runs/time_to_accuracy"))


def known_curves(path: Path | None, run: Run) -> list[dict[str, Any]]:
    """Return the curves of an existing output file; exit if their settings differ in more than seed and length."""
    entries = json.loads(path.read_text())["curves"] if path and path.is_file() else []
    now = portable(run)
    for entry in entries:
        known = to_dict(from_dict(Run, entry["run"]))  # with the defaults of fields that are newer than the file
        if any(known[name] != now[name] for name in ("data", "backbone", "method", "views", "online_eval")):
            raise SystemExit(f"{path} has runs with other settings: expected another file for --json")
        if "machine" not in entry:
            raise SystemExit(f"{path} has a curve without a machine: expected another file for --json")
    return entries


def plan(
    recipe: str,
    folder: Path,
    train_set: ImageDataset,
    device_info: Machine,
    *,
    minutes: float,
    workers: int,
    images_per_second: float | None = None,
) -> Run:
    """Return the recipe with as many epochs as fit into the time, at the speed of this machine by default."""
    run = edit(
        RECIPES[recipe](),
        data=Folder(path=str(folder)),
        online_eval=dict(every_epochs=0),
        precision=device_info.precision,
        workers=workers,
        cache=True,
    )
    speed = images_per_second or 1 / measure(run, device_info, train_set).seconds(run, device_info, 1)
    epochs = max(1, round(60 * minutes * speed / len(train_set)))
    run = edit(run, optim=dict(epochs=epochs, warmup_epochs=min(run.optim.warmup_epochs, 0.1 * epochs)))
    if recipe != "small":
        return run
    return short_schedule(run, epochs * steps_per_epoch(len(train_set), run.optim.batch_size))  # as `dino train` does


def format_cell(value: float | int | None) -> str:
    """Return a number as text; - for None."""
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else f"{value:,}"


def train_and_evaluate(
    run: Run, train_set: ImageDataset, val_set: ImageDataset, minutes: float, every: float, console: Console
) -> Iterator[dict[str, Any]]:
    """Train for some minutes and evaluate every few; yield the points of the curve. Evaluation time is not counted."""
    eval_seconds, next_at, loss, entropy = 0.0, 0.0, None, None
    with start(run.precision) as rt:
        context = EvalContext(
            size=run.online_eval.size or run.views.global_size, device=rt.device, autocast=rt.autocast
        )
        knn = KNN(k=(20,)).prepare_datasets(train_set, val_set, context)
        began, backbone = time.monotonic(), None
        for event in train(run, rt, train_set):
            if isinstance(event, Logged):
                loss, entropy = event.metrics["loss"], event.metrics["teacher_entropy"]
            if isinstance(event, Started):
                began, backbone = time.monotonic(), event.method.backbone
            elif not isinstance(event, Logged | EpochDone):
                continue
            spent = (time.monotonic() - began - eval_seconds) / 60
            is_over = spent >= minutes or event.clock.step == event.clock.steps
            if spent >= next_at or is_over:
                before = time.monotonic()
                accuracy = knn(backbone)["20-NN"]
                eval_seconds += time.monotonic() - before
                num_images = event.clock.step * run.optim.batch_size
                console.print(f"{spent:6.1f} min  {num_images:>9,} images  20-NN {accuracy:.1f} %")
                yield dict(
                    minutes=spent,
                    images=num_images,
                    epochs=num_images / len(train_set),
                    loss=loss,
                    teacher_entropy=entropy,
                    accuracy=accuracy,
                )
                next_at += every
            if is_over:
                export_backbone(run, backbone, "last")  # for other evaluations
                return
    raise SystemExit("stopped before the end of the training")


if __name__ == "__main__":
    main()
