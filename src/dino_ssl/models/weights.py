"""Weights in files: read without running code, matched by name and shape, written atomically.

Known layouts of a file: weights of a backbone; this project's checkpoints, whose "backbone" is the prefix of the
exported backbone in "method"; checkpoints of others, such as the authors' full ones, with the weights at any depth,
under any prefix, next to heads and optimizers: the backbone is found by a weight that every ViT, ResNet or XCiT has.
"""

import argparse
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dino_ssl.config import from_dict, to_dict
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, check_format
from dino_ssl.models import Backbone, BackboneConfig
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.terminal import logger

FORMAT = 1
"""Version of the metadata of .safetensors files."""
StateDict = dict[str, Tensor]
Which = Literal["teacher", "student"]
"""The network of a checkpoint that has two."""
MAX_LINES = 20
"""Tensors that an error lists."""
KNOWN_WEIGHTS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "layer1.0.conv1.weight",
    "cls_attn_blocks.0.norm1.weight",
)
"""A weight of every ViT, of Hugging Face's ViTs, of every ResNet and XCiT."""
WRAPPER = re.compile(r"^_orig_mod$|module$|model|net$|network|encoder|state_dict|student|teacher")
"""Parts of names that modules around a backbone add."""


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
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as safetensors; it may be truncated. ({error})") from error
    if not described:
        return state, None, None
    if not isinstance(described, dict):
        raise UserError(f"{path}: expected the description of a backbone in its metadata, got {described!r:.80}.")
    check_format(path, described.pop("format", FORMAT), FORMAT)
    transform, expected = described.pop("preprocessing", None), described.pop("sha256", None)
    if expected is not None and expected != checksum(state):
        raise UserError(f"{path} is damaged: the weights differ from those that were written. Copy or export it again.")
    return state, from_dict(BackboneConfig, described, trust=trust), transform and from_dict(Preprocessing, transform)


def save_backbone(
    config: BackboneConfig, state: Mapping[str, Tensor], path: Path, transform: Preprocessing | None = None
) -> Path:
    """Write weights with the description of network and preprocessing as .safetensors, which `load(path)` reads.

    transform: default: ImageNet's, at the size that the network is designed for.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    transform = transform or Preprocessing(size=config.input_size)
    described = {"format": FORMAT, **to_dict(config), "preprocessing": to_dict(transform), "sha256": checksum(tensors)}
    metadata = {"backbone": json.dumps(described)}  # one key: safetensors writes several in random order
    return atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=metadata))


def checksum(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and bytes of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict.

    Raises UserError, and loads nothing, if names or shapes differ, or if values are not finite or not floating point.
    """
    own = module.state_dict()
    wrong_type = [
        name for name in own.keys() & state.keys() if own[name].is_floating_point() != state[name].is_floating_point()
    ]
    not_finite = [name for name, value in state.items() if not value.isfinite().all()]
    kinds = (sorted(wrong_type), "have another type than the network's"), (not_finite, "have NaN or infinite values")
    for names, problem in kinds:
        if names:
            raise UserError(
                f"The weights in {source} cannot be used: {len(names)} of {len(state)} tensors {problem}: "
                f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}."
            )
    check_shapes(module, state, source)
    module.load_state_dict(state)


def check_shapes(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError with the differences if names or shapes of a state dict differ from those of the module."""
    expected, given = ({name: list(value.shape) for name, value in d.items()} for d in (module.state_dict(), state))
    wrong = [name for name in expected | given if expected.get(name) != given.get(name)]
    if not wrong:
        return
    lines = [f"  {name}: expected {expected.get(name, 'nothing')}, got {given.get(name, 'nothing')}" for name in wrong]
    more = f"\n  ... and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else ""
    raise UserError(
        f"The weights in {source} do not fit the network: {len(wrong)} of {len(expected | given)} tensors differ.\n"
        + "\n".join(lines[:MAX_LINES])
        + f"{more}\nNothing was loaded. Check that the file belongs to this network and these settings."
    )


def fit_to_network(state: Mapping[str, Tensor], network: Backbone) -> StateDict:
    """Return the weights with the network's own names, without a classifier (fc, head).

    Counts of batches of batch norm, which files of old versions of torch lack, are 0.
    """
    state = network.convert_weights(state)
    expected, classifier = network.state_dict(), re.compile(r"(fc|head|head\.fc|classifier)\.(weight|bias)$")
    counts = {name: torch.zeros_like(value) for name, value in expected.items() if name.endswith("num_batches_tracked")}
    return counts | {name: value for name, value in state.items() if name in expected or not classifier.match(name)}


def backbone_weights(content: Any, path: Path, which: Which) -> StateDict:
    """Return the backbone's state dict from the content of a file (layouts: see the module's docstring)."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected names and tensors, got a {type(content).__name__}.")
    state, prefix = dict(_flatten(content)), content.get("backbone")
    if isinstance(prefix, str):
        return _below(state, f"method.{prefix.replace('teacher', which)}")
    if not state:
        names = ", ".join(map(repr, list(content)[:8])) or "nothing"
        raise UserError(f"{path}: expected names and tensors, or a checkpoint, got {names}.")
    networks = {word for word in get_args(Which) for name in state if word in name}
    if networks and which not in networks:
        raise UserError(f"{path} has a {' and a '.join(sorted(networks))} but no {which}.")
    if networks:
        state = {name: value for name, value in state.items() if which in name}
    prefixes = {name[: -len(known)] for known in KNOWN_WEIGHTS for name in state if f".{name}".endswith(f".{known}")}
    prefix = min(prefixes, key=_priority, default=_wrappers(state))
    if prefix:
        logger.info(f"{path}: the backbone's weights are those named {prefix}*.")
    return _below(state, prefix)


def _flatten(content: Mapping[Any, Any], prefix: str = "", depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts with their names joined by dots."""
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(name, str) and isinstance(value, Mapping) and depth:
            yield from _flatten(value, f"{prefix}{name}.", depth - 1)


def _below(state: StateDict, prefix: str) -> StateDict:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _priority(prefix: str) -> tuple[bool, int]:
    """Return the order of prefixes if a file has several networks: MoCo's trained encoder is before its average."""
    return not ("base_encoder" in prefix or "encoder_q" in prefix), len(prefix)


def _wrappers(state: StateDict) -> str:
    """Return the prefix that all names share, of wrappers such as `module.` and `state_dict.model.`."""
    columns = zip(*(name.split(".")[:-1] for name in state), strict=False)
    shared = takewhile(lambda column: len(set(column)) == 1 and WRAPPER.search(column[0]), columns)
    prefix = "".join(f"{column[0]}." for column in shared)
    has_head = any(name.startswith(f"{prefix}backbone.") for name in state)
    return f"{prefix}backbone." if has_head else prefix
