"""Attention of a trained ViT against random weights, image by image: Jaccard with the objects of VOC 2012 and DAVIS.

    python benchmarks/attention_paired.py runs/photos VOC2012 DAVIS --json docs/benchmarks/attention_paired.json

The evaluation is that of `dino eval attention-masks`, at 60 and 80 % of the attention: of the best head, and of the
mean over heads. An image is compared with the mean over networks with random weights. Every tenth frame of the DAVIS
sequences is used; an object is a label of its masks. The interval of the mean difference is a bootstrap over images, or
over the frames of one sequence, which are similar to each other: it then says nothing about other videos.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

import dino_ssl
from common import about, save
from dino_ssl.data.benchmarks.davis import open_davis
from dino_ssl.evals.attention_masks import AttentionMasks
from dino_ssl.loading import Checkpoint
from dino_ssl.models.backbone import Backbone
from dino_ssl.terminal import Terminal

FRAME_STEP = 10
MASSES = (0.6, 0.8)
FIELDS = {"best head": "best", "mean of heads": "mean"}
RESAMPLES = 10_000
Scores = dict[tuple[str, float], dict[str, float]]
"""Jaccard similarity of each image by the name of a field and the mass of the attention."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder or weights of a ViT")
    parser.add_argument("voc", type=Path, help="folder VOC2012")
    parser.add_argument("davis", type=Path, help="folder DAVIS")
    parser.add_argument("--seeds", type=int, default=5, help="networks with random weights")
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    trained = dino_ssl.load(options.checkpoint)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset in {"VOC": options.voc, **link_frames(options.davis, Path(folder))}.items():
            scores = per_image(trained, dataset)
            references = [per_image(random_network(trained, seed), dataset) for seed in range(options.seeds)]
            for key, values in scores.items():
                random = {image: statistics.fmean(each[key][image] for each in references) for image in values}
                rows.append({"data": name, "masks": key[0], "mass": key[1], **compare(values, random)})
    table = Table("data", "masks", "images", "trained", "random", "difference (95 %)", "images above")
    for row in rows:
        low, high = row["interval"]
        difference = f"{row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        cells = (f"{row['images']}", f"{row['trained']:.1f}", f"{row['random']:.1f}", difference, f"{row['above']}")
        table.add_row(row["data"], f"{row['masks']}, {row['mass']:.0%}", *cells)
    Terminal().console.print(table)
    save(options.json, {"benchmark": "attention_paired", **about(vars(options)), "rows": rows})


def link_frames(davis: Path, folder: Path) -> dict[str, Path]:
    """Return a folder in VOC's layout for each DAVIS sequence, with links to every tenth frame and its mask."""
    datasets = {}
    for clip in open_davis(davis):
        root = datasets[f"DAVIS, {clip.name}"] = folder / clip.name
        files = list(zip(clip.files, clip.annotations, strict=True))[::FRAME_STEP]
        for name, number in (("JPEGImages", 0), ("SegmentationClass", 1)):
            (root / name).mkdir(parents=True)
            for pair in files:
                (root / name / pair[number].name).symlink_to(pair[number].resolve())
        names = root / "ImageSets/Segmentation/val.txt"
        names.parent.mkdir(parents=True)
        names.write_text("".join(f"{frame.stem}\n" for frame, _ in files))
    return datasets


def random_network(trained: Backbone, seed: int) -> Backbone:
    """Return the network with random weights."""
    build = Checkpoint(source="", backbone=trained, folder=None).fresh
    assert build is not None
    torch.manual_seed(seed)
    return build().eval()


def per_image(network: Backbone, dataset: Path) -> Scores:
    """Return the Jaccard similarity of every image, in percent: the mean over its objects."""
    result = dino_ssl.evaluate(network, AttentionMasks(mass=MASSES), dataset, references=False, cache=False)
    objects: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in result["details"]["per object"]:
        for title, field in FIELDS.items():
            objects.setdefault((title, row["mass"]), {}).setdefault(row["image"], []).append(100 * row[field])
    return {key: {image: statistics.fmean(each) for image, each in images.items()} for key, images in objects.items()}


def compare(trained: dict[str, float], random: dict[str, float]) -> dict[str, float | list[float]]:
    """Return both means, the mean paired difference with its bootstrap interval, and the images with one above 0."""
    differences = np.array([trained[image] - random[image] for image in trained])
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    return {
        "images": len(differences),
        "trained": statistics.fmean(trained.values()),
        "random": statistics.fmean(random.values()),
        "difference": float(differences.mean()),
        "interval": np.quantile(means, (0.025, 0.975)).tolist(),
        "above": int((differences > 0).sum()),
    }


if __name__ == "__main__":
    main()
