"""Where backbones and single pictures come from: what a person names, opened."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dino.config import edit
from dino.data.decode import decode
from dino.data.pictures import BadImage
from dino.errors import UserError
from dino.evals.cache import weights_hash
from dino.models import BackboneConfig, Timm, ViT
from dino.models.backbone import Backbone
from dino.models.pretrained import RELEASED, infer, load
from dino.models.weights import read_safetensors
from dino.runtime import machine
from dino.training import read_run


def read_picture(path: str | Path) -> np.ndarray:
    """One picture as uint8 [H, W, 3] RGB. Raises UserError where it is missing or none."""
    if not Path(path).is_file():
        raise UserError(f"There is no picture {path}{'; it is a folder' if Path(path).is_dir() else ''}.")
    try:
        return decode(Path(path))
    except BadImage as bad:
        raise UserError(f"{path} cannot be shown: {bad.reason}") from bad


@dataclass(frozen=True)
class Checkpoint:
    """A backbone ready for use, and what is known of it."""

    source: str
    backbone: Backbone
    network: BackboneConfig | None
    """Its settings, where they are known: what random weights are drawn from."""
    size: int
    """Side in pixels of the pictures that it was trained on."""
    folder: Path | None
    """Where what is measured of it may be written: beside it."""

    @property
    def hash(self) -> str:
        return weights_hash(self.backbone)

    @property
    def fresh(self) -> Callable[[], Backbone] | None:
        """Builds the same network with random weights; None where its settings are not known."""
        if self.network is None:
            return None
        network = edit(self.network, pretrained=False) if isinstance(self.network, Timm) else self.network
        device = next(self.backbone.parameters()).device
        return lambda: network.build(drop_path=0.0).to(device)


def open_checkpoint(source: str | Path | Backbone | Checkpoint, device: torch.device | None = None) -> Checkpoint:
    """Loads a run's folder, a file, a released name or timm:NAME, and moves it to the device."""
    if isinstance(source, Checkpoint):
        return source
    device = device or machine().device
    if isinstance(source, Backbone):
        return _checkpoint(type(source).__name__, source.to(device), None)
    backbone, path, name = load(source).to(device), Path(source), str(source)
    if path.is_dir():
        run = read_run(path)
        return Checkpoint(name, backbone, run.backbone, run.views.size, path)
    if name in RELEASED:
        return _checkpoint(name, backbone, RELEASED[name].backbone)
    if name.startswith("timm:"):
        return _checkpoint(name, backbone, Timm(name=name.removeprefix("timm:")))
    network = read_safetensors(path)[1] if path.suffix == ".safetensors" else None
    return _checkpoint(name, backbone, network, path.parent)


def _checkpoint(
    source: str, backbone: Backbone, network: BackboneConfig | None, folder: Path | None = None
) -> Checkpoint:
    if network is None:
        with suppress(UserError):  # unknown: no floor of random weights then, and the usual size
            network = infer(backbone.state_dict(), Path(source))
    size = network.image_size if isinstance(network, ViT) else 224
    return Checkpoint(source, backbone, network, size, folder)
