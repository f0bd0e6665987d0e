"""Where backbones and single pictures come from: what a person names, opened."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dino_ssl.config import from_dict
from dino_ssl.data.dataset import BadImage
from dino_ssl.data.decode import decode
from dino_ssl.errors import UserError
from dino_ssl.evals.cache import weights_hash
from dino_ssl.models import BackboneConfig
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import RELEASED, Loaded, infer_config, load_described
from dino_ssl.run import Run, read_run
from dino_ssl.runtime import machine


def read_image(path: str | Path) -> np.ndarray:
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
    def name(self) -> str:
        """Short, for the head of a table: `runs/photos`, `photos/best.pt`, `timm:resnet50`."""
        if self.folder is None:
            return self.source
        parts = [part for part in Path(self.source).resolve().parts if part != "checkpoints"]
        return "/".join(parts[-2:])

    @property
    def hash(self) -> str:
        return weights_hash(self.backbone)

    @property
    def fresh(self) -> Callable[[], Backbone] | None:
        """Builds the same network with random weights; None where its settings are not known."""
        if self.network is None:
            return None
        network = self.network.untrained()
        device = next(self.backbone.parameters()).device
        return lambda: network.build(drop_path=0.0).to(device)


def open_checkpoint(source: str | Path | Backbone | Checkpoint, device: torch.device | None = None) -> Checkpoint:
    """Loads a run's folder, a file, a released name or timm:NAME, and moves it to the device."""
    if isinstance(source, Checkpoint):
        return source
    device = device or machine().device
    if isinstance(source, Backbone):
        network = None
        with suppress(UserError):  # unknown: no floor of random weights then, and the usual size
            network = infer_config(source.state_dict(), Path(type(source).__name__))
        size = 224 if network is None else network.input_size
        return Checkpoint(type(source).__name__, source.to(device), network, size, None)
    found = load_described(source)
    size = found.config.input_size
    folder = None
    if not _is_name(str(source)):
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        if (run := _run_of(path, found)) is not None:
            size = run.views.size
    return Checkpoint(str(source), found.backbone.to(device), found.config, size, folder)


def _is_name(source: str) -> bool:
    return source in RELEASED or source.startswith("timm:")


def _run_of(path: Path, found: Loaded) -> Run | None:
    """The run that a folder, a file in it, or a training checkpoint anywhere is of; None for other files."""
    if path.is_dir():
        return read_run(path)
    with suppress(UserError):  # of another version: the weights are there all the same
        if found.run is not None:
            return from_dict(Run, found.run)
        if (path.parent / "run.json").is_file():
            run = read_run(path.parent)
            return run if run.backbone == found.config else None  # or somebody put another file there
    return None
