"""Weights in files: read without running code, matched by name and shape, written atomically.

Known layouts of a .pth or .pt file: weights of a backbone; this project's checkpoints, whose "backbone" is the prefix
of the exported backbone in "method"; the authors' full checkpoints, whose "student" and "teacher" hold
module.backbone.* and module.head.*; weights under a key "state_dict" or "model".
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
from dino_ssl.models import BackboneConfig

StateDict = dict[str, Tensor]
Which = Literal["teacher", "student"]
"""The network of a checkpoint that has two."""


def read_file(path: Path) -> Any:
    """Return the content of a .pth or .pt file: tensors, plain values, and argparse.Namespace as the authors save."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about another pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was not loaded: expected a file of tensors and plain values. Reading other objects could run "
            f"code. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # torch raises many types on a damaged file
        raise UserError(f"{path} cannot be read; it may be truncated. ({type(error).__name__}: {error})") from error


def read_safetensors(path: Path, *, trust: bool = False) -> tuple[StateDict, BackboneConfig | None]:
    """Return the weights, and the backbone that the file's metadata describes. trust: see `config.from_dict`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            described = json.loads((file.metadata() or {}).get("backbone", "null"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors; it may be truncated. ({error})") from error
    return state, from_dict(BackboneConfig, described, trust=trust) if described else None


def save_backbone(config: BackboneConfig | Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> Path:
    """Write weights with the description of their network as .safetensors, which `load(path)` reads."""
    described = dict(config) if isinstance(config, Mapping) else to_dict(config)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    metadata = {"backbone": json.dumps(described)}
    return atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=metadata))


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; raise UserError with the differences, and load nothing, if names or shapes differ."""
    expected = module.state_dict()
    missing = [f"  missing     {name} {list(expected[name].shape)}" for name in expected if name not in state]
    unexpected = [f"  unexpected  {name} {list(state[name].shape)}" for name in state if name not in expected]
    mismatched = [
        f"  shape       {name}: expected {list(value.shape)}, got {list(state[name].shape)}"
        for name, value in expected.items()
        if name in state and value.shape != state[name].shape
    ]
    if not missing and not unexpected and not mismatched:
        module.load_state_dict(state)
        return
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} of another shape"
    examples = [line for lines in (missing, unexpected, mismatched) for line in _shortened(lines)]
    raise UserError(
        f"The weights in {source} do not fit the network: {counts}, of {len(expected)} expected.\n"
        + "\n".join(examples)
        + "\nNothing was loaded. Check that the file belongs to this network and these settings."
    )


def _shortened(lines: list[str], limit: int = 8) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"  ... and {len(lines) - limit} more"]


def drop_classifier(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> StateDict:
    """Return the weights without a classifier (fc, head), except for names that the network itself has."""
    classifier = re.compile(r"(fc|head|head\.fc|classifier)\.(weight|bias)$")
    return {name: value for name, value in state.items() if name in expected or not classifier.match(name)}


def xcit_to_timm(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> StateDict:
    """Return weights of the official XCiT with timm's names; in timm, q, k and v of class attention are separate."""
    renamed = {}
    for name, value in state.items():
        fused = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)", name)
        if fused and f"{fused[1]}q.{fused[2]}" in expected:
            renamed |= {f"{fused[1]}{q}.{fused[2]}": part for q, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name.replace("pos_embeder.", "pos_embed.")] = value
    return renamed


def backbone_weights(content: Any, path: Path, which: Which) -> StateDict:
    """Return the backbone's state dict from the content of a .pth or .pt file (layouts: see the module's docstring)."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected names and tensors, got a {type(content).__name__}.")
    nested = [name for name, value in content.items() if isinstance(value, Mapping)]
    prefix = content.get("backbone")
    if which == "teacher" and isinstance(prefix, str) and "method" in nested:
        weights = content["method"].items()
        return {name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)}
    networks = [name for name in ("student", "teacher") if name in nested]
    if networks and which not in networks:
        raise UserError(f"{path} has a {networks[0]} but no {which}.")
    for key in (which, "method", "state_dict", "model"):
        if key in nested:
            return backbone_weights(content[key], path, which)
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        names = ", ".join(map(repr, list(content)[:8])) or "nothing"
        raise UserError(f"{path}: expected names and tensors, or a checkpoint, got {names}.")
    return _strip_prefixes(weights, path, which)


def _strip_prefixes(state: StateDict, path: Path, which: Which) -> StateDict:
    """Return the backbone's weights without `teacher.`, `network.`, `module.` and `backbone.` before their names."""
    networks = {name.split(".")[0] for name in state} & {"student", "teacher"}
    if networks and which not in networks:
        raise UserError(f"{path} has a {' and a '.join(sorted(networks))} but no {which}.")
    for prefix in (f"{which}.", "network.backbone.", "module.", "backbone.", "module."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state
