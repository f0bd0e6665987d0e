"""Small datasets: `dino train --minutes` on a few hundred or thousand images, compared with its reference scores.

    python benchmarks/small_datasets.py --images 200 500 2000 --minutes 30 --dataset DATA --json small_datasets.json

DATA has the folders train/ and val/ (or validation/, or test/) with a folder per class. The training images are an
equal number per class of train/, linked into a temporary folder; every run is evaluated on the same validation images.
The command is that of a user: without settings, for a time. `--images-seen 90000` instead of `--minutes` trains for the
epochs that show so many images, which does not depend on what else runs on the machine. `warning` is what the plan says
before training. With `--work DIR`, the runs are kept, and the same command resumes an interrupted one.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from common import about, save
from dino_ssl.data.folder import Folder
from dino_ssl.files import has_checkpoint

COLUMNS = ("last", "best", "raw_pixels", "random_weights", "epochs", "minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--images", type=int, nargs="+", default=[200, 500, 2000], help="numbers of training images")
    parser.add_argument("--val-images", type=int, default=1500, help="largest number of validation images")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--images-seen", type=int, help="images in all epochs of a run, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of the run")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    console = Console(width=120)
    val = next(path for name in ("val", "validation", "test") if (path := options.dataset / name).is_dir())
    runs = []
    for count in options.images:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.work / f"{options.dataset.name}-{count}" if options.work else Path(temporary)
            link(options.dataset / "train", folder / "train", count, options.seed)
            link(val, folder / "val", options.val_images, options.seed)
            seen = options.images_seen
            length = ["--epochs", round(seen / count)] if seen else ["--minutes", options.minutes]
            runs.append(train(folder, length, options.seed))
        console.print_json(data=runs[-1])
        save(options.json, {"benchmark": "small_datasets", **about(vars(options)), "runs": runs})
    length = f"{options.images_seen:,} images seen" if options.images_seen else f"{options.minutes:g} minutes"
    table = Table("images", *COLUMNS, "warning", title=f"{options.dataset.name}, {length}")
    for run in runs:
        table.add_row(f"{run['images']:,}", *(f"{run[name]:.1f}" for name in COLUMNS), run["warning"])
    console.print(table)


def link(source: Path, folder: Path, count: int, seed: int) -> None:
    """Link `count` images of a folder of classes, equally many of each class if possible, into another folder."""
    dataset = Folder(path=str(source)).open()
    assert dataset.labels is not None, f"expected class folders in {source}"
    rng, taken = np.random.default_rng(seed), 0
    classes = [rng.permutation(np.flatnonzero(dataset.labels == label)) for label in range(len(dataset.classes))]
    for number, images in enumerate(sorted(classes, key=len)):  # small classes first: the others fill up
        share = math.ceil((count - taken) / (len(classes) - number))
        for name in (dataset.names[int(index)] for index in images[:share]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).is_symlink():
                (folder / name).symlink_to((source / name).resolve())
        taken += min(share, len(images))


def train(folder: Path, length: Sequence[Any], seed: int) -> dict[str, Any]:
    """Run `dino train` on the folder; return its last and best accuracy in percent, and its reference scores."""
    data = [folder / "train", "--val", folder / "val", *length, "--seed", seed]
    options = ["--resume", folder / "run"] if has_checkpoint(folder / "run") else [*data, "--out", folder / "run"]
    command = [sys.executable, "-m", "dino_ssl", "train", *options, "--json"]
    began = time.monotonic()
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    result, spent = json.loads(done.stdout), time.monotonic() - began
    plan = {row["name"]: row for row in json.loads((folder / "run/plan.json").read_text())["plan"]}
    described = json.loads((folder / "run/run.json").read_text())
    name = result["best"]["name"]
    return {
        "images": described["data"]["trained_on"],
        "last": result["quality"][name],
        "best": result["best"]["value"],
        **{reference: scores[name] for reference, scores in result["reference_scores"].items()},
        "epochs": result["epochs"],
        "steps": result["steps"],
        "minutes": spent / 60,
        "corrected": described.get("corrected"),
        "warning": plan["warning"]["value"] if "warning" in plan else "",
    }


if __name__ == "__main__":
    main()
