"""Write docs/benchmarks/README.md from the JSON files in docs/benchmarks: targets and measurements.

    python benchmarks/table.py

A row is `not measured` if its file is missing or lacks its versions. A test keeps the page equal to the files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measurements import (
    Read,
    accuracy,
    against,
    attention,
    data,
    demo,
    duplicates,
    explore,
    extraction,
    faults,
    lightly,
    search,
    small_datasets,
)

FOLDER = Path(__file__).parents[1] / "docs/benchmarks"
NOT_MEASURED = "not measured"

HEAD = """# Benchmark results

`python benchmarks/table.py` writes this page from the JSON files in this folder; the command of a row is the one that
wrote its file (`small_datasets` and `faults`: the last of several that added to it). Versions take turns within a run;
a ratio is the median of the ratios within a turn, which a slow period of the machine affects less than the ratio of
the speeds, which are medians over the turns. In parentheses: the smallest and largest ratio of the n turns and, if
known, the ratio of CPU time, which is less affected by other processes. A target of "faster" is met if every turn was.
`plain` is the published method in plain PyTorch ([plain.py](../../benchmarks/plain.py)); `lightly` is the package of
that name. Memory is the growth of the training process. Rows without a measurement are marked; nothing is estimated.
On a GPU, versions run one after the other, and n counts steps (1 from files).
Settings of a measurement that differ from the row's are listed after the result.

"""


@dataclass(frozen=True)
class Row:
    """One line of the page."""

    what: str
    target: str
    command: str
    """That would write the file: printed if there is no file."""
    file: str
    """In docs/benchmarks/."""
    read: Read
    """Return the result in a file's JSON; None if it lacks the versions."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the row by their names in the file."""
    part: str = ""
    """Name of the measurement in the file of gpu.py, which has several."""


def step(network: str, **options: str) -> str:
    """Return the command of train_step.py."""
    words = "".join(f" --{name} {value}" for name, value in options.items())
    return f"python benchmarks/train_step.py --network {network}{words} --json docs/benchmarks/"


def end(network: str, **options: str) -> str:
    """Return the command of end_to_end.py."""
    return step(network, **options).replace("train_step", "end_to_end")


PAPER = {"views": "2x224+8x96", "k": 65536}
CPU = {"network": "vit_small", "batch": 32, **PAPER}
MEASURE_ON_GPU = "python benchmarks/gpu.py measure --minutes 8 --json docs/benchmarks/"
FAST = ("plain:bfloat16", "plain:float32")
ROWS = [
    Row(
        "CPU, ViT-S/16, 2x224 + 8x96, K 65536, batch 32: training step against the plain one in float32",
        "6x",
        step("vit_small", batch="32"),
        "train_step-vit_small.json",
        against("plain:float32", target=6),
        CPU,
    ),
    Row(
        "the same on a CPU with bfloat16 (AVX-512)",
        "6x",
        step("vit_small", batch="32"),
        "train_step-vit_small-bfloat16.json",
        against("plain:float32", target=6),
        CPU,
    ),
    Row(
        "the same against the plain step in bfloat16",
        "1.8x, half the peak memory",
        step("vit_small", batch="32"),
        "train_step-vit_small-bfloat16.json",
        against("plain:bfloat16", target=1.8, memory=0.5),
        CPU,
    ),
    Row(
        "CPU, one thread, the network and crops of `small` (half-width ResNet-10-T, 2x48 + 4x24), K 1024, batch 64: "
        "training step against the plain one in float32",
        "faster",
        step("small", views="2x48+4x24", k="1024", hidden="512", batch="64"),
        "train_step-small.json",
        against("plain:float32"),
        {"network": "small", "views": "2x48+4x24", "k": 1024, "hidden": 512, "batch": 64},
    ),
    Row(
        "CPU, two cores, ViT-tiny/16, 2x128 + 6x64, K 4096, batch 64: from JPEG files to weights, against the plain "
        "loop in bfloat16, or float32 if the CPU has no bfloat16",
        "3x",
        end("vit_tiny"),
        "end_to_end-vit_tiny.json",
        against(*FAST, target=3),
        {"network": "vit_tiny", "views": "2x128+6x64", "k": 4096, "batch": 64, "workers": 2},
    ),
    Row(
        "data path, one core, 500 px to 2x224 + 8x96",
        "5x",
        "python benchmarks/data.py --json docs/benchmarks/",
        "data.json",
        data("500", 5),
    ),
    Row(
        "data path, one core, 128 px to 2x128 + 6x64",
        "8x",
        "python benchmarks/data.py --json docs/benchmarks/",
        "data.json",
        data("128", 8),
    ),
    Row(
        "GPU, ViT-S/16, 2x224 + 8x96, K 65536: from JPEG files to weights, against the plain loop in float16",
        "3x, half the memory, 40 % of bfloat16 matmul throughput",
        MEASURE_ON_GPU,
        "gpu.json",
        against("plain:float16", target=3, memory=0.5, share=0.4),
        PAPER,
        part="from JPEG files",
    ),
    *(
        Row(
            f"GPU, {name}, 2x224 + 8x96, K 65536: training step, against the plain one in float16",
            f"{'faster' if ratio == 1 else f'{ratio}x'}, {share} % of bfloat16 matmul throughput",
            MEASURE_ON_GPU,
            "gpu.json",
            against("plain:float16", target=ratio, share=share / 100),
            PAPER,
            part=f"step of {network}",
        )
        for name, network, ratio, share in (
            ("ViT-S/16", "vit_small", 1, 40),
            ("ViT-B/16", "vit_base", 2.5, 45),
            ("ViT-S/8", "vit_small_8", 2.5, 45),
            ("ResNet-50", "resnet50", 1, 30),
        )
    ),
    *(
        Row(f"lightly's DINO: {what}", "faster", command, file, lightly)
        for what, command, file in (
            ("CPU, ViT-S/16, training step", step("vit_small", batch="32"), "train_step-vit_small.json"),
            ("CPU, ViT-tiny/16, from files", end("vit_tiny"), "end_to_end-vit_tiny.json"),
        )
    ),
    Row(
        "lightly's DINO: GPU, ViT-S/16, training step",
        "faster",
        MEASURE_ON_GPU,
        "gpu.json",
        lightly,
        part="step of vit_small",
    ),
    Row(
        "feature extraction at 224, against timm's inference with the same weights",
        "1x",
        "python benchmarks/extraction.py --json docs/benchmarks/",
        "extraction.json",
        extraction,
    ),
    Row(
        "`small`, as many images as two AVX2 cores process in 30 minutes: 20-NN",
        "60 %",
        "python benchmarks/time_to_accuracy.py imagenette128 --recipe small --minutes 30 --workers 0 "
        "--images-per-second 140 --json docs/benchmarks/",
        "time_to_accuracy-small-half-an-hour.json",
        accuracy(60),
    ),
    Row(
        "`small`, as many images as two AVX2 cores process in two hours: 20-NN",
        "72 %",
        "python benchmarks/time_to_accuracy.py imagenette128 --recipe small --minutes 120 --workers 0 "
        "--images-per-second 143 --json docs/benchmarks/",
        "time_to_accuracy-small-two-hours.json",
        accuracy(72),
    ),
    Row(
        "`narrow-vit`, 323,200 images, two hours at 45 images/s: 20-NN",
        "55 %",
        "python benchmarks/time_to_accuracy.py imagenette128 --recipe narrow-vit --minutes 120 --workers 0 "
        "--json docs/benchmarks/",
        "time_to_accuracy-narrow-vit.json",
        accuracy(55),
    ),
    Row(
        "GPU, ResNet-18-D on imagenette128, 8 minutes: 20-NN",
        "84 %",
        "python benchmarks/gpu.py train imagenette128 --minutes 9 --json docs/benchmarks/",
        "gpu-train.json",
        accuracy(84),
        part="20-NN of resnet18d",
    ),
    Row(
        "`make demo`, five seeds: 20-NN, and Jaccard similarity of attention masks with the objects",
        "every seed 25 points above raw pixels and random weights, median 80 %; Jaccard above random weights and a "
        "centered square",
        "python benchmarks/demo.py --json docs/benchmarks/",
        "demo.json",
        demo,
        {"seeds": [0, 1, 2, 3, 4]},
    ),
    Row(
        "image search: indexing; update of an unchanged folder; search in 200,000 x 384; memory of 1,000,000 x 384",
        "indexing at most timm's time; update at most 3x `find -printf`; one query at most 1.2x faiss Flat, 100 "
        "at most half of numpy, approximate 1/30 of numpy; 2 GiB beyond mapped files",
        "python benchmarks/search.py --json docs/benchmarks/",
        "search.json",
        search,
    ),
    Row(
        "the page of `dino explore` with 100,000 images, until the thumbnails in the window are shown, or the results",
        "first view 1 s, a search click 200 ms",
        "python benchmarks/explore.py --json docs/benchmarks/",
        "explore.json",
        explore,
    ),
    Row(
        "duplicates among 100,000 x 384, against one self-5-NN by faiss IVF; 280 edited copies among 2,000 photographs",
        "at most 4x the time",
        "python benchmarks/duplicates.py imagenette128/train demo --json docs/benchmarks/",
        "duplicates.json",
        duplicates,
    ),
    *(
        Row(
            f"`dino train` on 200, 500 and 2,000 images of {name}, 20-NN in percent (raw pixels, random weights), with "
            "the plan and the `small` of that day: ResNet-10, crops of 64 and 32 px",
            "above both, or a warning of the plan",
            f"python benchmarks/small_datasets.py --dataset {name} --images-seen 90000 --json docs/benchmarks/",
            f"small_datasets-{name}.json",
            small_datasets,
        )
        for name in ("imagenette128", "clothing128")
    ),
    Row(
        "attention of a ViT trained by DINO and with labels, same images, three seeds: Jaccard similarity in percent",
        "DINO above supervised, as in Fig. 4",
        "python benchmarks/attention_dino_supervised.py --json docs/benchmarks/",
        "attention_dino_supervised.json",
        attention,
    ),
    Row(
        "mutated images and files, and killed runs, at random",
        "10,000 images, 1,000 files, 200 interruptions without a crash, a hang or another result after resuming",
        "python benchmarks/faults.py --json docs/benchmarks/",
        "faults.json",
        faults,
    ),
]


def line(row: Row, folder: Path) -> str:
    """Return one line of the table."""
    path = folder / row.file
    result = json.loads(path.read_text()) if path.exists() else None
    if result is not None and row.part:
        part = result["measurements"].get(row.part, {})
        result = None if part.keys().isdisjoint({"rows", "curves"}) else result | part
    measured = row.read(result) if result is not None else None
    if result is None or measured is None:
        return f"| {row.what} | {row.target} | | {NOT_MEASURED} | | `{row.command}{row.file}` |"
    settings = result.get("settings", {})
    other = [f"{name} {settings.get(name)}" for name, value in row.settings.items() if settings.get(name) != value]
    other += ["1 turn"] if settings.get("turns") == 1 else []
    text = measured.text + (f"; measured with {', '.join(other)}" if other else "")
    versions = [
        f"{name} {result['versions'][name]}" for name in ("torch", "timm", "lightly") if name in result["versions"]
    ]
    where = "; ".join([result["machine"], result["date"], ", ".join(versions)])
    return f"| {row.what} | {row.target} | {measured.verdict} | {text} | {where} | `{result['command']}` |"


def page(folder: Path = FOLDER) -> str:
    """Return the page."""
    table = ["| what | target | met | measured | machine, date, versions | command |", "|---|---|---|---|---|---|"]
    gpu = "" if (folder / "gpu.json").exists() else "No GPU was available so far: its rows are not measured.\n\n"
    return HEAD + gpu + "\n".join([*table, *(line(row, folder) for row in ROWS)]) + "\n"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page())
