"""Indexing and search: speed against timm, find, numpy and faiss, and memory with a million images.

    python benchmarks/search.py [--parts index update search memory] [--rows 200000] [--json F]

Candidates take turns in one process; ratios are medians over the turns.

index: JPEG files to an index on disk, with hashes, against timm's network in a DataLoader of Pillow images, which
keeps the features in memory. update: of an unchanged folder, against `find -printf` over its files. search: the 10
nearest of unit vectors on a smooth manifold (tanh network of 12 random numbers): numpy's product and argpartition in
float32, faiss Flat in float32, ours in float16, and approximate search. memory: the largest anonymous memory of a
process that writes an index of a million rows, builds approximate search, and searches; mapped files are not counted.
"""

import argparse
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from common import SIZES, about, interleave, median_ratio, save, write_images
from dino_ssl.data.sources import open_dataset
from dino_ssl.evals.nearest import top_k
from dino_ssl.loading import open_checkpoint
from dino_ssl.models.vit import ViT
from dino_ssl.runtime import start
from dino_ssl.search import build
from dino_ssl.search.approximate import open_approximate, write_approximate
from dino_ssl.search.listing import Listing, list_images
from dino_ssl.search.reading import Record
from dino_ssl.search.store import open_store, writing
from extraction import build as build_networks
from extraction import from_files

WIDTH, LATENT = 384, 12
BATCH = 4096
Row = dict[str, Any]


def unit_rows(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield float16 unit rows [n, WIDTH] on a manifold of LATENT dimensions, `count` in all."""
    rng = np.random.default_rng(0)
    first = 0.35 * rng.normal(size=(LATENT, 256)).astype(np.float32)
    second = rng.normal(size=(256, WIDTH)).astype(np.float32)
    rng = np.random.default_rng([1, seed])
    for at in range(0, count, BATCH):
        hidden = np.tanh(rng.normal(size=(min(BATCH, count - at), LATENT)).astype(np.float32) @ first + 0.5)
        rows = hidden @ second
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        yield rows.astype(np.float16)


def compared(title: str, base: str, times: dict[str, list[float]], **values: Any) -> list[Row]:
    """Return one row per candidate: milliseconds, and the ratio of its time to that of `base`."""
    return [
        {
            "part": title,
            "candidate": name,
            "ms": 1000 * float(np.median(seconds)),
            "time_ratio": 1 / median_ratio(times[base], seconds),
            "seconds": seconds,
            **values,
        }
        for name, seconds in times.items()
    ]


def measure_index(options: argparse.Namespace, scratch: Path) -> list[Row]:
    folder = scratch / "photos"
    folder.mkdir()
    write_images(folder, options.images, *SIZES["500"])
    with start() as rt:
        network, timm = build_networks(options.network, rt)
        loaders = from_files(network, timm, rt, 224, 64, folder, options.workers)
        checkpoint, count = open_checkpoint(network), iter(range(1000))
        settings = build.BuildSettings(size=224, workers=options.workers, precision=rt.precision)

        def index() -> None:
            build.update_index(scratch / f"{next(count)}.idx", checkpoint, str(folder), settings)

        times = interleave({"timm": loaders["timm"], "dino index": index}, options.turns)
    return compared(f"index, {options.network}", "timm", times, images=options.images)


def fake_images(count: int) -> Iterator[tuple[list[Record], np.ndarray]]:
    """Yield records and features as `read_images` does, without images."""
    for rows in unit_rows(count):
        yield [Record(os.urandom(16), 1, 8, 8) for _ in rows], rows


def write_fake_index(folder: Path, listing: Listing, info: Any, images: Any = None) -> None:
    """Write an index of all listed images through the same writer; images: records and features (`fake_images`)."""
    count = len(listing.paths)
    names = [path.decode() for path in listing.paths.to_pylist()]
    with writing(folder) as store:
        plan = build.compare(listing, store)
        build._write(folder, listing, plan, info, store, names, images or fake_images(count), None)


def fake_info(source: Path) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(ViT(width=WIDTH, depth=1, heads=6, patch=16, image_size=32).build())
    return checkpoint, build.new_info(checkpoint, str(source), build.BuildSettings())


def measure_update(options: argparse.Namespace, scratch: Path) -> list[Row]:
    folder = scratch / "many"
    for number in range(options.files):
        if number % 1000 == 0:
            (parent := folder / f"{number // 1000:04d}").mkdir(parents=True)
        (parent / f"image-{number % 1000:04d}.jpg").write_bytes(b"x")
    checkpoint, info = fake_info(folder)
    write_fake_index(scratch / "many.idx", list_images(str(folder)), info)

    def update() -> None:
        _, changes = build.update_index(scratch / "many.idx", checkpoint, str(folder), build.BuildSettings())
        assert changes == build.Changes(kept=options.files)

    def find() -> None:
        subprocess.run(["find", folder, "-printf", "%p %s %T@\n"], stdout=subprocess.DEVNULL, check=True)

    times = interleave({"find -printf": find, "update of an unchanged folder": update}, options.turns)
    return compared(f"update, {options.files:,} files", "find -printf", times)


def measure_search(options: argparse.Namespace, scratch: Path) -> list[Row]:
    half = np.concatenate([*unit_rows(options.rows)])
    single, flat = half.astype(np.float32), faiss.IndexFlatIP(WIDTH)
    flat.add(single)
    info = write_approximate(scratch, half, 1)
    approximate = open_approximate(scratch, 1)
    assert approximate is not None
    queries = np.concatenate([*unit_rows(100, seed=1)]).astype(np.float32)
    exact = top_k(queries, half, 10, unit=True)[1]
    found = approximate.top_k(torch.from_numpy(queries), 10)[1]
    recall = (exact[:, :, None] == found[:, None]).any(2).float().mean().item()
    rows = []
    for count in (1, 100):
        asked, tensor = queries[:count], torch.from_numpy(queries[:count])

        def numpy_search(asked: np.ndarray = asked) -> None:
            cosines = asked @ single.T
            nearest = np.argpartition(-cosines, 10, axis=1)[:, :10]
            np.take_along_axis(cosines, nearest, 1).argsort(1)

        candidates = {
            "numpy": numpy_search,
            "faiss Flat": lambda asked=asked: flat.search(asked, 10),
            "dino, exact": lambda tensor=tensor: top_k(tensor, half, 10, unit=True),
            "dino, approximate": lambda tensor=tensor: approximate.top_k(tensor, 10),
        }
        for run in candidates.values():
            run()
        times = interleave(candidates, 5 * options.turns)
        quality = {"recall_at_10": recall, "lists": info.lists, "probes": info.probes}
        rows += compared(f"search, {options.rows:,} rows, {count} queries", "numpy", times, **quality)
    return rows


class AnonymousMemory(threading.Thread):
    """Samples the anonymous memory of this process; `peak` is the largest in bytes, as of `reset`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, 1024 * int(line.split()[1]))
            time.sleep(0.05)


def measure_memory(options: argparse.Namespace, scratch: Path) -> list[Row]:
    count, folder = options.million, scratch / "million.idx"
    paths = pa.array((f"{n // 1000:05d}/image-{n % 1000:04d}.jpg".encode() for n in range(count)), pa.binary())
    labels = lambda names: [name.split("/")[0] for name in names]  # noqa: E731
    numbers = np.arange(count)
    memory, info = AnonymousMemory(), fake_info(scratch)[1]
    listing = Listing(paths=paths, sizes=numbers, mtimes=numbers, open=lambda _: open_dataset([]), labels=labels)
    rows = []

    def step(name: str, run: Any) -> None:
        memory.peak, began = 0, time.perf_counter()
        run()
        time.sleep(0.1)
        seconds = time.perf_counter() - began
        rows.append({"part": f"memory, {count:,} rows", "candidate": name, "peak": memory.peak, "ms": 1000 * seconds})

    step("write the index", lambda: write_fake_index(folder, listing, info))
    store = open_store(folder)
    queries = torch.from_numpy(np.concatenate([*unit_rows(100, seed=1)]))
    step("100 queries, exact", lambda: top_k(queries, store.features, 10, unit=True))
    step("one query, exact", lambda: top_k(queries[:1], store.features, 10, unit=True))
    step("build approximate search", lambda: write_approximate(folder, store.features, 1))
    approximate = open_approximate(folder, 1)
    assert approximate is not None
    step("100 queries, approximate", lambda: approximate.top_k(queries, 10))
    return rows


PARTS = {"index": measure_index, "update": measure_update, "search": measure_search, "memory": measure_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--network", choices=["vit_tiny", "vit_small", "resnet50"], default="vit_small")
    parser.add_argument("--images", type=int, default=128, help="JPEG files to index")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--files", type=int, default=100_000, help="files of the unchanged folder")
    parser.add_argument("--rows", type=int, default=200_000, help="rows to search in")
    parser.add_argument("--million", type=int, default=1_000_000, help="rows of the memory measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = []
    for name in options.parts:
        with tempfile.TemporaryDirectory() as scratch:
            rows += PARTS[name](options, Path(scratch))
    description = about(vars(options))
    table = Table("part", "candidate", "ms", "time / base", "recall@10", "GiB", title=description["machine"])
    for row in rows:
        ratio, recall = row.get("time_ratio"), row.get("recall_at_10")
        values = (f"{row['ms']:.1f}", ratio and f"{ratio:.3f}", recall and f"{recall:.3f}")
        peak = f"{row['peak'] / 2**30:.2f}" if "peak" in row else ""
        table.add_row(row["part"], row["candidate"], *(value or "" for value in values), peak)
    Console().print(table)
    save(options.json, {"benchmark": "search", **description, "rows": rows})


if __name__ == "__main__":
    main()
