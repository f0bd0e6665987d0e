"""Measurements in the benchmarks' JSON files: results as text, and the parts of a target that are met."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from common import median_ratio, ratios


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


def extent(values: Sequence[float], digits: int) -> str:
    """Return the smallest, the largest and the number of values."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}, n {len(values)}"


def speedup(row: dict, base: dict) -> str:
    """Return how many times as fast as `base`: the median over the turns, and the spread."""
    turns = ratios(base["seconds"], row["seconds"])
    spread = extent(turns, 2)
    if "cpu_seconds" in row and "cpu_seconds" in base:
        spread += f"; CPU time {median_ratio(base['cpu_seconds'], row['cpu_seconds']):.2f}x"
    return f"**{statistics.median(turns):.2f}x** ({spread})"


def fastest(result: dict, kind: str) -> dict | None:
    """Return the fastest version of a kind that did not fail."""
    rows = [row for row in result["rows"] if row["version"].startswith(kind) and "failed" not in row]
    return max(rows, key=lambda row: row["images_per_s"], default=None)


def reaches(row: dict, base: dict, target: float) -> bool:
    """Return whether the median ratio reaches the target; for a target of 1, whether every turn was faster."""
    turns = ratios(base["seconds"], row["seconds"])
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
        recipes = result["rows"].get(row, {}).get("results", {})
        if "dino" not in recipes:
            return None
        dino, base = recipes["dino"], recipes["pillow + torchvision"]
        return Measurement(speedup(dino, base), {"the speed": reaches(dino, base, target)})

    return read


def extraction(result: dict) -> Measurement:
    """Compare our feature extraction with timm's."""
    rows = {(row["version"], row["network"], row["input"]): row for row in result["rows"]}
    pairs = {key[1:]: (row, rows["timm", *key[1:]]) for key, row in rows.items() if key[0] == "dino"}
    text = ", ".join(f"{network} from {source} {speedup(*pair)}" for (network, source), pair in pairs.items())
    medians = {key: median_ratio(base["seconds"], row["seconds"]) for key, (row, base) in pairs.items()}
    return Measurement(text, {" from ".join(key): ratio >= 1 for key, ratio in medians.items()})


def accuracy(target: float) -> Read:
    """Return the accuracy of every seed at the end of its training."""

    def read(result: dict) -> Measurement:
        points = [entry["curve"][-1] for entry in result["curves"]]
        scores = [point["accuracy"] for point in points]
        listed = ", ".join(f"{score:.1f}" for score in scores)
        after = ", ".join(f"{point['images']:,} in {point['minutes']:.0f} min" for point in points)
        seeds = "one seed" if len(scores) == 1 else f"{len(scores)} seeds, mean {statistics.fmean(scores):.1f}"
        met = {"the accuracy": statistics.fmean(scores) >= target}
        return Measurement(f"**{listed} %** ({seeds}); images: {after}", met)

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
    against_faiss = median_ratio(rows[one, "dino, exact"]["seconds"], rows[one, "faiss Flat"]["seconds"])
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
    text = ", ".join(f"{name} **{row['ms']:.0f} ms** ({extent(row['times'], 0)})" for name, row in parts.items())
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
