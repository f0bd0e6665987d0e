"""20-NN accuracy against wall-clock time, trained from scratch on a folder of pictures with class folders.

    python benchmarks/time_to_accuracy.py DATA --recipe small --minutes 30 --json curve.json

DATA holds train/ and val/. All of train/ is trained on, without its labels; every few minutes the teacher's
features of val/ are classified by their 20 nearest neighbours in train/. The clock counts everything but that
question. The number of epochs is what fits in the time at the speed measured at the start; training stops when
the time is over, wherever it is.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dino_ssl.config import edit, to_dict
from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import steps_per_epoch
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.knn import KNN
from dino_ssl.events import EpochDone, Logged, Started
from dino_ssl.presets.benchmark_step import measure
from dino_ssl.presets.schedule import short_schedule
from dino_ssl.presets.small import RECIPES
from dino_ssl.run import Run
from dino_ssl.runtime import machine, start
from dino_ssl.state import export_backbone
from dino_ssl.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--recipe", choices=list(RECIPES), default="small")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="minutes between two measurements")
    parser.add_argument("--images-per-second", type=float, help="speed to plan with, instead of measuring it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_accuracy"))
    parser.add_argument("--json", type=Path, help="write the curve here")
    options = parser.parse_args()
    console = Console()
    here = machine()
    dataset, val = (
        Folder(path=str(options.data / "train")).open(),
        Folder(path=str(options.data / "val")).open(),
    )
    run = RECIPES[options.recipe]()
    speed = measure(run, here, dataset)
    rate = options.images_per_second or 1 / speed.seconds(run, here, 1)
    epochs = max(1, round(60 * options.minutes * rate / len(dataset)))
    run = edit(
        run,
        data=Folder(path=str(options.data / "train")),
        optim=dict(epochs=epochs, warmup_epochs=min(run.optim.warmup_epochs, 0.1 * epochs)),
        online_eval=dict(every_epochs=0),
        precision=here.precision,
        cache=True,
        seed=options.seed,
        out=str(options.out / options.recipe),
    )
    threads = f"{torch.get_num_threads()} threads on {here.cores} cores"
    console.print(f"{here.name}, {threads}, {run.precision}, torch {torch.__version__}")
    console.print(f"{options.recipe}: {epochs} epochs planned at {rate:.0f} images/s")
    if options.recipe == "small":  # as the plan does
        run = short_schedule(run, epochs * steps_per_epoch(len(dataset), run.optim.batch_size))
    curve = follow(run, dataset, val, options.minutes, options.every, console)
    table = Table("minutes", "images", "epochs", "loss", "teacher entropy", "20-NN %", title=options.recipe)
    for point in curve:
        table.add_row(*map(shown, point.values()))
    console.print(table)
    if options.json:
        result = {
            "recipe": options.recipe,
            "run": to_dict(anywhere(run, options.data)),
            "curve": curve,
            "machine": f"{here.name}, {threads}",
            "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def anywhere(run: Run, data: Path) -> Run:
    """The run without the places of this machine: what the file tells is for others."""
    return edit(run, data=dict(path=f"{data.resolve().name}/train"), out=f"runs/time_to_accuracy/{Path(run.out).name}")


def shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else f"{value:,}"


def follow(run: Run, dataset, val, minutes: float, every: float, console: Console) -> list[dict]:
    """Trains for so many minutes and measures every few; the measuring is not on the clock."""
    curve, asked, next_at, loss, entropy = [], 0.0, 0.0, None, None
    with start(run.precision) as rt:
        knn = KNN(k=(20,)).prepare(
            (dataset, val),
            EvalContext(size=run.online_eval.size or run.views.global_size, device=rt.device, autocast=rt.autocast),
        )
        began, backbone = time.monotonic(), None
        for event in train(run, rt, dataset):
            if isinstance(event, Logged):
                loss, entropy = event.metrics["loss"], event.metrics["teacher_entropy"]
            if isinstance(event, Started):
                began, backbone = time.monotonic(), event.method.backbone
            elif not isinstance(event, Logged | EpochDone):
                continue
            spent = (time.monotonic() - began - asked) / 60
            over = spent >= minutes or event.clock.step == event.clock.steps
            if spent >= next_at or over:
                before = time.monotonic()
                accuracy = knn(backbone)["20-NN"]
                asked += time.monotonic() - before
                seen = event.clock.step * run.optim.batch_size
                curve.append(
                    dict(
                        minutes=spent,
                        dataset=seen,
                        epochs=seen / len(dataset),
                        loss=loss,
                        teacher_entropy=entropy,
                        accuracy=accuracy,
                    )
                )
                console.print(f"{spent:6.1f} min  {seen:>9,} pictures  20-NN {accuracy:.1f} %")
                next_at += every
            if over:
                export_backbone(run, backbone, Path(run.out))  # for the evaluations
                break
    return curve


if __name__ == "__main__":
    main()
