"""Reference checks of the Vision Transformer, the heads, and the names of their weights."""

import json
import re
from pathlib import Path

import numpy as np
import torch

from golden import SINGLE, Check, Result, network_of, read, tensors


def vit(path: Path) -> Result:
    """Check [CLS], the tokens of the last two blocks and the last attention for images of several sizes."""
    data, check = read(path), Check()
    network = network_of(data)
    for name, images in tensors(data, "input").items():
        with torch.no_grad():
            cls, attention = network(images), network.get_last_selfattention(images)
            last = torch.stack(network.get_intermediate_layers(images, 2))
        check_deep(check, f"cls/{name}", cls, data[f"cls/{name}"])
        expected = data[f"attention/{name}"]  # for a large image, only the queries of [CLS]
        check.close(f"attention/{name}", attention if expected.ndim == 4 else attention[:, :, 0], expected)
        expected = data[f"tokens_last2/{name}"]
        check_deep(check, f"tokens_last2/{name}", last if expected.ndim == 4 else last[:, :, 0], expected)
    return check.result()


def check_deep(check: Check, where: str, actual: torch.Tensor, expected: np.ndarray) -> None:
    """Compare values after two or more blocks; those larger than 10 have a tolerance of 1e-4."""
    check.close(where, actual, expected, np.where(np.abs(expected) > 10, 1e-4, SINGLE))


def head(path: Path) -> Result:
    """Check every head of the file; depth and norm are inferred from its weights."""
    from dino_ssl.models.heads import DINOHead

    data, check = read(path), Check()
    for tag in sorted({name.split("/")[0] for name in data.files if "/weights/" in name}):
        weights = tensors(data, f"{tag}/weights")
        linear = [name for name, value in weights.items() if name.startswith("mlp.") and value.ndim == 2]
        first, (k, bottleneck) = weights[linear[0]], weights["last_layer.weight_v"].shape
        network = DINOHead(
            first.shape[1],
            k,
            layers=len(linear),
            hidden=first.shape[0],
            bottleneck=bottleneck,
            norm="batch" if any("running_mean" in name for name in weights) else "none",
        )
        network.load_state_dict(weights)
        network.train()  # batch norm uses the statistics of the batch
        check.close(f"{tag}/output", network(torch.from_numpy(data[f"{tag}/input"])), data[f"{tag}/output"])
    return check.result()


def official_state_dict_keys(path: Path) -> Result:
    """Check the names and shapes of the weights in the authors' released files."""
    check = Check()
    for name, expected in json.loads(path.read_text()).items():
        with torch.device("meta"):
            actual = {key: list(value.shape) for key, value in released(name, expected).items()}
        check.equal(name, {key: actual.get(key) for key in expected}, expected)
        check.equal(f"{name}, names that are not in the file", sorted(set(actual) - set(expected)), [])
    return check.result()


def released(name: str, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Return this project's state dict for an entry of official_state_dict_keys.json."""
    from dino_ssl.models import DINOHead, Network, Timm, ViT

    if match := re.search(r"vit_(tiny|small|base)_patch(\d+)$", name):
        backbone = ViT(size=match[1], patch=int(match[2])).build()
    else:
        backbone = Timm(name=name).build()
    if not name.startswith("full_checkpoint_student"):
        return backbone.state_dict()
    k, bottleneck = shapes["module.head.last_layer.weight_v"]
    hidden = shapes["module.head.mlp.0.weight"][0]
    layers = sum(len(shape) == 2 and ".mlp." in key and ".head." in key for key, shape in shapes.items())
    network = Network(backbone, DINOHead(backbone.embed_dim, k, layers=layers, hidden=hidden, bottleneck=bottleneck))
    return {f"module.{key}": value for key, value in network.state_dict().items()}
