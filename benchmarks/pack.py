"""Reading pictures in shuffled order: from a folder, and from a pack of it, the candidates taking turns in one run.

    python benchmarks/pack.py photos/ --json docs/benchmarks/pack.json

`open` is the time until the first picture can be read, for each picture of the set. `read` gives the files' bytes,
`picture` decodes them too; both go through batches in an epoch's own order, as a worker of the loader does. `warm`: the
system has the files in memory. `cold`: it was told to forget their bytes before each turn (it still knows the folder's
entries, which is in the folder's favour). Without a folder, JPEG files are drawn. One process, one thread; milliseconds
for each picture, medians over the rounds; `ratio` is the folder's time over the other's, in the same round.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder, FolderDataset
from dino_ssl.data.loader import epoch_order
from dino_ssl.data.pack import PackedDataset, open_pack
from dino_ssl.data.packing import Packing

Read = Callable[[int], object]


def draw(folder: Path, count: int, side: int) -> Path:
    """JPEG files of smoothed noise, about as long as photographs of their size."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        noise = rng.integers(0, 256, (side // 4, side // 3, 3), dtype=np.uint8)
        picture = cv2.resize(noise, (side * 4 // 3, side), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{index:06}.jpg"), picture)
    return folder


def forget(folder: Path) -> None:
    """Asks the system to drop what it has of these files in memory; what was written must be on the disk for that."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def batches(count: int, epoch: int, size: int) -> Iterator[np.ndarray]:
    order = epoch_order(0, epoch, count)
    return (order[at : at + size] for at in range(0, count, size))


def pass_over(dataset: ImageDataset, read: Read, epoch: int, size: int, ahead: bool) -> float:
    """Milliseconds a picture of one epoch."""
    start = time.perf_counter()
    for indices in batches(len(dataset), epoch, size):
        if ahead:
            dataset.prefetch(indices)
        for index in indices.tolist():
            read(index)
    return 1e3 * (time.perf_counter() - start) / len(dataset)


def measure(folder: Path, pack: Path, rounds: int, batch: int) -> dict[str, dict[str, list[float]]]:
    """{what is measured: {candidate: milliseconds a picture, one number a round}}."""
    files, packed = Folder(path=str(folder)).open(), open_pack(pack)
    assert isinstance(files, FolderDataset)
    bytes_of: dict[str, tuple[ImageDataset, Read, bool]] = {
        "folder": (files, lambda index: Path(files.root, files.names[index]).read_bytes(), False),
        "pack, nothing read ahead": (packed, packed.encoded, False),
        "pack": (packed, packed.encoded, True),
    }
    decoded: dict[str, tuple[ImageDataset, Read, bool]] = {
        "folder": (files, files.read, False),
        "pack": (packed, packed.read, True),
    }
    found: dict[str, dict[str, list[float]]] = {}

    def add(what: str, name: str, value: float, turn: int) -> None:
        if turn >= 0:  # the first turn warms up
            found.setdefault(what, {}).setdefault(name, []).append(value)

    for turn in range(-1, rounds):
        for cold in (False, True):
            state = "cold" if cold else "warm"
            for name, place in (("folder", folder), ("pack", pack)):
                if cold:
                    forget(place)
                start = time.perf_counter()
                count = len(Folder(path=str(place)).open())
                add(f"open, {state}", name, 1e3 * (time.perf_counter() - start) / count, turn)
            for kind, candidates in (("read", bytes_of), ("picture", decoded)):
                for name, (dataset, read, ahead) in candidates.items():
                    if cold:
                        forget(pack if isinstance(dataset, PackedDataset) else folder)
                    add(f"{kind}, {state}", name, pass_over(dataset, read, turn + 1, batch, ahead), turn)
    return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="pictures to take instead of drawn ones")
    parser.add_argument("--count", type=int, default=2000, help="pictures that are drawn")
    parser.add_argument("--side", type=int, default=240, help="their short side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", help="folder on the disk to be measured, for the pack and the drawn files")
    parser.add_argument("--json", help="where the result is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(options.folder or draw(Path(scratch) / "drawn", options.count, options.side))
        pack = Path(scratch) / "pack.ds"
        start = time.perf_counter()
        with Packing(str(folder), str(pack)) as job:
            job.look()
            about = job.write()
        packing = 1e3 * (time.perf_counter() - start) / about.dataset
        found = measure(folder, pack, options.rounds, options.batch)
    kilobytes = sum(about.files[name] for name in about.data) / about.dataset / 1e3
    described = f"{processor()}, {os.cpu_count()} cores, one used"
    print(f"{described}; {about.dataset} pictures of {kilobytes:.1f} kB; batches of {options.batch}")
    print(f"medians of {options.rounds} interleaved rounds; packing took {packing:.3f} ms a picture, once")
    print(f"{'':42}{'ms/picture':>12}{'ratio':>8}")
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for what, times in found.items():
        for name, each in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["folder"], each, strict=True))
            rows.setdefault(what, {})[name] = {"ms": statistics.median(each), "ratio": ratio}
            print(f"{what:16}{name:26}{statistics.median(each):12.4f}{ratio:8.2f}")
    if options.json:
        told = {"machine": described, "images": about.dataset, "kB": kilobytes, "batch": options.batch}
        told |= {"rounds": options.rounds, "packing_ms": packing, "results": rows}
        Path(options.json).write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
