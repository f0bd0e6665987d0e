"""20-NN accuracy on two kinds of synthetic images by features without training: the table of docs/scenes.md.

    python benchmarks/scenes.py --json docs/benchmarks/scenes.json

Images of part train vote for those of part val; percent, chance is 10. Raw pixels are those of every evaluation: RGB
at 16 x 16 with their mean subtracted. Random weights are the network of the preset `demo`, one for each seed.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

import dino_ssl
from common import about, save
from dino_ssl.data.synthetic.scenes import SIMPLE_SCENES, Scenes
from dino_ssl.evals.features import pixel_feature
from dino_ssl.evals.knn import KNN, knn_accuracy
from dino_ssl.presets import resolve

SEEDS = (0, 1, 2)
"""Seeds of the random weights."""


def color_histogram(image: np.ndarray) -> np.ndarray:
    """Return the square root of the histogram of 6 levels of each channel."""
    return np.sqrt(cv2.calcHist([image], [0, 1, 2], None, [6, 6, 6], [0, 256] * 3).ravel())


def laplacian_histogram(image: np.ndarray) -> np.ndarray:
    """Return the square root of the histogram of 64 levels of the Laplacian of the gray image, between -256 and 256."""
    laplacian = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_32F)
    return np.sqrt(np.histogram(laplacian.clip(-256, 255), 64, (-256, 256))[0].astype(np.float32))


FEATURES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw pixels": pixel_feature,
    "color histogram": color_histogram,
    "histogram of the Laplacian": laplacian_histogram,
}


def measure(scenes: Scenes, count: int) -> dict[str, list[float]]:
    """Return the accuracy in percent of each feature; of random weights, one for each seed."""
    parts = (replace(scenes, count=count).open(), replace(scenes, count=count // 2, part="val").open())
    images = [[part.read(i) for i in range(len(part))] for part in parts]
    train_labels, val_labels = (torch.tensor(part.labels) for part in parts)
    scores: dict[str, list[float]] = {}
    for name, feature in FEATURES.items():
        train, val = (F.normalize(torch.from_numpy(np.stack([feature(image) for image in part]))) for part in images)
        scores[name] = [knn_accuracy(train, train_labels, val, val_labels, (20,))["20-NN"]]
    for seed in SEEDS:
        torch.manual_seed(seed)
        network = resolve("demo").backbone.build(drop_path=0.0)
        values = dino_ssl.evaluate(network, KNN(k=(20,)), *parts, references=False)["values"]
        scores.setdefault("random weights", []).append(values["20-NN"])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="training images; half as many are evaluated")
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    results = {}
    for name, scenes in (("scenes", Scenes()), ("simple-scenes", SIMPLE_SCENES)):
        results[name] = measure(scenes, options.count)
        for feature, values in results[name].items():
            print(f"{name:16}{feature:28}{', '.join(f'{value:.1f}' for value in values)}")
    save(options.json, {"benchmark": "scenes", **about(vars(options)), "seeds": SEEDS, "20-NN": results})


if __name__ == "__main__":
    main()
