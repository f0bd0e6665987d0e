"""JPEG files to normalised crops on one core: this project, the authors' recipe, and lightly's.

Each row of the table is a size of files and of crops: 500 x 375 to 2x224 + 8x96, and 128 x 128 to 2x128 + 6x64. Each
candidate goes through the same files in turns (interleaved, so that a slow minute hits all alike), from the bytes on
the disk (in the page cache) to float32 tensors. Ours includes `normalize`, which training does on the device.

    python benchmarks/data.py [ROW ...] [--folder PHOTOS] [--json data.json]

Without a folder it writes JPEG files of its own: as many bytes a pixel as photos have. The `bench` group holds
lightly; where it is not installed its line is left out.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one core, for everybody

import cv2
import numpy as np
import PIL
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps

from dino_ssl.data.decode import decode
from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import sample_rng
from dino_ssl.data.transforms.eval import MEAN, STD, normalize
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.runtime import fastest_transform


@dataclass(frozen=True)
class Row:
    """What is measured: the files' width and height, and the crops made of them."""

    width: int
    height: int
    views: MultiCrop = field(default_factory=MultiCrop)

    @property
    def what(self) -> str:
        v = self.views
        return f"{self.width} x {self.height} to 2x{v.global_size} + {v.local}x{v.local_size}"


ROWS = {
    "500": Row(500, 375),
    "128": Row(128, 128, MultiCrop(global_size=128, local_size=64, local=6)),
}


def draw(folder: Path, number: int, width: int, height: int) -> list[Path]:
    """Smooth noise of several scales and hard-edged shapes: JPEG files as large as photos of this size."""
    rng = np.random.default_rng(0)
    files = []
    for name in range(number):
        image = np.full((height, width, 3), 128, np.float32)
        for cells, strength in ((4, 60), (16, 35), (64, 25), (width // 2, 20)):
            noise = rng.normal(size=(cells * 3 // 4, cells, 3)).astype(np.float32) * strength
            image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            center = (int(rng.integers(width)), int(rng.integers(height)))
            color = rng.integers(0, 256, 3).tolist()
            radius = int(rng.integers(width // 100, width // 6))
            cv2.circle(image, center, radius, color, -1 if rng.random() < 0.5 else 3)
        files.append(folder / f"{name}.jpg")
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


class PillowBlur:
    """The paper's blur as its authors do it: with a probability, by Pillow, with a radius from 0.1 to 2."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def solarize(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image) if random.random() < 0.2 else image


def pillow_recipe(views: MultiCrop) -> Callable[[Path], object]:
    """Sec. 3.1's views written with torchvision's transforms on Pillow pictures."""
    color = [
        T.RandomHorizontalFlip(0.5),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
    ]
    tensor = [T.ToTensor(), T.Normalize(MEAN, STD)]

    def crop(size: int, scale: tuple[float, float]) -> T.RandomResizedCrop:
        return T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC)

    first = T.Compose([crop(views.global_size, (0.4, 1.0)), *color, PillowBlur(1.0), *tensor])
    second = T.Compose([crop(views.global_size, (0.4, 1.0)), *color, PillowBlur(0.1), T.Lambda(solarize), *tensor])
    local = T.Compose([crop(views.local_size, (0.05, 0.4)), *color, PillowBlur(0.5), *tensor])

    def run(path: Path) -> object:
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
        return [first(image), second(image), *(local(image) for _ in range(views.local))]

    return run


def lightly_recipe(views: MultiCrop) -> Callable[[Path], object] | None:
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return None
    transform = DINOTransform(
        global_crop_size=views.global_size, local_crop_size=views.local_size, n_local_views=views.local
    )

    def run(path: Path) -> object:
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
        return transform(image)

    return run


def our_recipe(views: MultiCrop) -> Callable[[Path], object]:
    stacks, seen = [np.empty((n, side, side, 3), np.uint8) for n, side in views.view_shapes], count()
    made = fastest_transform(views)

    def run(path: Path) -> object:
        crops = iter(made(decode(path), sample_rng(0, 0, next(seen))))
        for stack in stacks:
            for place in stack:
                place[...] = next(crops)
        return [normalize(torch.from_numpy(stack).movedim(-1, -3)) for stack in stacks]

    return run


def measure(files: list[Path], views: MultiCrop, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image of each candidate, one number a round."""
    makers = {"pillow + torchvision": pillow_recipe, "lightly": lightly_recipe, "dino": our_recipe}
    found = {name: make(views) for name, make in makers.items()}
    candidates = {name: run for name, run in found.items() if run is not None}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-1, rounds):  # the first turn warms up
        for name, run in candidates.items():
            start = time.process_time()
            for file in files:
                run(file)
            if turn >= 0:
                times[name].append((time.process_time() - start) / len(files) * 1e3)
    return times


def machine() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, one used"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def measured(row: Row, files: list[Path], rounds: int) -> dict[str, Any]:
    """A row of the table, printed, and as it is written."""
    times = measure(files, row.views, rounds)
    kilobytes = statistics.median(file.stat().st_size for file in files) / 1e3
    print(f"\n{row.what}: {len(files)} files, median {kilobytes:.1f} kB; medians of {rounds} interleaved rounds")
    print(f"{'':24}{'ms/image':>10}{'images/s':>10}{'ratio':>8}")
    base, found = times["pillow + torchvision"], {}
    for name, each in times.items():
        ratio = statistics.median(b / t for b, t in zip(base, each, strict=True))
        ms = statistics.median(each)
        found[name] = {"ms": ms, "images_per_s": 1e3 / ms, "ratio": ratio}
        print(f"{name:24}{ms:10.2f}{1e3 / ms:10.1f}{ratio:8.2f}")
    return {"what": row.what, "files": len(files), "median_kB": kilobytes, "rounds": rounds, "results": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which of {', '.join(ROWS)}; all where none is named")
    parser.add_argument("--folder", help="JPEG files to take instead of drawn ones")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="where the result is written")
    options = parser.parse_args()
    for name in options.rows:
        if name not in ROWS:
            parser.error(f"there is no row {name}; expected {', '.join(ROWS)}")
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    print(machine())
    rows = {}
    for name in options.rows or ROWS:
        row = ROWS[name]
        with tempfile.TemporaryDirectory() as scratch:
            if options.folder:
                dataset = Folder(path=options.folder).open()
                files = [Path(options.folder) / name for name in dataset.names[: options.files]]
            else:
                files = draw(Path(scratch), options.files, row.width, row.height)
            rows[name] = measured(row, files, options.rounds)
    if options.json:
        about = {"machine": machine(), "day": time.strftime("%Y-%m-%d")}
        about |= {"torch": torch.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__}
        Path(options.json).write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
