"""Tune the learning rate of each configuration of a table on a held-out part of its training images.

    python benchmarks/learning_rates.py table7 imagenette128/train --only dino mse byol --epochs 6 --processes 2 \\
        --json docs/ablations/learning_rates-table7.json

Every configuration is trained at every rate for as many epochs and evaluated on a quarter of each class that is held
out of training, so that the validation set of the table has no part in the choice. The study of a rate is in
runs/learning_rates/RATE/; finished runs are kept and stopped ones resume if the command is repeated.
"""

import argparse
import os
from pathlib import Path

from rich.table import Table

from common import about, save
from dino_ssl.ablations.runner import run_parallel
from dino_ssl.ablations.study import Study, StudyRun, resolve_study
from dino_ssl.ablations.tables import get_table
from dino_ssl.config import edit
from dino_ssl.data.sources import dataset_config
from dino_ssl.terminal import Terminal

HELD_OUT = 0.25
"""Fraction of each class; of imagenette128/train 1,625 images, a standard error of 1.2 points."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="name of a table of dino ablate")
    parser.add_argument("data", help="training images, one folder per class")
    parser.add_argument("--rates", type=float, nargs="+", help="per 256 images; by default the base's / 3, x 1, x 3")
    parser.add_argument("--only", nargs="+", default=[], help="configurations; by default all")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rates"))
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    terminal, table = Terminal(), get_table(options.table)
    base, items = table.base("small"), table.select(options.only)
    rates = options.rates or [float(f"{factor * base.optim.lr:.2g}") for factor in (1 / 3, 1, 3)]
    accuracies: dict[str, dict[str, list[float]]] = {item.name: {} for item in items}
    for rate in rates:
        study = study_at(rate, options)
        runs = [StudyRun(study, item, seed) for seed in range(options.seeds) for item in items]
        stopped, num_failed = run_parallel(
            [run for run in runs if run.result is None], False, options.processes, terminal
        )
        if stopped is not None or num_failed:
            raise SystemExit(f"{num_failed} runs failed" if num_failed else "stopped: the same command resumes")
        for item in items:
            results = study.results(item)[: options.seeds]
            accuracies[item.name][f"{rate:g}"] = [result.values["20-NN"] for result in results]
    description = about(vars(options) | {"rates": rates, "data": Path(options.data).name})
    save(options.json, {"benchmark": "learning_rates", **description, "held_out": HELD_OUT, "20-NN": accuracies})
    shown = Table("configuration", *(f"{rate:g}" for rate in rates), title="20-NN of the held-out images, %")
    for name, by_rate in accuracies.items():
        shown.add_row(name, *(", ".join(f"{value:.1f}" for value in values) for values in by_rate.values()))
    terminal.console.print(shown)


def study_at(rate: float, options: argparse.Namespace) -> Study:
    """Return the table's study with another learning rate of its base."""
    table = get_table(options.table)
    study = resolve_study(
        table,
        "small",
        options.out / f"{rate:g}",
        preset=edit(table.base("small"), optim=dict(lr=rate), online_eval=dict(val_fraction=HELD_OUT)),
        data=dataset_config(options.data, "train"),
        epochs=options.epochs,
        workers=0,
        processes=options.processes,
    )
    study.write()
    return study


if __name__ == "__main__":
    main()
