"""A linear classifier of patches, which is a 1 x 1 convolution on the feature map, and its file.

Shapes: P patches, D dimensions, C classes, of which class 0 is the background.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_ssl.errors import UserError
from dino_ssl.evals.base import evaluating
from dino_ssl.evals.low_shot import fit_logistic
from dino_ssl.files import atomic_write, check_format
from dino_ssl.models.backbone import Backbone

FORMAT = 1
"""Version of the file."""


@dataclass(frozen=True)
class SegmentationHead:
    """Logits of classes from the features of patches."""

    weight: Tensor
    """[C, D] float32."""
    bias: Tensor
    """[C] float32."""
    classes: tuple[str, ...]
    """Names of the classes 1 .. C - 1; class 0 is the background."""
    weights_hash: str
    """Hash of the network whose features it classifies."""
    size: int
    """Short side in pixels of the network's input."""

    def __call__(self, patches: Tensor) -> Tensor:
        """Return logits: [B, h, w, D] -> [B, C, h, w]."""
        kernel = self.weight[:, :, None, None].to(patches.device)
        return F.conv2d(patches.float().permute(0, 3, 1, 2), kernel, self.bias.to(patches.device))

    def save(self, path: Path) -> Path:
        """Write the head atomically as safetensors, with the rest as JSON in its metadata."""
        described = {"format": FORMAT, "classes": self.classes, "weights": self.weights_hash, "size": self.size}
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias}
        return atomic_write(path, lambda part: save_file(tensors, part, {"dino": json.dumps(described)}))

    @staticmethod
    def load(path: str | Path) -> "SegmentationHead":
        """Read a head. Raises UserError for any other file."""
        if not Path(path).is_file():
            raise UserError(f"There is no file {path}: expected a head of `dino eval weak-segmentation`.")
        try:
            with safe_open(path, "pt") as file:
                described: Any = json.loads((file.metadata() or {})["dino"])
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            check_format(Path(path), described["format"], FORMAT)
            classes = tuple(map(str, described["classes"]))
            if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(weight) != len(classes) + 1:
                raise ValueError(f"{tuple(weight.shape)} weights for {len(classes)} classes")
            return SegmentationHead(weight, bias, classes, str(described["weights"]), int(described["size"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a head of `dino eval weak-segmentation`: {error}.") from error


def fit_head(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Return weight [C, D] and bias [C] of the logistic regression of labels [P] on features [P, D].

    It is fitted to standardized features with the penalty decay / 2 |W|^2, to 1 % of the loss or 150 evaluations.
    """
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    x = F.pad((features - mean) / deviation, (0, 1), value=1.0)
    limits = dict(tolerance=1e-2, max_evaluations=150)
    fitted = fit_logistic(x, labels, classes, decay, sharded=False, **limits).weights.float().cpu()  # pyright: ignore
    weight = fitted[:-1].T / deviation
    return weight, fitted[-1] - weight @ mean


def feature_maps(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the last feature map of normalized images [B, 3, H, W]: [B, h, w, D] float32."""
    with evaluating(backbone):
        return backbone.features(images)[0].patches.float()
