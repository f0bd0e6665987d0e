"""Draw the figures of synthetic images: the attention of the demo's network next to the objects, and scenes.

    python benchmarks/figures.py attention runs/demo        docs/images/attention.jpg; `make demo` trains runs/demo
    python benchmarks/figures.py scenes                     docs/images/scenes.jpg

The images are the first of the validation part: none is selected.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import dino_ssl
from dino_ssl.data.sources import WORDS
from dino_ssl.viz.rendering import INK, cutout, heat_map, save_image

FOLDER = Path(__file__).parents[1] / "docs/images"
COLUMNS, SIDE, GAP, LABEL = 10, 144, 6, 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["attention", "scenes"])
    parser.add_argument("run", nargs="?", default="runs/demo", help="folder of the run for attention")
    parser.add_argument("-o", "--out", type=Path, help="output file")
    options = parser.parse_args()
    image = attention(options.run) if options.figure == "attention" else scenes(rows=4)
    print(save_image(options.out or FOLDER / f"{options.figure}.jpg", image, quality=90))


def attention(run: str) -> np.ndarray:
    """Return images, their mean attention over the heads, the mask of 60 % of it, and the objects, row by row."""
    dataset = replace(WORDS["small-objects"], part="val", count=COLUMNS)
    maps = dino_ssl.attention(run, dataset)
    assert isinstance(maps, list)
    rows = {
        "image": [m.display for m in maps],
        "attention": [heat_map(m.mean, m.display.shape[:2]) for m in maps],
        "60 % of it": [cutout(m.display, m.mask) for m in maps],
        "object": [cutout(m.display, dataset.mask(i)) for i, m in enumerate(maps)],
    }
    page = Image.new("RGB", (LABEL + COLUMNS * (SIDE + GAP) - GAP, len(rows) * (SIDE + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(20)
    for row, (label, images) in enumerate(rows.items()):
        top = row * (SIDE + GAP)
        draw.text((0, top + SIDE / 2), label, INK, font, "lm")
        for column, image in enumerate(images):
            small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            page.paste(Image.fromarray(small), (LABEL + column * (SIDE + GAP), top))
    return np.asarray(page)


def scenes(rows: int) -> np.ndarray:
    """Return one scene of every class in each row."""
    dataset = replace(WORDS["scenes"], part="val", size=SIDE)
    images = [dataset.read(i) for i in range(rows * COLUMNS)]
    return np.concatenate([np.concatenate(images[i::COLUMNS], 0) for i in range(COLUMNS)], 1)


if __name__ == "__main__":
    main()
