"""Shared parts of the benchmarks: interleaved timing, child processes, peak memory, JPEG files, JSON.

Candidates are always interleaved, so that a slow period of the machine affects all of them. Times are medians over
the rounds, ratios are medians of the ratios within a round, not ratios of these medians.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset

from dino_ssl.data.folder import Folder
from dino_ssl.runtime import machine, peak_memory

PACKAGES = ("torchvision", "timm", "pillow", "opencv-python-headless", "simplejpeg", "lightly")
SIZES = {"500": (500, 375), "128": (128, 128)}
"""Width and height of generated JPEG files."""


def about(options: dict[str, Any], folder: str = "benchmarks") -> dict[str, Any]:
    """Return machine, date, versions, command and settings of a measurement, without absolute paths.

    folder: that of the script. `default precision` is the machine's: a script that uses another one adds `precision`.
    """
    device_info, threads = machine(), torch.get_num_threads()
    script, *words = sys.argv
    arguments = [without_folders(word) for word in words]
    settings = {name: without_folders(value) for name, value in options.items()}
    return {
        "machine": f"{device_info.name}, {device_info.cores} cores, {threads} thread{'s' if threads > 1 else ''}",
        "default precision": f"{device_info.precision}: {device_info.precision_reason}",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), **package_versions()},
        "command": f"python {folder}/{Path(script).name} {shlex.join(arguments)}".strip(),
        "settings": {name: value for name, value in settings.items() if name not in ("child", "json")},
    }


def without_folders(value: Any) -> Any:
    """Return a Path or an absolute path, or each of a list, as the name of its file; other values unchanged."""
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())
    return Path(value).name if is_path else value


def package_versions() -> dict[str, str]:
    """Return the versions of PACKAGES that are installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON if there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


# -- timing --------------------------------------------------------------------------------------------------


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def ratios(base: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Return how many times as fast as `base` in each round."""
    return [b / s for b, s in zip(base, seconds, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, the smallest and the largest value as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def median_ratio(base: Sequence[float], seconds: Sequence[float]) -> float:
    """Return how many times as fast as `base`: the median over the rounds."""
    return statistics.median(ratios(base, seconds))


def run_child(script: str, version: str, arguments: Sequence[str], seconds: float | None = None) -> dict[str, Any]:
    """Run `script --child VERSION arguments`; return the JSON of its last line, or its error under `failed`."""
    command = [sys.executable, script, "--child", version, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {seconds:.0f} s"}
    if done.returncode < 0:
        return {"failed": f"killed by signal {-done.returncode}"}
    if done.returncode or not done.stdout.strip():
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": re.sub(r"(?<![\w./])/[\w./-]*/", "", error)[:500]}  # without folders of this machine
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turns(script: str, versions: Sequence[str], turns: int, arguments: Sequence[str]) -> dict[str, list[dict]]:
    """Run each version in each turn; return what `run_child` returns.

    A version that fails (usually out of memory) runs once; its only entry has the error under `failed`.
    """
    results: dict[str, list[dict]] = {version: [] for version in versions}
    for _ in range(turns):
        for version, entries in results.items():
            if entries and "failed" in entries[0]:
                continue
            entry = run_child(script, version, arguments)
            entries[:] = [entry] if "failed" in entry else [*entries, entry]
    return results


def summarize(results: dict[str, list[dict]], num_images: int) -> list[dict[str, Any]]:
    """Return one row per version: images/s, ratio to the first version, and medians of all other values.

    num_images: number of images that were processed in the `seconds` of an entry.
    """
    base = next((turns for turns in results.values() if "failed" not in turns[0]), [])
    rows = []
    for version, turns in results.items():
        if "failed" in turns[0]:
            rows.append({"version": version, **turns[0]})
            continue
        clocks = [clock for clock in ("seconds", "cpu_seconds") if clock in turns[0]]
        seconds = [turn["seconds"] for turn in turns]
        numbers = {key for key, value in turns[0].items() if isinstance(value, int | float)} - {*clocks}
        rows.append(
            {
                "version": version,
                "images_per_s": num_images / statistics.median(seconds),
                "ratio": median_ratio([turn["seconds"] for turn in base], seconds),
                **{key: statistics.median(turn[key] for turn in turns) for key in sorted(numbers)},
                **{clock: [turn[clock] for turn in turns] for clock in clocks},
                **{key: value for key, value in turns[0].items() if isinstance(value, list)},
            }
        )
    return rows


def print_rows(rows: Sequence[dict[str, Any]], title: str, console: Console, **columns: str) -> None:
    """Print the rows as a table. columns: key=heading of further values, shares in percent and bytes in GiB."""
    table = Table("version", "images/s (median)", "ratio (median of each round's)", *columns.values(), title=title)
    for row in rows:
        if "failed" in row:
            table.add_row(row["version"], f"failed: {row['failed']}")
            continue
        cells = [f"{row[key] / 2**30:.2f}" if key == "peak" else f"{100 * row[key]:.0f}" for key in columns]
        table.add_row(row["version"], f"{row['images_per_s']:.2f}", f"{row['ratio']:.2f}", *cells)
    console.print(table)


@dataclass
class Memory:
    """Growth of this process's memory since the object was created: on the GPU, or in main memory."""

    device: torch.device
    before: int = field(init=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
        self.before = peak_memory(self.device)

    def peak(self) -> int:
        """Return the largest growth so far, in bytes."""
        return peak_memory(self.device) - self.before


# -- images --------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, width: int, height: int) -> Path:
    """Write JPEG files of smooth noise and hard-edged shapes, with as many bytes per pixel as photos; return folder."""
    rng = np.random.default_rng(0)
    for name in range(count):
        image = np.full((height, width, 3), 128, np.float32)
        for cells, strength in ((4, 60), (16, 35), (64, 25), (width // 2, 20)):
            noise = rng.normal(size=(cells * 3 // 4, cells, 3)).astype(np.float32) * strength
            image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            center = (int(rng.integers(width)), int(rng.integers(height)))
            color = rng.integers(0, 256, 3).tolist()
            radius = int(rng.integers(width // 100, width // 6))
            cv2.circle(image, center, radius, color, -1 if rng.random() < 0.5 else 3)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.jpg", quality=90)
    return folder


class PillowImages(Dataset):
    """Transformed images of a folder, decoded by Pillow, in the order of our dataset."""

    def __init__(self, folder: Path, transform: Callable[[Any], Any]) -> None:
        self.files = [folder / name for name in Folder(path=str(folder)).open().names]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with self.files[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))
