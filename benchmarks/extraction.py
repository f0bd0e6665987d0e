"""Features for evaluation: images/s of `extract`, against timm's plain inference of the same network and weights.

    python benchmarks/extraction.py [--networks vit_small resnet50] [--pictures 256] [--batch 64] [--json F]

`network` is the forward pass alone, over a batch that lies in memory: ours from the uint8 pictures that its loader
gives (channels last), timm's from normalised float ones as its own gives (channel by channel). `files` is from JPEG
files to features in memory: ours is `dino_ssl.evals.features.extract`, timm's a DataLoader of Pillow pictures through
timm's own evaluation transform. Weights are random and the same. The candidates take turns in one process; medians,
and ratios to timm. `cosine` is the least cosine between a picture's two features; `off` the largest difference of
them, over the largest feature. From files the two resize by code of their own, which may differ by a grey level.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.features import extract
from dino_ssl.models.backbone import Backbone
from dino_ssl.runtime import Runtime, start
from end_to_end import SIZES, drawn
from lightly_dino import timm_network
from turns import about, save
from work import NETWORKS


class Files(Dataset):
    """Pictures as timm's validation sees them, in the same order."""

    def __init__(self, root: Path, names: list[str], size: int) -> None:
        from timm.data.transforms_factory import create_transform

        self.files = [root / name for name in names]
        self.transform: Any = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=224 / 256)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with self.files[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def pair(name: str, rt: Runtime) -> tuple[Backbone, nn.Module]:
    """Our network and timm's, alike."""
    torch.manual_seed(0)
    ours = NETWORKS[name].build(drop_path=0.0)
    theirs = timm_network(NETWORKS[name], 0.0)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(rt.device), theirs.to(rt.device).eval()


def passes(ours: Backbone, theirs: nn.Module, rt: Runtime, size: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    """The forward pass alone."""
    draw = torch.Generator().manual_seed(0)
    dataset = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=draw).movedim(-1, 1)
    placed, floats = dataset.to(rt.device), normalize(dataset).contiguous().to(rt.device)

    def by_timm() -> Tensor:
        with torch.inference_mode(), rt.autocast():
            return theirs(floats).float().cpu()

    def by_us() -> Tensor:
        with evaluating(ours), rt.autocast():
            return ours(normalize(placed)).float().cpu()

    return {"timm": by_timm, "dino": by_us}


def from_files(
    ours: Backbone,
    theirs: nn.Module,
    rt: Runtime,
    size: int,
    batch: int,
    root: Path,
    dataset: ImageDataset,
    workers: int,
) -> dict[str, Callable[[], Tensor]]:
    """From JPEG files to features in memory."""
    pin = rt.device.type == "cuda"

    def by_timm() -> Tensor:
        loader = DataLoader(Files(root, dataset.names, size), batch, num_workers=workers, pin_memory=pin)
        with torch.inference_mode(), rt.autocast():
            return torch.cat([theirs(images.to(rt.device, non_blocking=True)).float().cpu() for images in loader])

    def by_us() -> Tensor:
        context = EvalContext(device=rt.device, size=size, batch_size=batch, workers=workers, autocast=rt.autocast)
        return extract(ours, dataset, context).features

    return {"timm": by_timm, "dino": by_us}


def measured(candidates: dict[str, Callable[[], Tensor]], turns: int) -> list[dict[str, Any]]:
    """A row per candidate, timm's first: images/s, times timm, and how far the features are from timm's."""
    features = {name: run() for name, run in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(candidates))
    found = []
    for name, each in seconds.items():
        one, other = features[first], features[name]
        found.append(
            {
                "version": name,
                "images_per_s": len(other) / statistics.median(each),
                "ratio": statistics.median(base / own for base, own in zip(seconds[first], each, strict=True)),
                "cosine": F.cosine_similarity(one, other).min().item(),
                "off": ((one - other).abs().max() / one.abs().max()).item(),
                "seconds": each,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["vit_small", "resnet50"])
    parser.add_argument("--pictures", type=int, default=256, help="JPEG files that are drawn")
    parser.add_argument("--files-size", choices=list(SIZES), default="500", help="their width")
    parser.add_argument("--size", type=int, default=224, help="side in pixels that the network sees")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16", "float16"], help="what is fastest here without it"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    with start(options.precision) as rt, tempfile.TemporaryDirectory() as scratch:
        root = drawn(Path(scratch), options.dataset, *SIZES[options.files_size])
        dataset = Folder(path=str(root)).open()
        for name in options.networks:
            ours, theirs = pair(name, rt)
            common = (ours, theirs, rt, options.size, options.batch)
            ways = {
                "network": passes(*common),
                "files": from_files(*common, root, dataset, options.workers),
            }
            for way, candidates in ways.items():
                rows = measured(candidates, options.turns)
                found += [{"network": name, "way": way, "precision": rt.precision, **row} for row in rows]
    said = about(vars(options))
    table = Table("network", "way", "version", "images/s", "times timm", "cosine", title=said["machine"])
    for row in found:
        speed = f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}", f"{row['cosine']:.6f}"
        table.add_row(row["network"], row["way"], row["version"], *speed)
    Console().print(table)
    save(options.json, {"benchmark": "extraction", **said, "rows": found})


if __name__ == "__main__":
    main()
