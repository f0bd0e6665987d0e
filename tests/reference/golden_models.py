"""The networks against the authors' numbers: the Vision Transformer, the heads, and the names of their
weights.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch

from golden import SINGLE, Check, Result, network_of, read, tensors


def vit(path: Path) -> Result:
    """[CLS], the last two blocks' tokens and the last attention, for images of several sizes."""
    data, check = read(path), Check()
    network = network_of(data)
    for name, images in tensors(data, "input").items():
        with torch.no_grad():
            cls, attention = network(images), network.attention(images)
            last = torch.stack(
                [torch.cat([f.cls[:, None], f.patches.flatten(1, 2)], 1) for f in network.features(images, 2)]
            )
        check_deep(check, f"cls/{name}", cls, data[f"cls/{name}"])
        expected = data[f"attention/{name}"]  # of a large image, only what [CLS] looks at
        check.close(f"attention/{name}", attention if expected.ndim == 4 else attention[:, :, 0], expected)
        expected = data[f"tokens_last2/{name}"]
        check_deep(check, f"tokens_last2/{name}", last if expected.ndim == 4 else last[:, :, 0], expected)
    return check.result()


def check_deep(check: Check, where: str, actual: torch.Tensor, expected: np.ndarray) -> None:
    """A value that went through two blocks or more, and is larger than 10, may be 1e-4 off."""
    check.close(where, actual, expected, np.where(np.abs(expected) > 10, 1e-4, SINGLE))


def head(path: Path) -> Result:
    """Every head of the file, its depth and its norm read from its weights."""
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
        network.train()  # a batch norm takes the batch's own statistics
        check.close(f"{tag}/output", network(torch.from_numpy(data[f"{tag}/input"])), data[f"{tag}/output"])
    return check.result()


def official_state_dict_keys(path: Path) -> Result:
    """Names and shapes of the authors' released files, against networks of the same names here."""
    check = Check()
    for name, expected in json.loads(path.read_text()).items():
        with torch.device("meta"):
            actual = {key: list(value.shape) for key, value in released(name, expected).items()}
        check.equal(name, {key: actual.get(key) for key in expected}, expected)
        check.equal(f"{name}, names that the file lacks", sorted(set(actual) - set(expected)), [])
    return check.result()


def released(name: str, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """This project's state dict for an entry of official_state_dict_keys.json."""
    from dino_ssl.models import DINOHead, Network, Timm, ViT

    if found := re.search(r"vit_(tiny|small|base)_patch(\d+)$", name):
        backbone = ViT(size=found[1], patch=int(found[2])).build()
    else:
        backbone = Timm(name=name).build()
    if not name.startswith("full_checkpoint_student"):
        return backbone.state_dict()
    k, bottleneck = shapes["module.head.last_layer.weight_v"]
    hidden = shapes["module.head.mlp.0.weight"][0]
    layers = sum(len(shape) == 2 and ".mlp." in key and ".head." in key for key, shape in shapes.items())
    network = Network(backbone, DINOHead(backbone.embed_dim, k, layers=layers, hidden=hidden, bottleneck=bottleneck))
    return {f"module.{key}": value for key, value in network.state_dict().items()}
