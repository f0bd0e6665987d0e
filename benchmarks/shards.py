"""Reading images in shuffled order: from a folder, and from shards of it, interleaved in one run.

    python benchmarks/shards.py photos/ --rounds 9 --json docs/benchmarks/shards.json

`open` is the time until the first image can be read, divided by the number of images. `read` gives the files' bytes,
`decode` decodes them too; both go through batches in the order of an epoch, as a worker of the loader does. `warm`: the
files are in the page cache. `cold`: they were dropped from it before (not the folder's directory entries, which favours
the folder). Without a folder, JPEG files are drawn. One process, one thread; milliseconds per image, medians over the
rounds; `times` has every round. `ratio` is the median of the folder's time divided by the other's in the same round.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from common import about, median_ratio, ratios, save, spread
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import epoch_order
from dino_ssl.data.shard_writer import pack

Read = Callable[[int], object]


def draw(folder: Path, count: int, side: int) -> Path:
    """Write JPEG files of smoothed noise, about as long as photographs of their size."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        noise = rng.integers(0, 256, (side // 4, side // 3, 3), dtype=np.uint8)
        image = cv2.resize(noise, (side * 4 // 3, side), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{index:06}.jpg"), image)
    return folder


def drop_from_cache(folder: Path) -> None:
    """Drop the files below a folder from the page cache, after their content has reached the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def batches(count: int, epoch: int, size: int) -> Iterator[np.ndarray]:
    order = epoch_order(0, epoch, count)
    return (order[at : at + size] for at in range(0, count, size))


def read_epoch(dataset: ImageDataset, read: Read, epoch: int, size: int, prefetch: bool) -> float:
    """Return the milliseconds per image of one epoch."""
    start = time.perf_counter()
    for indices in batches(len(dataset), epoch, size):
        if prefetch:
            dataset.prefetch(indices)
        for index in indices.tolist():
            read(index)
    return 1e3 * (time.perf_counter() - start) / len(dataset)


def measure(paths: dict[str, Path], rounds: int, batch: int) -> dict[str, dict[str, list[float]]]:
    """Return {measurement: {candidate: milliseconds per image in each round}}."""
    datasets = {name: Folder(path=str(path)).open() for name, path in paths.items()}
    files, shards = datasets["folder"], datasets["shards"]
    candidates: dict[str, dict[str, tuple[str, Read, bool]]] = {
        "read": {
            "folder": ("folder", files.encoded, False),
            "shards, no prefetch": ("shards", shards.encoded, False),
            "shards": ("shards", shards.encoded, True),
        },
        "decode": {"folder": ("folder", files.read, False), "shards": ("shards", shards.read, True)},
    }
    times: dict[str, dict[str, list[float]]] = {}

    def add(measurement: str, name: str, value: float, turn: int) -> None:
        if turn >= 0:  # the first turn is a warm-up
            times.setdefault(measurement, {}).setdefault(name, []).append(value)

    for turn in range(-1, rounds):
        for state in ("warm", "cold"):
            for name, path in paths.items():
                if state == "cold":
                    drop_from_cache(path)
                start = time.perf_counter()
                count = len(Folder(path=str(path)).open())
                add(f"open, {state}", name, 1e3 * (time.perf_counter() - start) / count, turn)
            for kind, group in candidates.items():
                for name, (source, read, prefetch) in group.items():
                    if state == "cold":
                        drop_from_cache(paths[source])
                    time_ms = read_epoch(datasets[source], read, turn + 1, batch, prefetch)
                    add(f"{kind}, {state}", name, time_ms, turn)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="images to read instead of drawn ones")
    parser.add_argument("--count", type=int, default=2000, help="number of drawn images")
    parser.add_argument("--side", type=int, default=240, help="their short side in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", help="folder on the disk to be measured, for the shards and the drawn files")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(options.folder or draw(Path(scratch) / "drawn", options.count, options.side))
        paths = {"folder": folder, "shards": Path(scratch) / "shards"}
        start = time.perf_counter()
        dataset = pack(folder, paths["shards"])
        pack_ms = 1e3 * (time.perf_counter() - start) / len(dataset)
        times = measure(paths, options.rounds, options.batch)
    kilobytes = float(np.mean(dataset.index["length"])) / 1e3
    description = about(vars(options))
    print(f"{description['machine']}; {len(dataset)} images of {kilobytes:.1f} kB; batches of {options.batch}")
    print(f"medians of {options.rounds} interleaved rounds; packing took {pack_ms:.3f} ms per image, once")
    print(f"{'':42}{'ms/image':>12}{'ratio':>8}")
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for measurement, candidates in times.items():
        rows[measurement] = {
            name: {
                "ms": statistics.median(values),
                "ratio": median_ratio(candidates["folder"], values),
                "times": values,
            }
            for name, values in candidates.items()
        }
        for name, row in rows[measurement].items():
            ratio = spread(ratios(candidates["folder"], row["times"]))
            print(f"{measurement:16}{name:26}{row['ms']:12.4f}    {ratio}")
    result = {"images": len(dataset), "kB": kilobytes, "packing_ms": pack_ms, "results": rows}
    save(options.json, {"benchmark": "shards", **description, **result})


if __name__ == "__main__":
    main()
