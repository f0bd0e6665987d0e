"""Open checkpoints and image files given by the user."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_ssl.data.bit_depth import estimate_bit_depth
from dino_ssl.data.dataset import BadImage
from dino_ssl.data.decode import decode
from dino_ssl.errors import UserError
from dino_ssl.evals.features import weights_hash
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import RELEASED, Weights, load
from dino_ssl.preprocessing import to_rgb
from dino_ssl.runtime import machine


def read_image(path: str | Path, bit_depth: int | None = None) -> np.ndarray:
    """Return an image file as uint8 [H, W, 3] RGB. Raises UserError if it is missing or unreadable.

    bit_depth: of a file with 16 bits per value; None estimates it.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no image {path}{'; it is a folder' if Path(path).is_dir() else ''}.")
    try:
        return decode(Path(path), bit_depth=bit_depth or estimate_bit_depth([(path, None)]))
    except BadImage as bad:
        raise UserError(f"{path} cannot be read: {bad.reason}") from bad


def load_image(image: Any, bit_depth: int | None = None) -> Any:
    """Return a single image, a file or pixels, as uint8 RGB [H, W, 3]; other sources of images unchanged.

    Raises UserError for a file that is missing or unreadable, and for pixels of another type or shape.
    """
    if isinstance(image, str | Path) and not Path(image).is_dir():
        return read_image(image, bit_depth)
    return to_rgb(image) if isinstance(image, Image.Image | np.ndarray | Tensor) else image


@dataclass(frozen=True)
class Checkpoint:
    """A loaded backbone on its device, with its metadata."""

    source: str
    """The checkpoint as given by the user: a path or a name."""
    backbone: Backbone
    folder: Path | None
    """Folder for results and cached features; None for a released network."""
    weights: Weights | None = None
    """Those of a run's folder that were loaded; None for other sources."""
    num_heads: int | None = None
    """Heads of a ViT that the file does not describe, if they were given."""

    @property
    def name(self) -> str:
        """A short name for tables: `runs/photos (last)`, `photos/best.pt`, `timm:resnet50`."""
        if self.folder is None:
            return self.source
        parts = [part for part in Path(self.source).resolve().parts if part != "checkpoints"]
        return "/".join(parts[-2:]) + (f" ({self.weights})" if self.weights else "")

    @property
    def hash(self) -> str:
        """A hash of the weights."""
        return weights_hash(self.backbone)

    @property
    def fresh(self) -> Callable[[], Backbone] | None:
        """A function that builds the network with random weights; None if its settings are unknown."""
        config, transform = self.backbone.config, self.backbone.transform
        if config is None:
            return None
        device = next(self.backbone.parameters()).device

        def build() -> Backbone:
            network = config.untrained().build(drop_path=0.0).to(device)
            network.transform = transform
            return network

        return build


def open_checkpoint(
    source: str | Path | Backbone | Checkpoint,
    device: str | torch.device | None = None,
    *,
    weights: Weights = "last",
    num_heads: int | None = None,
    trust: bool = False,
) -> Checkpoint:
    """Load a run folder, a file, a released network or timm:NAME, and move it to the device (see `runtime.machine`).

    weights: of a run's folder. num_heads: of a ViT that the file does not describe. trust: import a backbone class from
    outside the package that the checkpoint names, which runs its code.
    """
    if isinstance(source, Checkpoint):
        return source
    device = machine(device).device
    if isinstance(source, Backbone):
        return Checkpoint(type(source).__name__, source.to(device), None)
    backbone, folder = load(source, weights=weights, num_heads=num_heads, trust=trust), None
    if not (str(source) in RELEASED or str(source).startswith("timm:")):
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return Checkpoint(str(source), backbone.to(device), folder, weights if Path(source).is_dir() else None, num_heads)
