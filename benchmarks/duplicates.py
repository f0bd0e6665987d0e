"""Duplicates: edited copies hidden among photographs, against imagededup; and the time among many vectors.

    python benchmarks/duplicates.py imagenette128/train runs/photos --json docs/benchmarks/duplicates.json

`quality`: of photographs, some get one copy each by an edit of `search.calibration`: JPEG, crop, resize, blur, color,
text, mirror. A pair of images in one group is correct if one is the edited copy of the other. Tiers are cumulative.
Seconds: of the index (hashes and features) or of imagededup's hashes, and of the comparison. One network has random
weights, the others are those given. imagededup (group `bench`) runs PHash at its default distance and at ours.

`speed`: all tiers on random unit vectors of 200 true groups, against one search of the 5 nearest neighbors of each
vector by faiss (IVF316,Flat, nprobe 4), interleaved. `ratio`: our time divided by faiss's, median over the rounds.
"""

import argparse
import importlib.util
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import distributions, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch

from common import about, interleave, save
from dino_ssl import Index
from dino_ssl.data.decode import decode
from dino_ssl.data.folder import Folder
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.vit import ViT
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.search.calibration import EDITS
from dino_ssl.search.duplicates import TIERS, find_duplicates

Pairs = set[frozenset[str]]


def hide_copies(photos: Path, folder: Path, images: int, copies: int) -> dict[frozenset[str], str]:
    """Write images and edited copies of some of them to a folder; return the edit of each pair of names."""
    dataset, rng = Folder(path=str(photos)).open(), np.random.default_rng(0)
    chosen = random.Random(0).sample(range(len(dataset)), images)
    edits = itertools.cycle(EDITS.items())
    pairs = {}
    for number, index in enumerate(chosen):
        path = folder / f"{number:05}.jpg"
        path.write_bytes(dataset.encoded(index))
        if number < copies:
            edit, function = next(edits)
            copy = folder / f"{random.Random(number).randrange(10**9):09}-{number:05}.jpg"
            pixels = function(decode(path), rng)
            cv2.imwrite(str(copy), pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
            pairs[frozenset((path.name, copy.name))] = edit
    return pairs


def score(found: Pairs, true: dict[frozenset[str], str]) -> dict[str, Any]:
    """Return precision and recall, in all and by edit."""
    hits = found & true.keys()
    recalls = {edit: [pair in hits for pair, other in true.items() if other == edit] for edit in EDITS}
    return {
        "pairs": len(found),
        "precision": len(hits) / len(found) if found else None,
        "recall": len(hits) / len(true),
        "recalls": {edit: sum(each) / len(each) for edit, each in recalls.items() if each},
    }


def in_groups(groups: Iterable[Iterable[str]]) -> Pairs:
    return {frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)}


def ours(checkpoint: Any, folder: Path, true: dict[frozenset[str], str], work: Path) -> dict[str, Any]:
    """Return the scores of each tier together with the stricter ones, and the seconds."""
    started = time.perf_counter()
    index = Index.build(checkpoint, folder, path=work)
    built = time.perf_counter()
    result = index.duplicates()
    calibrated = time.perf_counter()
    result = index.duplicates()
    seconds = {"index": built - started, "threshold": calibrated - built, "find": time.perf_counter() - calibrated}
    names, rows = index.items.names, {}
    for number, tier in enumerate(TIERS):
        tiers = TIERS[: number + 1]
        groups = [[group.keep, *(copy.row for copy in group.copies if copy.tier in tiers)] for group in result.groups]
        rows[tier] = score(in_groups([names[row] for row in group] for group in groups), true)
    assert result.calibration is not None
    calibration = {name: getattr(result.calibration, name) for name in ("threshold", "precision", "recall")}
    return {"tiers": rows, "seconds": seconds, "calibration": calibration}


def imagededup(folder: Path, true: dict[frozenset[str], str]) -> dict[str, Any]:
    """Return the scores of its perceptual hash at two distances, and the seconds."""
    from imagededup.methods import PHash

    hasher = PHash(verbose=False)
    started = time.perf_counter()
    codes = hasher.encode_images(str(folder), num_enc_workers=0)
    encoded = time.perf_counter()
    results: dict[str, Any] = {"seconds": {"hashes": encoded - started}}
    for distance in (10, 6):
        start = time.perf_counter()
        found = hasher.find_duplicates(encoding_map=codes, max_distance_threshold=distance, num_dist_workers=0)
        pairs = {frozenset((name, other)) for name, others in found.items() for other in others}
        results[f"distance {distance}"] = score(pairs, true) | {"seconds": time.perf_counter() - start}
    return results


def random_network() -> Backbone:
    """Return ViT-tiny/16 with random weights, for images of 128 pixels."""
    torch.manual_seed(0)
    network = ViT(size="tiny", patch=16, image_size=128).build()
    network.transform = Preprocessing(size=128)
    return network


def quality(photos: Path, checkpoints: dict[str, Any], images: int, copies: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "images")
        folder.mkdir()
        true = hide_copies(photos, folder, images, copies)
        results: dict[str, Any] = {"images": images, "copies": copies}
        for label, checkpoint in checkpoints.items():
            results[label] = ours(checkpoint, folder, true, Path(name, label))
        if importlib.util.find_spec("imagededup"):
            results["imagededup"] = imagededup(folder, true)
        return results


def speed(count: int, width: int, rounds: int) -> dict[str, Any]:
    import faiss

    rng = np.random.default_rng(0)
    basis = rng.standard_normal((12, width)).astype(np.float32)  # a manifold, as features are
    rows = rng.standard_normal((count, 12)).astype(np.float32) @ basis + 0.3 * rng.standard_normal((count, width))
    copies = rng.choice(count, 400, replace=False)
    rows[copies[200:]] = rows[copies[:200]] + 0.02 * rng.standard_normal((200, width))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    items = SimpleNamespace(
        names=[f"{row:07}.jpg" for row in range(count)],
        content_hashes=np.array([f"{row:032x}" for row in range(count)]),
        perceptual_hashes=rng.integers(0, 2**64, count, dtype=np.uint64),
        widths=np.full(count, 640),
        heights=np.full(count, 480),
        sizes_bytes=np.full(count, 50_000),
    )
    groups: list[int] = []

    def find() -> None:
        groups.append(len(find_duplicates(rows, items, 0.99, read=lambda row: np.array([row]))))

    def self_knn() -> None:
        vectors = rows.astype(np.float32)
        index = faiss.index_factory(width, "IVF316,Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[::4])
        index.add(vectors)
        faiss.extract_index_ivf(index).nprobe = 4
        index.search(vectors, 6)

    faiss.omp_set_num_threads(torch.get_num_threads())
    seconds = interleave({"duplicates": find, "faiss": self_knn}, rounds)
    ratios = [a / b for a, b in zip(seconds["duplicates"], seconds["faiss"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shape = {"count": count, "width": width}
    return {**shape, "seconds": medians, "ratio": statistics.median(ratios), "groups": groups[0], "true_groups": 200}


def is_installed(name: str) -> bool:
    return any(name == distribution.name.lower() for distribution in distributions())


def show(result: dict[str, Any]) -> None:
    """Print the results as tables."""
    quality, speed = result["quality"], result["speed"]
    print(f"{quality['copies']} edited copies among {quality['images'] + quality['copies']} images")
    for name, part in quality.items():
        if not isinstance(part, dict):
            continue
        rows = part.get("tiers") or {row: value for row, value in part.items() if row != "seconds"}
        for row, scores in rows.items():
            recalls = ", ".join(f"{edit} {value:.2f}" for edit, value in scores["recalls"].items())
            precision = "none" if scores["precision"] is None else f"{scores['precision']:.3f}"
            print(f"  {name:<16} {row:<12} precision {precision:<6} recall {scores['recall']:.3f}   {recalls}")
        print("   ", ", ".join(f"{what} {value:.1f} s" for what, value in part["seconds"].items()))
    print(
        f"{speed['count']:,} x {speed['width']}: {speed['seconds']}, ratio {speed['ratio']:.2f}, "
        f"{speed['groups']} groups of {speed['true_groups']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("checkpoints", nargs="*", help="runs, files or names, besides random weights of ViT-tiny/16")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=280)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = about(vars(options) | {"checkpoints": [Path(name).name for name in options.checkpoints]})
    result["versions"] |= {
        name: version(name) for name in ("faiss-cpu", "imagehash", "imagededup") if is_installed(name)
    }
    checkpoints = {"random weights": random_network(), **{Path(name).name: name for name in options.checkpoints}}
    result["quality"] = quality(options.photos, checkpoints, options.images, options.copies)
    result["speed"] = speed(options.vectors, 384, options.rounds)
    save(options.json, result)
    show(result)


if __name__ == "__main__":
    main()
