"""Every evaluation of a small network by `dino_ssl.evaluate`, in this process or on several ranks."""

from pathlib import Path
from typing import Any

import torch

from dino_ssl.api.calls import evaluate
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.evals.attention_masks import AttentionMasks
from dino_ssl.evals.copy_detection import CopyDetection
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.linear import Linear
from dino_ssl.evals.low_shot import LowShot
from dino_ssl.evals.object_discovery import ObjectDiscovery
from dino_ssl.evals.retrieval import Retrieval
from dino_ssl.evals.two_crop_retrieval import TwoCropRetrieval
from dino_ssl.evals.video_segmentation import VideoSegmentation
from dino_ssl.evals.weak_segmentation import WeakSegmentation
from dino_ssl.models.vit import ViT
from dino_ssl.models.weights import save_backbone

NETWORK = ViT(width=48, depth=2, heads=3, patch=8, image_size=32)
SCENES = Scenes(count=7, size=32, part="test")
LINEAR = Linear(epochs=3, batch=16, lr=(0.01, 0.3), crops=2)


def make(folder: Path) -> Path:
    """Write a network, and images of four classes, one of which is truncated."""
    torch.manual_seed(1)  # differs from the seed of the random weights it is compared with
    save_backbone(NETWORK, NETWORK.build(drop_path=0.0).state_dict(), folder / "network.safetensors")
    for part, count in (("train", 41), ("val", 23)):
        Scenes(count=count, size=32, classes=4, part=part).write(folder / part)  # pyright: ignore[reportArgumentType]
    truncated = sorted((folder / "train").rglob("*.*"))[3]
    truncated.write_bytes(truncated.read_bytes()[:400])
    return folder


def evaluate_all(folder: Path) -> dict[str, Any]:
    """Return the result of every evaluation; numbers of images are odd, so two ranks have unequal shards."""
    train, val = (Folder(path=str(folder / part)) for part in ("train", "val"))
    evaluations: dict[str, tuple[Any, ...]] = {
        "knn": (KNN(k=(1, 5)), train, val),
        "linear": (LINEAR, train, val),
        "linear, fresh crops": (Linear(epochs=2, batch=16, lr=(0.3,), crops=0), train, val),
        "low-shot": (LowShot(share=(0.5,), subsets=2, k=3, tolerance=1e-2), train, val),
        "retrieval": (Retrieval(multiscale=True), SCENES),
        "copy-detection": (CopyDetection(dimensions=8), SCENES),
        "video-segmentation": (VideoSegmentation(), Scenes(count=2, size=32, part="val")),
        "attention-masks": (AttentionMasks(), Scenes(count=5, size=32, part="val")),
        "object-discovery": (
            ObjectDiscovery(methods=("lost", "maskcut", "attention")),
            Scenes(count=5, size=32, part="val"),
        ),
        "weak-segmentation": (
            WeakSegmentation(k=3),
            Scenes(count=7, size=32, classes=2),
            Scenes(count=5, size=32, classes=2, part="val"),
        ),
        "two-crop-retrieval": (TwoCropRetrieval(max_images=29), train),
    }
    network, out = folder / "network.safetensors", folder / "out"
    return {name: evaluate(network, *args, batch_size=5, out=out) for name, args in evaluations.items()}
