"""Attention of the same small ViT trained by DINO and with labels, on the same images: figure and Jaccard (Fig. 4).

    python benchmarks/attention_dino_supervised.py --json docs/benchmarks/attention_dino_supervised.json

The network, the images, the epochs and the optimizer are those of the demo. Supervised training has the labels, one
global crop per image, and no mixing of images. Random weights of the same seed are the reference. The Jaccard
similarity is that of `dino eval attention-masks` with `small-objects`, at 60 % of the attention: of the best head, and
of the mean over heads. Runs that are complete are not trained again.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dino_ssl
from common import about, save
from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import SMALL_OBJECTS
from dino_ssl.evals.attention_maps import attention_size
from dino_ssl.evals.attention_masks import AttentionMasks
from dino_ssl.files import has_checkpoint
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import load
from dino_ssl.presets.small import demo
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.training import train
from dino_ssl.viz.attention import attention_maps
from dino_ssl.viz.rendering import Panel, cutout, overlay, save_image, sheet

KINDS = ("dino", "supervised", "random weights")


def runs(base: Run, seed: int, out: Path) -> dict[str, Run]:
    """Return the two training runs of a seed."""
    base = edit(base, seed=seed, workers=0)
    method = SupervisedConfig(mixup=0.0, cutmix=0.0)
    return {
        "dino": edit(base, out=str(out / f"dino-{seed}")),
        "supervised": edit(base, method=method, views=dict(local=0), out=str(out / f"supervised-{seed}")),
    }


def trained(run: Run) -> Backbone:
    """Return the backbone of a run, which is trained first if it is not complete."""
    folder = Path(run.out)
    if not (folder / "complete").is_file():
        for _ in train(run, Runtime(torch.device("cpu"), "float32"), run.data.open(), resume=has_checkpoint(folder)):
            pass
        (folder / "complete").touch()
    return load(folder)


def networks(base: Run, seed: int, out: Path) -> dict[str, Backbone]:
    """Return the networks of a seed by kind."""
    result = {kind: trained(run) for kind, run in runs(base, seed, out).items()}
    torch.manual_seed(seed)
    return {**result, "random weights": base.backbone.build(drop_path=0.0).eval()}


def scores(network: Backbone, count: int) -> dict[str, float]:
    """Return the Jaccard similarity in percent of the best head and of the mean over heads."""
    dataset = replace(SMALL_OBJECTS, count=count, part="val").open()
    values = dino_ssl.evaluate(network, AttentionMasks(mass=(0.6,)), dataset, references=False)["values"]
    return {"best head": values["jaccard 60%"], "mean of heads": values["mean of heads 60%"]}


def draw(found: dict[str, Backbone], path: Path, count: int = 4) -> Path:
    """Draw the mean attention and its mask of each network, image by image."""
    dataset = replace(SMALL_OBJECTS, count=count, part="val").open()
    blocks: list[list[Panel]] = []
    for index in range(count):
        image, true = dataset.read(index), dataset.mask(index)
        panels: list[Panel] = [("image", image), ("object", cutout(image, true > 0))]
        for kind, network in found.items():
            (maps,) = attention_maps(network, image, size=attention_size(network.transform.size))
            panels += [(kind, overlay(image, maps.mean)), ("mask 60 %", cutout(image, maps.mask))]
        blocks.append(panels)
    return save_image(path, sheet(blocks), quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/dino-supervised"), help="folder of the runs")
    parser.add_argument("--figure", type=Path, default=Path("docs/images/dino-supervised.jpg"))
    parser.add_argument("--count", type=int, default=500, help="images for the Jaccard similarity")
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    result = compare(demo(), options.seeds, options.out, options.figure, options.count)
    save(options.json, {"benchmark": "attention_dino_supervised", **about(vars(options)), **result})


def compare(base: Run, seeds: list[int], out: Path, figure: Path, count: int) -> dict[str, Any]:
    """Return the scores of every seed and kind, print their means, and draw the networks of the first seed."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        found = networks(base, seed, out)
        if seed == seeds[0]:
            draw(found, figure)
        rows += [{"seed": seed, "network": kind, **scores(network, count)} for kind, network in found.items()]
        Console().print(json.dumps(rows[-3:], indent=1))
    table = Table("", "best head", "mean of heads", title="Jaccard in percent, mean and deviation over seeds")
    for kind in KINDS:
        values = [[row[name] for row in rows if row["network"] == kind] for name in ("best head", "mean of heads")]
        table.add_row(kind, *(f"{statistics.mean(each):.1f} ± {np.std(each):.1f}" for each in values))
    Console().print(table)
    return {"rows": rows}


if __name__ == "__main__":
    main()
