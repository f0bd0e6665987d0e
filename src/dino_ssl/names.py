"""Names that a user may give instead of a path. Imports no torch, so that a wrong name or path is reported at once."""

import re
from pathlib import Path

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.files import PART

RELEASED_NETWORKS = {
    "dino_vits16": ("vit_small/16", "dino_deitsmall16"),
    "dino_vits8": ("vit_small/8", "dino_deitsmall8"),
    "dino_vitb16": ("vit_base/16", "dino_vitbase16"),
    "dino_vitb8": ("vit_base/8", "dino_vitbase8"),
    "dino_resnet50": ("timm:resnet50", "dino_resnet50"),
    **{
        f"dino_xcit_{size}": (f"timm:xcit_{size}_224", f"dino_xcit_{size}")
        for size in ("small_12_p16", "small_12_p8", "medium_24_p16", "medium_24_p8")
    },
}
"""The authors' released backbones by the names of their torch.hub entries: (network, stem of the file)."""
INDEX_INFO = "index.json"
"""File that makes a folder an index."""
SYNTHETIC = ("scenes", "simple-scenes", "small-objects")
"""Synthetic datasets."""


def is_import(name: str) -> bool:
    """Return True for MODULE:CLASS, unless a file has this name."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None and not Path(name).exists()


def check_checkpoint(name: str) -> None:
    """Raise UserError if there is no such checkpoint: neither a path nor the name of a network."""
    path = Path(name)
    if name in RELEASED_NETWORKS or name.startswith("timm:") or path.exists():
        return
    hint = "" if path.suffix or len(path.parts) > 1 else did_you_mean(name, RELEASED_NETWORKS)
    raise UserError(
        f"There is no file {name!r}{hint or '.'}\n"
        f"Expected a run's directory, a file of weights, timm:NAME, or one of {', '.join(RELEASED_NETWORKS)}."
    )


def check_dataset(name: str) -> None:
    """Raise UserError if there is no such dataset: neither a path nor a synthetic dataset nor MODULE:CLASS."""
    path = Path(name).expanduser()
    if not (name in SYNTHETIC or is_import(name) or path.exists() or Path(f"{path}{PART}").exists()):
        raise UserError(f"There is no file or folder {name}. Check the path.")


def check_index(name: str) -> None:
    """Raise UserError if there is no index in this folder."""
    if not (Path(name) / INDEX_INFO).is_file():
        raise UserError(f"There is no index {name}: expected a folder with {INDEX_INFO}, as `dino index` writes.")
