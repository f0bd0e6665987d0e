"""Open checkpoints and image files given by the user."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch

from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.dataset import BadImage
from dino_ssl.data.decode import decode
from dino_ssl.errors import UserError
from dino_ssl.evals.features import weights_hash
from dino_ssl.files import read_json
from dino_ssl.models import BackboneConfig
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import RELEASED, Weights, infer_config, load_described
from dino_ssl.run import Run
from dino_ssl.runtime import machine


def read_image(path: str | Path) -> np.ndarray:
    """Return an image file as uint8 [H, W, 3] RGB. Raises UserError if it is missing or unreadable."""
    if not Path(path).is_file():
        raise UserError(f"There is no image {path}{'; it is a folder' if Path(path).is_dir() else ''}.")
    try:
        return decode(Path(path))
    except BadImage as bad:
        raise UserError(f"{path} cannot be read: {bad.reason}") from bad


@dataclass(frozen=True)
class Checkpoint:
    """A loaded backbone on its device, with its metadata."""

    source: str
    """The checkpoint as given by the user: a path or a name."""
    backbone: Backbone
    network: BackboneConfig | None
    """The settings of the network; None if they are unknown."""
    size: int
    """Side in pixels of the images it is evaluated on: `Run.eval_size` of the run that trained it."""
    folder: Path | None
    """Folder for results and cached features; None for a released network."""
    weights: Weights | None = None
    """Those of a run's folder that were loaded; None for other sources."""

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
        if self.network is None:
            return None
        network = self.network.untrained()
        device = next(self.backbone.parameters()).device
        return lambda: network.build(drop_path=0.0).to(device)


def open_checkpoint(
    source: str | Path | Backbone | Checkpoint,
    device: str | torch.device | None = None,
    *,
    weights: Weights = "last",
    trust: bool = False,
) -> Checkpoint:
    """Load a run folder, a file, a released network or timm:NAME, and move it to the device (see `runtime.machine`).

    weights: of a run's folder. trust: import a backbone class from outside the package that the checkpoint names, which
    runs its code.
    """
    if isinstance(source, Checkpoint):
        return source
    device = machine(device).device
    if isinstance(source, Backbone):
        network = None
        with suppress(UserError):  # an unknown architecture has no reference scores of random weights
            network = infer_config(source.state_dict(), Path(type(source).__name__))
        size = 224 if network is None else network.input_size
        return Checkpoint(type(source).__name__, source.to(device), network, size, None)
    loaded = load_described(source, weights=weights, trust=trust)
    size, folder = loaded.config.input_size, None
    if not (str(source) in RELEASED or str(source).startswith("timm:")):
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        content = read_json(folder / "run.json")
        run = loaded.run or (content.get("run") if isinstance(content, dict) else None)
        if isinstance(run, Mapping) and run.get("backbone") == to_dict(loaded.config):  # trained by this run
            with suppress(UserError):  # views from outside the package
                own_size = (run.get("online_eval") or {}).get("size")
                size = own_size or from_dict(get_type_hints(Run)["views"], run.get("views")).size
    loaded_weights: Weights | None = weights if Path(source).is_dir() else None
    return Checkpoint(str(source), loaded.backbone.to(device), loaded.config, size, folder, loaded_weights)
