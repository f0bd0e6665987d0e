"""What the benchmarks share: versions of the same work, in processes of their own, that take turns.

A version is named KIND:PRECISION, `plain:float32` or `dino:bfloat16`. Turns are interleaved, so that a slow minute hits
all versions alike; figures are medians of the turns, ratios medians of the turns' ratios.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lightly_dino
from dino_ssl.runtime import Machine, machine, peak_memory

PACKAGES = ("torchvision", "timm", "pillow", "opencv-python-headless", "lightly")


def about(options: dict[str, Any]) -> dict[str, Any]:
    """What a figure stands on: machine, date, versions, command. Folders are said by their names alone."""
    here = machine()
    script, *given = sys.argv
    shown = [Path(word).name if Path(word).is_absolute() else word for word in given]
    settings = {name: value.name if isinstance(value, Path) else value for name, value in options.items()}
    return {
        "machine": f"{here.name}, {here.cores} cores, {torch.get_num_threads()} threads",
        "precision": f"{here.precision}: {here.why}",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), **found_versions()},
        "command": f"python benchmarks/{Path(script).name} {shlex.join(shown)}".strip(),
        "settings": {name: value for name, value in settings.items() if name not in ("child", "json")},
    }


def found_versions() -> dict[str, str]:
    """Of what is installed among the packages that matter to a figure."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usual_versions(here: Machine) -> list[str]:
    """What is compared where nobody says otherwise: plain first, each in the precisions of this machine."""
    match here.device.type, here.precision:
        case "cuda", precision:
            fast = ["bfloat16"] if precision == "bfloat16" else []
            plain = ["plain:float16", "plain:float32", *(f"plain:{one}" for one in fast)]
            return [*plain, f"dino:{precision}", "lightly:float16", *(f"lightly:{one}" for one in fast)]
        case _, "bfloat16":
            return ["plain:float32", "plain:bfloat16", "dino:float32", "dino:bfloat16", "lightly:bfloat16"]
    return ["plain:float32", "dino:float32", "lightly:float32"]


def available(versions: Sequence[str], console: Console) -> list[str]:
    """Those that can run here; a line about each that cannot."""
    if any(version.startswith("lightly") for version in versions) and not lightly_dino.installed():
        console.print("lightly is left out: it is not installed (pip install lightly)")
        versions = [version for version in versions if not version.startswith("lightly")]
    return list(versions)


def in_turns(script: str, versions: Sequence[str], turns: int, arguments: Sequence[str]) -> dict[str, list[dict]]:
    """Runs `script --child VERSION arguments` for every version, so many times: the last line of each, read as JSON.

    A version that fails (out of memory, mostly) is not tried again; its one entry says why under `failed`.
    """
    results: dict[str, list[dict]] = {version: [] for version in versions}
    for _ in range(turns):
        for version, found in results.items():
            if found and "failed" in found[0]:
                continue
            command = [sys.executable, script, "--child", version, *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
                found[:] = [{"failed": last}]
            else:
                found.append(json.loads(done.stdout.splitlines()[-1]))
    return results


@dataclass
class Memory:
    """By how much this process grows from here on, at its largest: of the card, or of the computer's memory."""

    device: torch.device
    before: int = field(init=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        self.before = peak_memory(self.device)

    def peak(self) -> int:
        return peak_memory(self.device) - self.before


def rows(results: dict[str, list[dict]], dataset: int) -> list[dict[str, Any]]:
    """A row per version: images/s, times the first version, and what its turns said, by the median.

    pictures: how many each timed `seconds` stands for.
    """
    first = next((turns for turns in results.values() if "failed" not in turns[0]), [])
    found = []
    for version, turns in results.items():
        if "failed" in turns[0]:
            found.append({"version": version, **turns[0]})
            continue
        clocks = [clock for clock in ("seconds", "processor_seconds") if clock in turns[0]]
        seconds = [turn["seconds"] for turn in turns]
        numbers = {key for key, value in turns[0].items() if isinstance(value, int | float)} - {*clocks}
        found.append(
            {
                "version": version,
                "images_per_s": dataset / statistics.median(seconds),
                "ratio": statistics.median(base["seconds"] / own for base, own in zip(first, seconds, strict=False)),
                **{key: statistics.median(turn[key] for turn in turns) for key in sorted(numbers)},
                **{clock: [turn[clock] for turn in turns] for clock in clocks},
                **{key: value for key, value in turns[0].items() if isinstance(value, list)},
            }
        )
    return found


def show(found: Sequence[dict[str, Any]], title: str, console: Console, **columns: str) -> None:
    """The rows as a table; columns: key=heading of what more they have, shares in percent and bytes in GiB."""
    table = Table("version", "images/s", "times first", *columns.values(), title=title)
    for row in found:
        if "failed" in row:
            table.add_row(row["version"], f"failed: {row['failed']}")
            continue
        more = [f"{row[key] / 2**30:.2f}" if key == "peak" else f"{100 * row[key]:.0f}" for key in columns]
        table.add_row(row["version"], f"{row['images_per_s']:.2f}", f"{row['ratio']:.2f}", *more)
    console.print(table)


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
