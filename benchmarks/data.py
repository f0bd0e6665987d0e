"""JPEG files to 2x224 + 8x96 normalised crops on one core: this project, the authors' recipe, and lightly's.

Each candidate goes through the same files in turns (interleaved, so that a slow minute hits all alike), from
the bytes on the disk (in the page cache) to float32 tensors. Ours includes `normalize`, which training does
on the device.

    python benchmarks/data.py [--folder PHOTOS] [--json data.json]

Without a folder it writes JPEG files of 500 x 375 of its own, of 50 to 100 kB. The `bench` group holds
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
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one core, for everybody

import cv2
import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps

from dino.data.decode import decode
from dino.data.folder import Folder
from dino.data.views import MEAN, STD, MultiCrop, normalize, planar


def draw(folder: Path, count: int) -> list[Path]:
    """Smooth noise of several scales and hard-edged shapes: JPEG files as large as photos of this size."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        image = np.full((375, 500, 3), 128, np.float32)
        for cells, strength in ((4, 60), (16, 35), (64, 25), (250, 20)):
            noise = rng.normal(size=(cells * 3 // 4, cells, 3)).astype(np.float32) * strength
            image += cv2.resize(noise, (500, 375), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            center = (int(rng.integers(500)), int(rng.integers(375)))
            color = rng.integers(0, 256, 3).tolist()
            cv2.circle(image, center, int(rng.integers(5, 80)), color, -1 if rng.random() < 0.5 else 3)
        files.append(folder / f"{number}.jpg")
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


def pillow_recipe() -> Callable[[Path], object]:
    """Sec. 3.1's views written with torchvision's transforms on Pillow pictures."""
    color = [
        T.RandomHorizontalFlip(0.5),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
    ]
    tensor = [T.ToTensor(), T.Normalize(MEAN, STD)]

    def crop(size: int, scale: tuple[float, float]) -> T.RandomResizedCrop:
        return T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC)

    first = T.Compose([crop(224, (0.4, 1.0)), *color, PillowBlur(1.0), *tensor])
    second = T.Compose([crop(224, (0.4, 1.0)), *color, PillowBlur(0.1), T.Lambda(solarize), *tensor])
    local = T.Compose([crop(96, (0.05, 0.4)), *color, PillowBlur(0.5), *tensor])

    def run(path: Path) -> object:
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
        return [first(image), second(image), *(local(image) for _ in range(8))]

    return run


def lightly_recipe() -> Callable[[Path], object] | None:
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return None
    transform = DINOTransform(n_local_views=8)

    def run(path: Path) -> object:
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
        return transform(image)

    return run


def our_recipe() -> Callable[[Path], object]:
    views, rng = MultiCrop(), np.random.default_rng(0)
    large, small = np.empty((2, 3, 224, 224), np.uint8), np.empty((8, 3, 96, 96), np.uint8)

    def run(path: Path) -> object:
        crops = views(decode(path), rng)
        planar(crops[:2], large)
        planar(crops[2:], small)
        return normalize(torch.from_numpy(large)), normalize(torch.from_numpy(small))

    return run


def measure(files: list[Path], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image of each candidate, one number a round."""
    found = {"pillow + torchvision": pillow_recipe(), "lightly": lightly_recipe(), "dino": our_recipe()}
    candidates = {name: run for name, run in found.items() if run is not None}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-1, rounds):  # the first turn warms up
        for name, run in candidates.items():
            start = time.perf_counter()
            for file in files:
                run(file)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / len(files) * 1e3)
    return times


def machine() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, one used"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="JPEG files to take instead of drawn ones")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="where the result is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if options.folder:
            pictures = Folder(path=options.folder).open()
            files = [Path(options.folder) / name for name in pictures.names[: options.files]]
        else:
            files = draw(Path(scratch), options.files)
        kilobytes = statistics.median(file.stat().st_size for file in files) / 1e3
        times = measure(files, options.rounds)
    base = times["pillow + torchvision"]
    rows = {}
    print(f"{machine()}; {len(files)} files, median {kilobytes:.0f} kB; medians of {options.rounds} interleaved rounds")
    print(f"{'':24}{'ms/image':>10}{'images/s':>10}{'ratio':>8}")
    for name, each in times.items():
        ratio = statistics.median(b / t for b, t in zip(base, each, strict=True))
        rows[name] = {
            "ms": statistics.median(each),
            "images_per_s": 1e3 / statistics.median(each),
            "ratio": ratio,
        }
        print(f"{name:24}{rows[name]['ms']:10.2f}{rows[name]['images_per_s']:10.1f}{ratio:8.2f}")
    if options.json:
        about = {"machine": machine(), "files": len(files), "median_kB": kilobytes, "rounds": options.rounds}
        about |= {"torch": torch.__version__, "opencv": cv2.__version__, "pillow": Image.__version__}
        Path(options.json).write_text(json.dumps({**about, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
