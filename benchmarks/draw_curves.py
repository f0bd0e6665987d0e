"""Plot the results of time_to_accuracy.py: 20-NN accuracy against training images, a color for each file.

cd docs/benchmarks; python ../../benchmarks/draw_curves.py time_to_accuracy-small-half-an-hour.json \\
    time_to_accuracy-small-two-hours.json time_to_accuracy-small-resnet10-half-an-hour.json \\
    time_to_accuracy-small-64px.json time_to_accuracy-narrow-vit.json time_to_accuracy-narrow-vit-patches.json \\
    time_to_accuracy-vit-tiny.json -o ../images/time-to-accuracy.png

Images are the axis because the machines differ; the files have the minutes.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RAW_PIXELS = 35.6  # 20-NN on the validation set of imagenette128; tests/equations/test_knn.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, nargs="+", help="JSON files of time_to_accuracy.py")
    parser.add_argument("-o", "--out", type=Path, required=True, help="output figure")
    parser.add_argument("--reference", type=float, default=RAW_PIXELS, help="accuracy of raw pixels, a dashed line")
    options = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for number, path in enumerate(options.curves):
        label = path.stem.removeprefix("time_to_accuracy-").replace("-", " ")
        for i, entry in enumerate(json.loads(path.read_text())["curves"]):
            xs, ys = ([point[name] for point in entry["curve"]] for name in ("images", "accuracy"))
            axes.plot([x / 1000 for x in xs], ys, "o-", c=f"C{number}", ms=4, label=None if i else label)
    axes.axhline(options.reference, ls="--", c="0.5", lw=1, label="raw pixels")
    axes.set(xlabel="training images, thousands", ylabel="20-NN accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
