"""Tune the learning rate of each configuration of a table on a held-out part of its training images.

    python benchmarks/learning_rates.py table7 imagenette128/train --only dino mse byol --processes 2 \\
        --json docs/ablations/learning_rates-table7.json

Every configuration is trained at every rate, as long as in `dino ablate`, and evaluated on a quarter of each class that
is held out of training. So the validation set that `dino ablate --val` is given has no part in the choice. The runs
are in runs/learning_rates/RATE/CONFIGURATION/; finished ones are kept and stopped ones resume if the command is
repeated. A run that fails, because its loss is not finite for example, has the accuracy null.
"""

import argparse
import math
import os
from pathlib import Path

import torch
from rich.table import Table

from common import about, save
from dino_ssl.ablations.bases import IMAGES_SEEN, learning_rate
from dino_ssl.ablations.runner import run_parallel
from dino_ssl.ablations.study import StudyRun, resolve_study
from dino_ssl.ablations.table import Configuration
from dino_ssl.ablations.tables import get_table
from dino_ssl.config import edit
from dino_ssl.data.sources import dataset_config
from dino_ssl.presets.plan import num_train_images
from dino_ssl.run import Run
from dino_ssl.terminal import Terminal

HELD_OUT = 0.25
"""Fraction of each class; of imagenette128/train 1,625 images, a standard error of 1.2 points."""

Accuracies = dict[str, dict[str, list[float | None]]]
"""20-NN in percent of each seed, by configuration and rate; None if the run failed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="name of a table of dino ablate")
    parser.add_argument("data", help="training images, one folder per class")
    parser.add_argument("--rates", type=float, nargs="+", help="per 256 images; by default the base's / 3, x 1, x 3")
    parser.add_argument("--only", nargs="+", default=[], help="configurations; by default all")
    parser.add_argument("--epochs", type=int, help=f"by default {IMAGES_SEEN:,} images, as in dino ablate")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rates"))
    parser.add_argument("--json", type=Path, help="output file, written after each rate")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs
    torch.set_num_threads(1)
    table, terminal = get_table(options.table), Terminal()
    base = edit(
        table.base("small"), data=dataset_config(options.data, "train"), online_eval=dict(val_fraction=HELD_OUT)
    )
    items, dataset = table.select(options.only), base.data.open()
    if dataset.labels is None:
        raise SystemExit(f"{options.data}: expected one folder per class, found images without labels")
    epochs = options.epochs or max(1, round(IMAGES_SEEN / num_train_images(base, dataset)))
    rates = options.rates or [float(f"{factor * base.optim.lr:.2g}") for factor in (1 / 3, 1, 3)]
    accuracies: Accuracies = {item.name: {} for item in items}
    folder = Path(options.data)
    data = "/".join(folder.resolve().parts[-2:]) if folder.exists() else options.data
    description = about(vars(options) | {"rates": rates, "data": data}) | {"precision": base.precision}
    for rate in rates:
        runs = {item.name: runs_at(rate, item, base, epochs, options) for item in items}
        pending = [run for seed in zip(*runs.values(), strict=True) for run in seed if run.result is None]
        with terminal.show_log():
            stopped, _ = run_parallel(pending, False, options.processes, terminal)
        if stopped is not None:
            print("Stopped: the same command resumes.")
            return 128 + stopped
        for name, seeds in runs.items():
            accuracies[name][f"{rate:g}"] = [run.result and run.result.values["20-NN"] for run in seeds]
        save(options.json, {"benchmark": "learning_rates", **description, "held_out": HELD_OUT, "20-NN": accuracies})
    shown = Table("configuration", *(f"{rate:g}" for rate in rates), title="20-NN of the held-out images, %")
    for name, by_rate in accuracies.items():
        shown.add_row(name, *(", ".join(map(format_accuracy, values)) for values in by_rate.values()))
    terminal.console.print(shown)
    return int(any(None in values for by_rate in accuracies.values() for values in by_rate.values()))


def runs_at(rate: float, item: Configuration, base: Run, epochs: int, options: argparse.Namespace) -> list[StudyRun]:
    """Return the runs of a configuration at this rate, one per seed; exit if the table sets the rate itself."""
    study = resolve_study(
        get_table(options.table),
        "small",
        options.out / f"{rate:g}" / item.name,
        preset=edit(base, **learning_rate(rate / item.small_lr)(base)),
        epochs=epochs,
        workers=0,
        processes=options.processes,
    )
    study.write()
    runs = [StudyRun(study, item, seed) for seed in range(options.seeds)]
    if not math.isclose(actual := runs[0].run.optim.lr, rate):
        raise SystemExit(f"{item.name}: the table sets its learning rate itself, {actual:g}")
    return runs


def format_accuracy(value: float | None) -> str:
    """Return an accuracy as text."""
    return "failed" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
