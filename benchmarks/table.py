"""docs/benchmarks/README.md from the JSON files beside it: what was asked of the speed, and what was read where.

    python benchmarks/table.py

A row whose file is not there, or whose file lacks what the row asks for, says that it has not been read yet. A test
holds the page to its files.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs/benchmarks"
UNREAD = "not read yet"

HEAD = """# What the benchmarks read

`python benchmarks/table.py` writes this page from the JSON files beside it; each of those is what one command wrote on
one machine. Versions take turns in one run, and a ratio is the median of the turns' ratios; in brackets, where it is
known, the same of the processor's time, which is steadier beside other work. `plain` is the published way in our own
words ([plain.py](../../benchmarks/plain.py)); `lightly` is the registry's package. Memory is by how much the training
process grows. A row that nobody has read says so, and is not filled by an estimate. Where a reading was taken with
other settings than the row asks for, they stand behind it.

"""


@dataclass(frozen=True)
class Row:
    what: str
    least: str
    command: str
    file: str
    """In docs/benchmarks/."""
    read: Callable[[dict], str | None]
    """What the file says of it; None where it does not."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the row asks for, by their names in the file."""


def times(one: dict, other: dict) -> str:
    """How many times as fast one row is as another, by the median of their turns."""

    def ratio(clock: str) -> float:
        return statistics.median(b / a for a, b in zip(one[clock], other[clock], strict=False))

    known = "processor_seconds" in one and "processor_seconds" in other
    return f"**{ratio('seconds'):.2f}x**" + (f" ({ratio('processor_seconds'):.2f}x)" if known else "")


def best(found: dict, kind: str) -> dict | None:
    """The fastest of a kind that ran."""
    ran = [row for row in found["rows"] if row["version"].startswith(kind) and "failed" not in row]
    return max(ran, key=lambda row: row["images_per_s"], default=None)


def against(*versions: str) -> Callable[[dict], str | None]:
    """Ours against the first of these versions that the file has."""

    def read(found: dict) -> str | None:
        ran = {row["version"]: row for row in found["rows"] if "failed" not in row}
        plain = next((ran[version] for version in versions if version in ran), None)
        ours = best(found, "dino")
        if plain is None or ours is None:
            return None
        speeds = f"{ours['images_per_s']:.2f} against {plain['images_per_s']:.2f} images/s"
        words = [f"{times(ours, plain)} `{plain['version']}` ({speeds})"]
        words.append(f"{ours['peak'] / plain['peak']:.2f} of its memory")
        if "rate_share" in ours:
            words.append(f"{100 * ours['rate_share']:.0f} % of the matrix rate")
        return ", ".join(words)

    return read


def lightly(found: dict) -> str | None:
    ours, theirs = best(found, "dino"), best(found, "lightly")
    if ours is None or theirs is None:
        return None
    return f"{times(ours, theirs)} `{theirs['version']}`, {ours['peak'] / theirs['peak']:.2f} of its memory"


def data(row: str) -> Callable[[dict], str | None]:
    """Ours against Pillow and torchvision on one core."""

    def read(found: dict) -> str | None:
        results = found.get("rows", {}).get(row, {}).get("results", {})
        return f"**{results['dino']['ratio']:.2f}x**" if "dino" in results else None

    return read


def extraction(found: dict) -> str:
    ours = [row for row in found["rows"] if row["version"] == "dino"]
    return ", ".join(f"{row['network']} {row['way']} **{row['ratio']:.2f}x**" for row in ours)


def accuracy(found: dict) -> str:
    """At half an hour."""
    near = min(found["curve"], key=lambda point: abs(point["minutes"] - 30))
    return f"**{near['accuracy']:.1f} %** after {near['minutes']:.0f} min"


def step(network: str, **more: str) -> str:
    told = "".join(f" --{name} {value}" for name, value in more.items())
    return f"python benchmarks/train_step.py --network {network}{told} --json docs/benchmarks/"


def end(network: str, **more: str) -> str:
    return step(network, **more).replace("train_step", "end_to_end")


PAPER = {"views": "2x224+8x96", "k": 65536}
CPU = {"network": "vit_small", "batch": 32, **PAPER}
GPU = {"views": "2x224+8x96", "k": "65536", "workers": "16"}
FAST = ("plain:bfloat16", "plain:float32")
ROWS = [
    Row(
        "CPU, ViT-S/16, 2x224 + 8x96, K 65536, batch 32: a step against the plain one in float32",
        "6x",
        step("vit_small", batch="32"),
        "train_step-vit_small.json",
        against("plain:float32"),
        CPU,
    ),
    Row(
        "the same against the plain step under bfloat16 autocast",
        "1.8x, half the peak memory",
        step("vit_small", batch="32"),
        "train_step-vit_small.json",
        against("plain:bfloat16"),
        CPU,
    ),
    Row(
        "CPU, two cores, ViT-tiny/16, 2x128 + 6x64, K 4096, batch 64: from JPEG files to weights, against the plain "
        "loop under bfloat16 autocast where there is bfloat16",
        "3x",
        end("vit_tiny"),
        "end_to_end-vit_tiny.json",
        against(*FAST),
        {"network": "vit_tiny", "views": "2x128+6x64", "k": 4096, "batch": 64, "workers": 2},
    ),
    Row(
        "data, one core, 500 px to 2x224 + 8x96",
        "5x",
        "python benchmarks/data.py --json docs/benchmarks/",
        "data.json",
        data("500"),
    ),
    Row(
        "data, one core, 128 px to 2x128 + 6x64",
        "8x",
        "python benchmarks/data.py --json docs/benchmarks/",
        "data.json",
        data("128"),
    ),
    *(
        Row(
            f"GPU, {name}, 2x224 + 8x96, K 65536: from JPEG files to weights, against the plain loop in float16",
            least,
            end(network, batch=batch, **GPU),
            f"end_to_end-{network}-gpu.json",
            against("plain:float16"),
            {"network": network, **PAPER},
        )
        for name, network, batch, least in (
            ("ViT-S/16", "vit_small", "64", "3x, half the memory, 40 % of the bfloat16 matrix rate"),
            ("ViT-B/16", "vit_base", "32", "2.5x, 45 % of the rate"),
            ("ViT-S/8", "vit_small_8", "16", "2.5x, 45 % of the rate"),
        )
    ),
    *(
        Row(f"lightly's DINO: {what}", "ahead", command, file, lightly)
        for what, command, file in (
            ("CPU, ViT-S/16, a step", step("vit_small", batch="32"), "train_step-vit_small.json"),
            ("CPU, ViT-tiny/16, from files", end("vit_tiny"), "end_to_end-vit_tiny.json"),
            ("GPU, ViT-S/16, from files", end("vit_small", batch="64", **GPU), "end_to_end-vit_small-gpu.json"),
        )
    ),
    Row(
        "features for evaluation at 224, against timm's plain inference of the same weights",
        "1x",
        "python benchmarks/extraction.py --json docs/benchmarks/",
        "extraction.json",
        extraction,
    ),
    Row(
        "`small` on two cores, 20-NN after 30 minutes",
        "above 51.9 %, of before",
        "python benchmarks/time_to_accuracy.py imagenette128 --recipe small --minutes 30 --json docs/benchmarks/",
        "time_to_accuracy-small-half-an-hour.json",
        accuracy,
    ),
]


def line(row: Row, folder: Path) -> str:
    """One line of the table."""
    path, command = folder / row.file, f"`{row.command}{row.file}`"
    found = json.loads(path.read_text()) if path.exists() else None
    reached = row.read(found) if found is not None else None
    if found is None or reached is None:
        return f"| {row.what} | {row.least} | {UNREAD} | | {command} |"
    settings = found.get("settings", {})
    other = [f"{name} {settings.get(name)}" for name, value in row.asked.items() if settings.get(name) != value]
    other += [f"{settings['turns']} turn" for _ in [0] if settings.get("turns") == 1]
    reached += f"; read with {', '.join(other)}" if other else ""
    shown = ("torch", "timm", "lightly")
    known = found.get("versions", found)
    versions = ", ".join(f"{name} {known[name]}" for name in shown if name in known)
    where = "; ".join(word for word in (found.get("machine"), found.get("date", found.get("day")), versions) if word)
    return f"| {row.what} | {row.least} | {reached} | {where} | {command} |"


def page(folder: Path = FOLDER) -> str:
    table = ["| what | at least | reached | where, when, with | command |", "|---|---|---|---|---|"]
    return HEAD + "\n".join([*table, *(line(row, folder) for row in ROWS)]) + "\n"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page())
