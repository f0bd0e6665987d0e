"""Write docs/benchmarks/README.md from the JSON files in docs/benchmarks: targets and measurements.

    python benchmarks/table.py

A row is `not measured` if its file is missing or lacks its versions. A test keeps the page equal to the files.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
Settings of a measurement that differ from the row's are listed after the result.

"""


class Measurement(NamedTuple):
    """A result as text, and for each part of the target, by name, whether it is met."""

    text: str
    met: Mapping[str, bool]

    @property
    def verdict(self) -> str:
        """`yes`, `no`, or the parts of the target that are not met."""
        unmet = [name for name, is_met in self.met.items() if not is_met]
        return "yes" if not unmet else "**no**" if len(unmet) == len(self.met) else f"**not** {', '.join(unmet)}"


Read = Callable[[dict], Measurement | None]


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


def ratios(row: dict, base: dict, clock: str = "seconds") -> list[float]:
    """Return how many times as fast as `base` in every turn."""
    return [b / a for a, b in zip(row[clock], base[clock], strict=False)]


def speedup(row: dict, base: dict) -> str:
    """Return how many times as fast as `base`: the median over the turns, and the spread."""
    turns = ratios(row, base)
    spread = f"{min(turns):.2f} to {max(turns):.2f}, n {len(turns)}"
    if "cpu_seconds" in row and "cpu_seconds" in base:
        spread += f"; CPU time {statistics.median(ratios(row, base, 'cpu_seconds')):.2f}x"
    return f"**{statistics.median(turns):.2f}x** ({spread})"


def fastest(result: dict, kind: str) -> dict | None:
    """Return the fastest version of a kind that did not fail."""
    rows = [row for row in result["rows"] if row["version"].startswith(kind) and "failed" not in row]
    return max(rows, key=lambda row: row["images_per_s"], default=None)


def reaches(row: dict, base: dict, target: float) -> bool:
    """Return whether the median ratio reaches the target; for a target of 1, whether every turn was faster."""
    turns = ratios(row, base)
    return min(turns) > 1 if target == 1 else statistics.median(turns) >= target


def against(*versions: str, target: float = 1, memory: float | None = None, share: float | None = None) -> Read:
    """Compare ours with the first of these versions that the file has.

    target: speed ratio. memory: largest share of its memory. share: smallest share of the matmul throughput.
    """

    def read(result: dict) -> Measurement | None:
        rows = {row["version"]: row for row in result["rows"] if "failed" not in row}
        plain = next((rows[version] for version in versions if version in rows), None)
        dino = fastest(result, "dino")
        if plain is None or dino is None:
            return None
        speeds = f"{dino['images_per_s']:.2f} against {plain['images_per_s']:.2f} images/s"
        peak = dino["peak"] / plain["peak"]
        text = f"{speedup(dino, plain)} `{plain['version']}` ({speeds}), {peak:.2f} of its memory"
        met = {"the speed": reaches(dino, plain, target)}
        met |= {} if memory is None else {"the memory": peak <= memory}
        met |= {} if share is None else {"the matmul throughput": dino.get("matmul_share", 0) >= share}
        text += f", {100 * dino['matmul_share']:.0f} % of matmul throughput" if "matmul_share" in dino else ""
        return Measurement(text, met)

    return read


def lightly(result: dict) -> Measurement | None:
    """Compare ours with lightly's."""
    dino, base = fastest(result, "dino"), fastest(result, "lightly")
    if dino is None or base is None:
        return None
    text = f"{speedup(dino, base)} `{base['version']}`, {dino['peak'] / base['peak']:.2f} of its memory"
    return Measurement(text, {"the speed": reaches(dino, base, 1)})


def data(row: str, target: float) -> Read:
    """Compare our transforms with Pillow and torchvision on one core."""

    def read(result: dict) -> Measurement | None:
        part = result.get("rows", {}).get(row, {})
        if "dino" not in part.get("results", {}):
            return None
        ratio = part["results"]["dino"]["ratio"]
        return Measurement(f"**{ratio:.2f}x** (n {part['rounds']})", {"the speed": ratio >= target})

    return read


def extraction(result: dict) -> Measurement:
    """Compare our feature extraction with timm's."""
    rows = {(row["version"], row["network"], row["input"]): row for row in result["rows"]}
    pairs = {key[1:]: (row, rows["timm", *key[1:]]) for key, row in rows.items() if key[0] == "dino"}
    text = ", ".join(f"{network} from {source} {speedup(*pair)}" for (network, source), pair in pairs.items())
    return Measurement(text, {" from ".join(key): statistics.median(ratios(*pair)) >= 1 for key, pair in pairs.items()})


def accuracy(target: float) -> Read:
    """Return the accuracy of every seed after half an hour."""

    def read(result: dict) -> Measurement:
        points = [min(entry["curve"], key=lambda point: abs(point["minutes"] - 30)) for entry in result["curves"]]
        scores = [point["accuracy"] for point in points]
        listed, minutes = ", ".join(f"{score:.1f}" for score in scores), max(point["minutes"] for point in points)
        seeds = "one seed" if len(scores) == 1 else f"{len(scores)} seeds, mean {statistics.fmean(scores):.1f}"
        met = {"the accuracy": statistics.fmean(scores) >= target}
        return Measurement(f"**{listed} %** after {minutes:.0f} min ({seeds})", met)

    return read


def demo(result: dict) -> Measurement:
    """Return accuracy, Jaccard similarity and processor time over the seeds."""
    scores = {name: [row[name] for row in result["seeds"]] for name in result["seeds"][0]}

    def between(name: str, digits: int = 1) -> str:
        return f"{min(scores[name]):.{digits}f} to {max(scores[name]):.{digits}f}"

    box, median = scores["centered_box_jaccard"][0], statistics.median(scores["knn"])
    num_above = sum(value > box for value in scores["attention_jaccard"])
    margin = min(row["knn"] - max(row["raw_pixels"], row["random_weights"]) for row in result["seeds"])
    masks = all(row["attention_jaccard"] > max(box, row["random_jaccard"]) for row in result["seeds"])
    text = (
        f"20-NN median **{median:.1f} %**, {between('knn')} (raw pixels "
        f"{scores['raw_pixels'][0]:.1f}, random weights {between('random_weights')}); Jaccard "
        f"{between('attention_jaccard')} (random weights {between('random_jaccard')}, centered square {box:.1f}), "
        f"above the square in {num_above} of {len(scores['seed'])} seeds; "
        f"{between('cpu_seconds', 0)} CPU seconds of training, other processes on the cores"
    )
    return Measurement(text, {"25 points": margin >= 25, "the median": median >= 80, "the masks": masks})


def faults(result: dict) -> Measurement:
    """Return how many trials of each kind had which outcome."""
    kinds = []
    for kind, counts in result["counts"].items():
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
        kinds.append(f"**{sum(counts.values()):,} {kind}**: {outcomes}")
    targets = {"images": 10_000, "files": 1_000, "interruptions": 200}
    met = {kind: sum(result["counts"][kind].values()) >= least for kind, least in targets.items()}
    num_printed = sum(failure["outcome"].startswith("printed") for failure in result["failures"])
    num_failed = len(result["failures"]) - num_printed
    text = f"{'; '.join(kinds)}; {num_failed} crashes or hangs ({num_printed} printed a line to the terminal)"
    return Measurement(text, {**met, "crashes": not num_failed})


def duplicates(result: dict) -> Measurement:
    """Return precision and recall of each network and of imagededup, and the ratio among many vectors."""
    scores = {}
    for name, part in result["quality"].items():
        if name == "imagededup":
            scores |= {f"imagededup at {row}": scores_ for row, scores_ in part.items() if row.startswith("distance")}
        elif isinstance(part, dict):
            scores |= {"hashes alone": part["tiers"]["hash"], name: part["tiers"]["features"]}
    listed = (f"{name} {each['precision']:.3f} and {each['recall']:.3f}" for name, each in scores.items())
    ratio, rounds = result["speed"]["ratio"], result["settings"]["rounds"]
    text = f"**{ratio:.2f}x** (n {rounds}); precision and recall: {', '.join(listed)}"
    return Measurement(text, {"the time": ratio <= 4})


def search(result: dict) -> Measurement:
    """Return the times relative to the base of each part, and the largest memory."""
    parts: dict[str, list[str]] = {}
    for row in result["rows"]:
        value = f"{row['peak'] / 2**30:.2f} GiB" if "peak" in row else f"{row['time_ratio']:.3g}x"
        if row.get("time_ratio") != 1:
            parts.setdefault(row["part"], []).append(f"{row['candidate']} **{value}**")
    text = "times relative to the base; " + "; ".join(f"{part}: {', '.join(each)}" for part, each in parts.items())
    rows = {(row["part"], row["candidate"]): row for row in result["rows"]}
    one, many = "search, 200,000 rows, 1 queries", "search, 200,000 rows, 100 queries"
    against_faiss = statistics.median(ratios(rows[one, "faiss Flat"], rows[one, "dino, exact"]))
    met = {
        "indexing": rows["index, vit_small", "dino index"]["time_ratio"] <= 1,
        "update": rows["update, 100,000 files", "update of an unchanged folder"]["time_ratio"] <= 3,
        "one query": against_faiss <= 1.2,
        "100 queries": rows[many, "dino, exact"]["time_ratio"] <= 1 / 2,
        "approximate": rows[one, "dino, approximate"]["time_ratio"] <= 1 / 30,
        "memory": all(row["peak"] <= 2 * 2**30 for row in result["rows"] if "peak" in row),
    }
    return Measurement(f"{text}; exact, one query: {against_faiss:.2f}x faiss Flat (median of each round's)", met)


def explore(result: dict) -> Measurement:
    """Return the milliseconds of each part."""
    parts = {row["part"]: row for row in result["rows"]}
    text = ", ".join(f"{name} **{row['ms']:.0f} ms** (n {len(row['times'])})" for name, row in parts.items())
    met = {"first view": parts["first view"]["ms"] <= 1000, "click": parts["search click: results"]["ms"] <= 200}
    return Measurement(text, met)


def attention(result: dict) -> Measurement:
    """Return the Jaccard similarity of each kind of network in the order of the seeds."""
    values: dict[str, list[float]] = {}
    for row in result["rows"]:
        values.setdefault(row["network"], []).append(row["mean of heads"])
    pairs = zip(values["dino"], values["supervised"], strict=True)
    text = "; ".join(f"{kind} **{', '.join(f'{value:.1f}' for value in each)}**" for kind, each in values.items())
    return Measurement(text, {"every seed": all(dino > supervised for dino, supervised in pairs)})


def small_datasets(result: dict) -> Measurement:
    """Return the last accuracy of each run next to its reference scores, and the warning of its plan."""
    runs = sorted(result["runs"], key=lambda run: run["images"])
    text = "; ".join(
        f"{run['images']:,} images, {run['images'] * run['epochs']:,} seen: **{run['last']:.1f}** "
        f"({run['raw_pixels']:.1f}, {run['random_weights']:.1f}{'; warned' if run['warning'] else ''})"
        for run in runs
    )
    met = {
        f"{run['images']:,}": bool(run["warning"]) or run["last"] > max(run["raw_pixels"], run["random_weights"])
        for run in runs
    }
    return Measurement(text, met)


def step(network: str, **options: str) -> str:
    """Return the command of train_step.py."""
    words = "".join(f" --{name} {value}" for name, value in options.items())
    return f"python benchmarks/train_step.py --network {network}{words} --json docs/benchmarks/"


def end(network: str, **options: str) -> str:
    """Return the command of end_to_end.py."""
    return step(network, **options).replace("train_step", "end_to_end")


PAPER = {"views": "2x224+8x96", "k": 65536}
CPU = {"network": "vit_small", "batch": 32, **PAPER}
GPU = {"views": "2x224+8x96", "k": "65536", "workers": "16"}
FAST = ("plain:bfloat16", "plain:float32")
LARGE_GPU = against("plain:float16", target=2.5, share=0.45)
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
        "the same against the plain step in bfloat16",
        "1.8x, half the peak memory",
        step("vit_small", batch="32"),
        "train_step-vit_small.json",
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
    *(
        Row(
            f"GPU, {name}, 2x224 + 8x96, K 65536: from JPEG files to weights, against the plain loop in float16",
            target,
            end(network, batch=batch, **GPU),
            f"end_to_end-{network}-gpu.json",
            read,
            {"network": network, **PAPER},
        )
        for name, network, batch, target, read in (
            (
                "ViT-S/16",
                "vit_small",
                "64",
                "3x, half the memory, 40 % of bfloat16 matmul throughput",
                against("plain:float16", target=3, memory=0.5, share=0.4),
            ),
            ("ViT-B/16", "vit_base", "32", "2.5x, 45 % of matmul throughput", LARGE_GPU),
            ("ViT-S/8", "vit_small_8", "16", "2.5x, 45 % of matmul throughput", LARGE_GPU),
        )
    ),
    *(
        Row(f"lightly's DINO: {what}", "faster", command, file, lightly)
        for what, command, file in (
            ("CPU, ViT-S/16, training step", step("vit_small", batch="32"), "train_step-vit_small.json"),
            ("CPU, ViT-tiny/16, from files", end("vit_tiny"), "end_to_end-vit_tiny.json"),
            ("GPU, ViT-S/16, from files", end("vit_small", batch="64", **GPU), "end_to_end-vit_small-gpu.json"),
        )
    ),
    Row(
        "feature extraction at 224, against timm's inference with the same weights",
        "1x",
        "python benchmarks/extraction.py --json docs/benchmarks/",
        "extraction.json",
        extraction,
    ),
    Row(
        "`small` on two cores, 20-NN after 30 minutes",
        "60 %",
        "python benchmarks/time_to_accuracy.py imagenette128 --recipe small --minutes 30 --workers 0 "
        "--images-per-second 140 --json docs/benchmarks/",
        "time_to_accuracy-small-half-an-hour.json",
        accuracy(60),
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
    return HEAD + "\n".join([*table, *(line(row, folder) for row in ROWS)]) + "\n"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page())
