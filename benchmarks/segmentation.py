"""Speed of TokenCut, effect of the refinement, and quality of masks: the numbers and images of docs/segment.md.

python benchmarks/segmentation.py speed                            TokenCut with a dense solver and with Lanczos
python benchmarks/segmentation.py refinement [--voc VOC2012]       J and F of coarse and refined true masks
python benchmarks/segmentation.py quality runs/demo-0 runs/demo-1 runs/demo-2      masks of trained networks
python benchmarks/segmentation.py weak runs/demo-0 runs/demo-1 runs/demo-2         heads that learn from masks
python benchmarks/segmentation.py images runs/demo-0               docs/images/segment.jpg

The numbers are written to docs/benchmarks/segmentation-NAME.json.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dino_ssl
from common import about, interleave, median_ratio, save
from dino_ssl.data.benchmarks.voc import Masked, open_voc
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import open_dataset
from dino_ssl.data.synthetic.scenes import SMALL_OBJECTS, Scenes
from dino_ssl.discovery.guided_filter import refine
from dino_ssl.discovery.methods import tokencut
from dino_ssl.discovery.regions import box_of, component_at
from dino_ssl.discovery.spectral import binary_graph
from dino_ssl.evals.attention_maps import network_input
from dino_ssl.evals.davis_score import contour_accuracy, jaccard
from dino_ssl.evals.label_propagation import resize_nearest
from dino_ssl.evals.object_discovery import center_box
from dino_ssl.evals.object_masks import ObjectMasks, patch_features
from dino_ssl.evals.weak_segmentation import WeakSegmentation
from dino_ssl.loading import open_checkpoint
from dino_ssl.models.vit import ViT
from dino_ssl.segmentation.masks import Segmenter, SegmentSettings
from dino_ssl.viz.rendering import save_image, sheet
from dino_ssl.viz.tracking import overlay_mask

SIDE = 28
"""Rows and columns of patches: 784 tokens, an image of 448 px with patches of 16."""
METHODS = ("attention", "lost", "tokencut")


# -- speed -----------------------------------------------------------------------------------------------------------


def plain_tokencut(
    features: Tensor, grid: tuple[int, int], solve: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return mask and box of one image, [N, D], with a dense solver of the second eigenvector of the graph [N, N]."""
    unit = F.normalize(features, dim=-1)
    vector = solve(np.where((unit @ unit.T).numpy() > 0.2, 1.0, 1e-5))
    seed = int(np.abs(vector).argmax())
    side = vector > vector.mean()
    mask = component_at((side if side[seed] else ~side).reshape(grid), seed)
    return mask, box_of(mask, 16)


def torch_eigenvector(graph: np.ndarray) -> np.ndarray:
    """Return the second eigenvector by a complete decomposition of the normalized graph."""
    root = np.sqrt(graph.sum(1))
    return torch.linalg.eigh(torch.from_numpy(graph / root / root[:, None])).eigenvectors[:, -2].numpy() / root


def scipy_eigenvector(graph: np.ndarray) -> np.ndarray:
    """Return the second eigenvector of the generalized problem, for two eigenvectors only, as the published code."""
    import scipy.linalg

    degree = np.diag(graph.sum(1))
    return scipy.linalg.eigh(degree - graph, degree, subset_by_index=[1, 2])[1][:, 0]


def keys_of(count: int) -> tuple[Tensor, float]:
    """Return the keys of drawn images by a ViT-S/16 with random weights [count, 784, 384], and seconds per image."""
    torch.manual_seed(0)
    network = ViT(size="small", patch=16).build(drop_path=0.0).eval()
    images = np.stack([Scenes(size=16 * SIDE).read(index) for index in range(count)])
    with torch.inference_mode():
        inputs = network_input(network, images)
        start = time.process_time()
        keys = torch.cat([patch_features(network, image[None]) for image in inputs])
        seconds = time.process_time() - start
    return keys - keys.mean(1, keepdim=True), seconds / count


def peak_memory(work: Callable[[], object]) -> float:
    """Return the growth of the largest resident memory in MB, in a fork of this process."""

    def measure(pipe: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)

    receive, send = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=measure, args=(send,))
    process.start()
    memory = receive.recv()
    process.join()
    return memory


def speed(count: int, rounds: int = 5) -> dict[str, Any]:
    """Return masks per processor second of each implementation, on one thread, at 784 tokens: medians of the rounds."""
    torch.set_num_threads(1)
    keys, network_seconds = keys_of(count)
    grid = (SIDE, SIDE)
    implementations: dict[str, Callable[[], list[np.ndarray]]] = {
        "plain, torch.linalg.eigh": lambda: [plain_tokencut(each, grid, torch_eigenvector)[0] for each in keys],
        "plain, scipy.linalg.eigh, two eigenvectors": lambda: [
            plain_tokencut(each, grid, scipy_eigenvector)[0] for each in keys
        ],
        "Lanczos": lambda: [found.masks[0] for part in keys.split(8) for found in tokencut(part, grid)],
        "the graph alone, which all need": lambda: [binary_graph(each[None], 0.2)[0, 0].numpy() for each in keys],
    }
    first, _, lanczos, _ = implementations
    with torch.inference_mode():  # as the commands do
        masks = {name: np.stack(work()) for name, work in implementations.items()}  # warm-up
        times = interleave(implementations, rounds, time.process_time)
        results = {
            name: {
                "masks per second": count / statistics.median(seconds),
                "ratio": median_ratio(times[first], seconds),
                "peak memory in MB": peak_memory(implementations[name]),
                "seconds": [round(each, 4) for each in seconds],
            }
            for name, seconds in times.items()
        }
    return {
        "tokens": SIDE**2,
        "images": count,
        "rounds": rounds,
        "equal patches": float((masks[first] == masks[lanczos]).mean()),
        "seconds of a ViT-S/16 per image, apart": network_seconds,
        "implementations": results,
    }


# -- refinement ------------------------------------------------------------------------------------------------------


def refinement(voc: Path | None) -> dict[str, Any]:
    """Return mean J and F of true masks that are rounded to patches, before and after the guided filter."""
    sets: dict[str, tuple[ImageDataset, int]] = {
        "scenes, 96 px, patch 8": (Scenes(count=40, size=96, part="val").open(), 8),
        "scenes, 320 px, patch 16": (Scenes(count=20, size=320, part="val").open(), 16),
    }
    if voc is not None:
        sets["VOC 2012, patch 16"] = (open_voc(voc), 16)
    return {name: _refinement(*each) for name, each in sets.items()}


def _refinement(dataset: ImageDataset, patch: int) -> dict[str, list[float]]:
    assert isinstance(dataset, Masked)
    scores: dict[str, list[tuple[float, float]]] = {}
    for index in range(len(dataset)):
        image, labels = dataset.read(index), dataset.mask(index)
        for number in np.setdiff1d(labels, (0, 255)):
            true = labels == number
            grid = tuple(max(1, round(side / patch)) for side in true.shape)
            coarse = cv2.resize(true.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA) > 0.5
            if not coarse.any():
                continue
            values = coarse.astype(np.float32)
            versions = {
                "patches": resize_nearest(coarse, *true.shape),
                "bilinear": cv2.resize(values, true.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0.5,
                "guided filter": refine(image, values, patch) > 0.5,
            }
            for name, mask in versions.items():
                scores.setdefault(name, []).append((jaccard(mask, true), contour_accuracy(mask, true)))
    return {name: np.mean(pairs, axis=0).round(3).tolist() for name, pairs in scores.items()}


# -- quality -----------------------------------------------------------------------------------------------------------


def networks(checkpoints: list[str]) -> Iterator[tuple[int, str, Any]]:
    """Yield (seed, name, network) of each checkpoint, and of random weights of the same network."""
    for seed, path in enumerate(checkpoints):
        checkpoint = open_checkpoint(path)
        assert checkpoint.fresh is not None
        torch.manual_seed(seed)
        yield seed, "trained", checkpoint.backbone
        yield seed, "random weights", checkpoint.fresh()


def quality(checkpoints: list[str], data: str, count: int) -> dict[str, Any]:
    """Return the mean J of each method for trained networks, random weights, and the box in the center."""
    dataset = open_dataset(data, part="val").evenly_spaced(count)
    source = open_dataset(data, part="val")
    assert isinstance(source, Masked)
    chosen = [source.names.index(name) for name in dataset.names]
    images, masks = [source.read(i) for i in chosen], [source.mask(i) > 0 for i in chosen]
    box = float(np.mean([jaccard(center_box(*mask.shape)[0], mask) for mask in masks]))
    rows = []
    for seed, name, network in networks(checkpoints):
        row: dict[str, Any] = {"seed": seed, "network": name}
        for method in METHODS:
            for is_refined in (False, True):
                segmenter = Segmenter(network, SegmentSettings(find=ObjectMasks(method=method), refine=is_refined))
                found = [result for image in images for result in segmenter([image])]
                value = np.mean([jaccard(each.masks.any(0), mask) for each, mask in zip(found, masks, strict=True)])
                row[f"{method}{', refined' if is_refined else ''}"] = round(float(value), 3)
        rows.append(row)
    return {"data": data, "images": len(images), "box in the center": round(box, 3), "rows": rows}


def weak(checkpoints: list[str], data: str, count: int) -> dict[str, Any]:
    """Return the mIoU of a linear head by the masks that it learned from, for trained networks and random weights."""
    rows = []
    for seed, name, network in networks(checkpoints):
        values = dino_ssl.evaluate(network, WeakSegmentation(max_images=count), data, references=False)["values"]
        rows.append({"seed": seed, "network": name, **{row: round(value, 2) for row, value in values.items()}})
    return {"data": data, "images": count, "rows": rows}


def draw_images(checkpoint: str, path: Path, count: int = 6) -> Path:
    """Draw synthetic images with the masks of each method."""
    network, scenes = open_checkpoint(checkpoint).backbone, SMALL_OBJECTS
    blocks = []
    for index in range(count):
        image, true = scenes.draw(10 + index)
        panels = [("image", image), ("true mask", overlay_mask(image, true))]
        for method in METHODS:
            (found,) = Segmenter(network, SegmentSettings(find=ObjectMasks(method=method)))([image])
            panels.append((method, overlay_mask(image, found.labels)))
        blocks.append([(label, cv2.resize(panel, (192, 192))) for label, panel in panels])
    return save_image(path, sheet(blocks), quality=88)


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    rows = result.get("rows") or [{"": name, **_flat(values)} for name, values in _tables(result)]
    table = Table(*rows[0], title=", ".join(f"{k} {v}" for k, v in result.items() if not isinstance(v, dict | list)))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def _tables(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list((result.get("implementations") or result).items())


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {name: " / ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("speed", "refinement", "quality", "weak", "images"))
    parser.add_argument("checkpoints", nargs="*")
    parser.add_argument("--count", type=int, default=16, help="images; 100 are enough for quality and weak")
    parser.add_argument("--data", default="small-objects")
    parser.add_argument("--voc", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if options.name == "images":
        print(draw_images(options.checkpoints[0], options.out / "images/segment.jpg"))
        return
    measure = {
        "speed": lambda: speed(options.count),
        "refinement": lambda: refinement(options.voc),
        "quality": lambda: quality(options.checkpoints, options.data, options.count),
        "weak": lambda: weak(options.checkpoints, options.data, options.count),
    }[options.name]
    result, path = measure(), options.out / f"benchmarks/segmentation-{options.name}.json"
    show(result)
    save(path, {"benchmark": "segmentation", **about(vars(options)), **result})
    print(path)


if __name__ == "__main__":
    main()
