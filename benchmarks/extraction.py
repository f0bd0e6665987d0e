"""Feature extraction for evaluations: images/s of `extract`, and of timm's inference with the same network and weights.

    python benchmarks/extraction.py [--networks vit_small resnet50] [--images 256] [--batch 64] [--json F]

Input `memory` is the forward pass only, on a batch in memory: ours on uint8 images as its loader gives them (channels
last), timm's on normalized float images as its own loader gives them. Input `files` is from JPEG files to features in
memory: ours is `dino_ssl.evals.features.extract`, timm's a DataLoader of Pillow images with timm's evaluation
transform. Weights are random and the same. Both take turns in one process. `cosine` is the smallest cosine similarity
between the two features of an image, `max_error` their largest difference over the largest feature. From files the
images differ by a gray level, because the two resize with different code.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import SIZES, PillowImages, about, interleave, median_ratio, save, write_images
from dino_ssl.data.folder import Folder
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.features import extract
from dino_ssl.models.backbone import Backbone
from dino_ssl.preprocessing import normalize
from dino_ssl.runtime import Runtime, start
from lightly_dino import timm_network
from workload import NETWORKS

Candidates = dict[str, Callable[[], Tensor]]


def build(name: str, rt: Runtime) -> tuple[Backbone, nn.Module]:
    """Return our network and timm's with the same weights."""
    torch.manual_seed(0)
    network = NETWORKS[name].build(drop_path=0.0)
    timm = timm_network(NETWORKS[name], 0.0)
    timm.load_state_dict(network.state_dict())
    return network.to(rt.device), timm.to(rt.device).eval()


def from_memory(network: Backbone, timm: nn.Module, rt: Runtime, size: int, batch: int) -> Candidates:
    """Return the forward passes on random images."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=rng).movedim(-1, 1)
    on_device, floats = images.to(rt.device), normalize(images).contiguous().to(rt.device)

    def run_timm() -> Tensor:
        with torch.inference_mode(), rt.autocast():
            return timm(floats).float().cpu()

    def run_dino() -> Tensor:
        with evaluating(network), rt.autocast():
            return network(normalize(on_device)).float().cpu()

    return {"timm": run_timm, "dino": run_dino}


def from_files(
    network: Backbone, timm: nn.Module, rt: Runtime, size: int, batch: int, folder: Path, workers: int
) -> Candidates:
    """Return the functions from JPEG files to features in memory."""
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=224 / 256)
    images, dataset = PillowImages(folder, transform), Folder(path=str(folder)).open()
    context = EvalContext(device=rt.device, size=size, batch_size=batch, workers=workers, autocast=rt.autocast)
    on_gpu = rt.device.type == "cuda"

    def run_timm() -> Tensor:
        loader = DataLoader(images, batch, num_workers=workers, pin_memory=on_gpu)
        with torch.inference_mode(), rt.autocast():
            return torch.cat([timm(images.to(rt.device, non_blocking=True)).float().cpu() for images in loader])

    def run_dino() -> Tensor:
        return extract(network, dataset, context).features

    return {"timm": run_timm, "dino": run_dino}


def measure(candidates: Candidates, turns: int) -> list[dict[str, Any]]:
    """Return one row per candidate, timm's first: images/s, ratio to timm, and the distance of the features."""
    features = {name: run() for name, run in candidates.items()}
    times, base = interleave(candidates, turns), features["timm"]
    return [
        {
            "version": name,
            "images_per_s": len(base) / statistics.median(seconds),
            "ratio": median_ratio(times["timm"], seconds),
            "cosine": F.cosine_similarity(base, features[name]).min().item(),
            "max_error": ((base - features[name]).abs().max() / base.abs().max()).item(),
            "seconds": seconds,
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["vit_small", "resnet50"])
    parser.add_argument("--images", type=int, default=256, help="number of generated JPEG files")
    parser.add_argument("--files-size", choices=list(SIZES), default="500", help="their width")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], help="default: the fastest")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    rows = []
    with start(options.precision) as rt, tempfile.TemporaryDirectory() as scratch:
        folder = write_images(Path(scratch), options.images, *SIZES[options.files_size])
        for name in options.networks:
            common = (*build(name, rt), rt, options.size, options.batch)
            inputs = {"memory": from_memory(*common), "files": from_files(*common, folder, options.workers)}
            for source, candidates in inputs.items():
                measured = measure(candidates, options.turns)
                rows += [{"network": name, "input": source, "precision": rt.precision, **row} for row in measured]
    description = about(vars(options))
    table = Table("network", "input", "version", "images/s", "ratio", "cosine", title=description["machine"])
    for row in rows:
        speed = f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}", f"{row['cosine']:.6f}"
        table.add_row(row["network"], row["input"], row["version"], *speed)
    Console().print(table)
    save(options.json, {"benchmark": "extraction", **description, "rows": rows})


if __name__ == "__main__":
    main()
