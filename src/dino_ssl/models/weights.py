"""Weights in files: read without running code, fitted by name and shape, written whole or not at all.

Known layouts of a .pth or .pt file: weights of a backbone alone; this project's checkpoints, whose "method"
holds student.backbone.* and teacher.backbone.*, or network.backbone.* of a classifier; the authors' full checkpoints,
whose "student" and "teacher" hold module.backbone.* and module.head.*; and weights below a key "state_dict" or "model".
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dino_ssl.config import from_dict, to_dict
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write
from dino_ssl.models import AnyBackbone, BackboneConfig

State = dict[str, Tensor]
Which = Literal["teacher", "student"]


def read_file(path: Path) -> Any:
    """What a .pth or .pt file holds: tensors, plain values, and argparse.Namespace, as the authors save."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of another pickle protocol: it reads, or it raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was not loaded: it is no file of weights, or it holds more than tensors and "
            f"plain values, and reading that could run code. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # torch's readers raise nearly anything on a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read; it may be cut short. ({reason})") from error


def read_safetensors(path: Path) -> tuple[State, BackboneConfig | None]:
    """Weights, and the backbone that the file's metadata names."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            described = json.loads((file.metadata() or {}).get("backbone", "null"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors; it may be cut short. ({error})") from error
    return state, from_dict(AnyBackbone, described) if described else None


def save_backbone(config: BackboneConfig | Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> Path:
    """Weights with the description of their network, as .safetensors: `load(path)` needs nothing else.

    The file is whole, or it is the old one.
    """
    described = dict(config) if isinstance(config, Mapping) else to_dict(config)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    metadata = {"backbone": json.dumps(described)}
    return atomic_write(path, lambda aside: safetensors.torch.save_file(tensors, aside, metadata=metadata))


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state`, every name and shape of it. A UserError says the difference, and nothing is loaded."""
    own = module.state_dict()
    missing = [f"  missing     {name} {shape(own[name])}" for name in own if name not in state]
    unexpected = [f"  unexpected  {name} {shape(state[name])}" for name in state if name not in own]
    other = [
        f"  shape       {name}: expected {shape(own[name])}, got {shape(state[name])}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if not missing and not unexpected and not other:
        module.load_state_dict(state)
        return
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(other)} of another shape"
    examples = [line for lines in (missing, unexpected, other) for line in shortened(lines)]
    raise UserError(
        f"The weights in {source} do not fit the network: {counts}, of {len(own)} expected.\n"
        + "\n".join(examples)
        + "\nNothing was loaded. Check that the file and the network's name and settings belong together."
    )


def shortened(lines: list[str], limit: int = 8) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"  ... and {len(lines) - limit} more"]


def shape(value: Tensor) -> str:
    return str(list(value.shape))


def classifier_dropped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
    """Without the names of a classifier, unless the network itself has them, as ConvNeXt has a head.norm."""
    classifier = re.compile(r"(fc|head|head\.fc|classifier)\.(weight|bias)$")
    return {name: value for name, value in state.items() if name in own or not classifier.match(name)}


def xcit_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
    """The official XCiT's names in timm's: its positions, and class attention with q, k and v apart."""
    renamed = {}
    for name, value in state.items():
        fused = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)", name)
        if fused and f"{fused[1]}q.{fused[2]}" in own:
            renamed |= {
                f"{fused[1]}{part}.{fused[2]}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            renamed[name.replace("pos_embeder.", "pos_embed.")] = value
    return renamed


def backbone_weights(content: Any, path: Path, which: Which) -> State:
    """The backbone's state dict in what a .pth or .pt file holds; see the layouts at the top."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights: expected names and tensors, got a {type(content).__name__}.")
    nested = [name for name, value in content.items() if isinstance(value, Mapping)]
    networks = [name for name in ("student", "teacher") if name in nested]
    if networks and which not in networks:
        raise UserError(f"{path} holds a {networks[0]}, and no {which}.")
    for key in (which, "method", "state_dict", "model"):
        if key in nested:
            return backbone_weights(content[key], path, which)
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        found = ", ".join(map(repr, list(content)[:8])) or "nothing"
        raise UserError(f"{path} holds no weights: expected names and tensors, or a checkpoint, got {found}.")
    return unprefixed(weights, path, which)


def unprefixed(state: State, path: Path, which: Which) -> State:
    """Names without `teacher.`, `network.`, `module.` and `backbone.`; what is beside the backbone is left out."""
    networks = {name.split(".")[0] for name in state} & {"student", "teacher"}
    if networks and which not in networks:
        raise UserError(f"{path} holds a {' and a '.join(sorted(networks))}, and no {which}.")
    for prefix in (f"{which}.", "network.backbone.", "module.", "backbone.", "module."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state
