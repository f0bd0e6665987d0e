"""Weights in files: read without running code, matched by name and shape, written atomically.

Known layouts of a .pth or .pt file: weights of a backbone; this project's checkpoints, whose "backbone" is the prefix
of the exported backbone in "method"; the authors' full checkpoints, whose "student" and "teacher" hold
module.backbone.* and module.head.*; weights under a key "state_dict" or "model".
"""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dino_ssl.config import from_dict, to_dict
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, check_format
from dino_ssl.models import Backbone, BackboneConfig
from dino_ssl.preprocessing import Preprocessing

FORMAT = 1
"""Version of the metadata of .safetensors files."""
StateDict = dict[str, Tensor]
Which = Literal["teacher", "student"]
"""The network of a checkpoint that has two."""
MAX_LINES = 20
"""Tensors that an error lists."""


def read_file(path: Path, *, mmap: bool = False) -> Any:
    """Return the content of a .pth or .pt file: tensors, plain values, and argparse.Namespace as the authors save.

    mmap: read tensors only when they are used, without the checksums. Raises UserError if the file is damaged.
    """
    try:
        if not mmap and zipfile.is_zipfile(path):  # torch writes checksums, but does not compare them
            with zipfile.ZipFile(path) as archive:
                if name := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {name}")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about another pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types on a damaged file, and suggests `weights_only=False`
        raise UserError(
            f"{path} is not a readable file of tensors and plain values: it is damaged, or reading it could run code "
            f"({type(error).__name__})."
        ) from error


def read_safetensors(
    path: Path, *, trust: bool = False
) -> tuple[StateDict, BackboneConfig | None, Preprocessing | None]:
    """Return the weights, and the backbone and the preprocessing that the file's metadata describes.

    trust: see `config.from_dict`.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            described = json.loads((file.metadata() or {}).get("backbone", "null"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors; it may be truncated. ({error})") from error
    if not described:
        return state, None, None
    check_format(path, described.pop("format", FORMAT), FORMAT)
    transform = described.pop("preprocessing", None)
    return state, from_dict(BackboneConfig, described, trust=trust), transform and from_dict(Preprocessing, transform)


def save_backbone(
    config: BackboneConfig, state: Mapping[str, Tensor], path: Path, transform: Preprocessing | None = None
) -> Path:
    """Write weights with the description of network and preprocessing as .safetensors, which `load(path)` reads.

    transform: default: ImageNet's, at the size that the network is designed for.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    transform = transform or Preprocessing(size=config.input_size)
    described = {"format": FORMAT, **to_dict(config), "preprocessing": to_dict(transform)}
    metadata = {"backbone": json.dumps(described)}  # one key: safetensors writes several in random order
    return atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=metadata))


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; raise UserError with the differences, and load nothing, if names or shapes differ."""
    expected, given = ({name: list(value.shape) for name, value in d.items()} for d in (module.state_dict(), state))
    wrong = [name for name in expected | given if expected.get(name) != given.get(name)]
    if not wrong:
        module.load_state_dict(state)
        return
    lines = [f"  {name}: expected {expected.get(name, 'nothing')}, got {given.get(name, 'nothing')}" for name in wrong]
    more = f"\n  ... and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else ""
    raise UserError(
        f"The weights in {source} do not fit the network: {len(wrong)} of {len(expected | given)} tensors differ.\n"
        + "\n".join(lines[:MAX_LINES])
        + f"{more}\nNothing was loaded. Check that the file belongs to this network and these settings."
    )


def fit_to_network(state: Mapping[str, Tensor], network: Backbone) -> StateDict:
    """Return the weights with the network's own names, without a classifier (fc, head)."""
    state = network.convert_weights(state)
    expected, classifier = network.state_dict(), re.compile(r"(fc|head|head\.fc|classifier)\.(weight|bias)$")
    return {name: value for name, value in state.items() if name in expected or not classifier.match(name)}


def backbone_weights(content: Any, path: Path, which: Which) -> StateDict:
    """Return the backbone's state dict from the content of a .pth or .pt file (layouts: see the module's docstring)."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected names and tensors, got a {type(content).__name__}.")
    nested = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    prefix = content.get("backbone")
    if which == "teacher" and isinstance(prefix, str) and "method" in nested:
        weights = nested["method"].items()
        return {name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)}
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    networks = {name.split(".")[0] for name in [*nested, *state]} & {"student", "teacher"}
    if networks and which not in networks:
        raise UserError(f"{path} has a {' and a '.join(sorted(networks))} but no {which}.")
    for key in (which, "method", "state_dict", "model"):
        if key in nested:
            return backbone_weights(nested[key], path, which)
    if not state:
        names = ", ".join(map(repr, list(content)[:8])) or "nothing"
        raise UserError(f"{path}: expected names and tensors, or a checkpoint, got {names}.")
    for prefix in (f"{which}.", "network.backbone.", "module.", "backbone.", "module."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state
