"""Trained backbones: by name, from a run's directory, or from a file."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from dino_ssl.config import from_dict
from dino_ssl.errors import UserError, check_value
from dino_ssl.files import atomic_write
from dino_ssl.models import Backbone, BackboneConfig, Timm, ViT, backbone_named
from dino_ssl.models.vit import SIZES, Size
from dino_ssl.models.vit_weights import convert_vit_weights
from dino_ssl.models.weights import (
    StateDict,
    Which,
    backbone_weights,
    check_shapes,
    fit_to_network,
    load_strict,
    read_file,
    read_safetensors,
)
from dino_ssl.names import RELEASED_NETWORKS, check_checkpoint
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.terminal import logger

Weights = Literal["last", "best"]
"""The weights of a run: those of its last step, or those with the best online evaluation."""
EXPORTS: dict[Weights, str] = {"last": "backbone.safetensors", "best": "backbone-best.safetensors"}
"""The files of a run's folder that have the exported backbones."""


PUBLISHED = ("model.safetensors", "pytorch_model.bin")
"""The weights in a directory of Hugging Face, next to its config.json."""


class Released(NamedTuple):
    """One of the authors' released backbones."""

    backbone: BackboneConfig
    stem: str
    """The file is STEM_pretrain/STEM_pretrain.pth below `HOST`."""

    @property
    def url(self) -> str:
        """Address of the weights."""
        return f"{HOST}{self.stem}_pretrain/{self.stem}_pretrain.pth"


HOST = "https://dl.fbaipublicfiles.com/dino/"
RELEASED = {name: Released(backbone_named(network), stem) for name, (network, stem) in RELEASED_NETWORKS.items()}
"""The authors' released backbones by the names of their torch.hub entries."""


def load(
    source: str | Path,
    *,
    weights: Weights = "last",
    which: Which = "teacher",
    backbone: BackboneConfig | None = None,
    num_heads: int | None = None,
    trust: bool = False,
) -> Backbone:
    """Return a trained backbone in evaluation mode on the CPU.

    Args:
        source: the name of a released network (`RELEASED`), `timm:NAME`, the directory of a run or of a Hugging Face
            model, or a file (.safetensors, .pth, .pt, .bin): weights of a backbone, a checkpoint of this project, or
            one of others, in which the backbone is found by its names (weights.py).
        weights: of a run's directory: those at the end of training (before it, of checkpoints/last.pt), or those with
            the best online evaluation, which the validation set selected.
        which: the network of a checkpoint that has a student and a teacher.
        backbone: the architecture, if the file does not describe it.
        num_heads: attention heads of a ViT, if the file does not describe it; default: of 64 channels each, which is
            logged.
        trust: import the backbone's class if the file names it as `module:Class`, which runs code of that module.
    """
    name, path = str(source), Path(source)
    check_checkpoint(name)
    if weights != "last" and not path.is_dir():
        raise UserError(f"`weights` {weights} selects a file of a run's directory, and {name!r} is none. Omit it.")
    if name in RELEASED:
        network = build_with_weights(RELEASED[name].backbone, download(RELEASED[name].url), name)
        record_hash(_cached_file(RELEASED[name].url))
        return network
    if name.startswith("timm:"):
        network: Any = Timm(name=name.removeprefix("timm:"), pretrained=True).build().eval()
        network.transform = network.pretrained_transform()
        return network
    if path.is_dir():
        path = weights_file(path, which, weights)
    described = transform = None
    if path.suffix == ".safetensors":
        state, described, transform = read_safetensors(path, trust=trust)
        state = state if described else backbone_weights(state, path, which)
    else:
        content = read_file(path)
        state = backbone_weights(content, path, which)
        run = content.get("run")
        if isinstance(run, Mapping) and run.get("backbone"):
            described = from_dict(BackboneConfig, run["backbone"], trust=trust)
            transform = content.get("preprocessing") and from_dict(Preprocessing, content["preprocessing"])
    check_value("num_heads", num_heads, least=1)
    if num_heads is not None and (backbone or described):
        raise UserError(f"`num_heads` is for a ViT that {path} does not describe; its heads are known. Omit it.")
    published = _published_settings(path)
    heads = published.get("num_attention_heads") if num_heads is None else num_heads
    config = backbone or described or infer_config(state, path, heads)
    if transform is None and {"image_mean", "image_std"} <= published.keys():
        mean, std = tuple(published["image_mean"]), tuple(published["image_std"])
        transform = Preprocessing(size=config.input_size, mean=mean, std=std)
    return build_with_weights(config, state, str(path), transform)


def network_of(source: str, *, trust: bool = False) -> BackboneConfig | None:
    """Return the network of a checkpoint, without downloading weights."""
    if source in RELEASED:
        return RELEASED[source].backbone
    return backbone_named(source) if source.startswith("timm:") else load(source, trust=trust).config


def build_with_weights(
    config: BackboneConfig, state: StateDict, source: str, transform: Preprocessing | None = None
) -> Backbone:
    """Return the network with the weights of `state`, in evaluation mode.

    transform: default: ImageNet's, at the size that the network is designed for.
    """
    untrained = config.untrained()  # downloads nothing
    if type(config).__module__.startswith("dino_ssl."):  # a small file may describe a network of any size
        with torch.device("meta"):
            empty = untrained.build(drop_path=0.0)
        check_shapes(empty, fit_to_network(state, empty), source)
    network = untrained.build(drop_path=0.0)
    load_strict(network, fit_to_network(state, network), source)
    network.config, network.transform = config, transform or Preprocessing(size=config.input_size)
    return network.eval()


def weights_file(run: Path, which: Which, weights: Weights = "last") -> Path:
    """Return the file of a run's directory that has the `which` backbone."""
    files = {kind: [export] * (which == "teacher") + [f"checkpoints/{kind}.pt"] for kind, export in EXPORTS.items()}
    present = [name for kind in files for name in files[kind] if (run / name).is_file()]
    if named := [name for name in files[weights] if name in present]:
        return run / named[0]
    if not present and (published := [name for name in PUBLISHED if (run / name).is_file()]):
        return run / published[0]
    hint = "\nThey are those of the best evaluation during training. If it had none, use `weights` last."
    raise UserError(
        f"There are no {weights} weights in {run}: expected a run's directory with {' or '.join(files[weights])}; it "
        f"has {' and '.join(present) or 'none'}.{hint if weights == 'best' else ''}"
    )


def download(url: str) -> StateDict:
    """Return the weights at `url`, which torch.hub downloads once and keeps in its cache.

    Raises UserError if the cached file differs from the one that was complete and loaded first; a download that cannot
    be read is removed.
    """
    path = _cached_file(url)
    is_new, record = not path.is_file(), Path(f"{path}.sha256")
    if not is_new and record.is_file() and record.read_text().strip() != file_hash(path):
        raise UserError(f"{path} has changed since it was downloaded, by its SHA-256. Remove it to download it again.")
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=sys.stderr.isatty(), weights_only=True
        )
    except Exception as error:  # of the network, the disk or a damaged file
        if is_new:
            path.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else type(error).__name__  # torch suggests `weights_only=False`
        raise UserError(
            f"Cannot load {url} ({reason}).\n"
            f"Check the connection, remove a damaged {path}, or download that file yourself."
        ) from error


def _cached_file(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_hash(path: Path) -> None:
    """Store the SHA-256 of downloaded weights next to them, after a network was built with all of them."""
    record = Path(f"{path}.sha256")
    if path.is_file() and not record.is_file():
        read_file(path)  # with the checksums inside
        with suppress(UserError):  # the cache may be read-only
            atomic_write(record, lambda part: part.write_text(f"{file_hash(path)}\n"))


def infer_config(state: StateDict, path: Path, num_heads: int | None = None) -> BackboneConfig:
    """Return the network of weights without a description: a ViT of any size, or a released ResNet or XCiT.

    Raises UserError if it is another one.
    """
    vit = convert_vit_weights(state)
    if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= vit.keys():
        return _infer_vit(vit, path, num_heads)
    if {"layer4.0.conv1.weight", "cls_attn_blocks.0.norm1.weight"} & state.keys():
        for config in (released.backbone for released in RELEASED.values()):
            with torch.device("meta"):
                network = config.build()
            weights = fit_to_network(state, network)
            if _shapes(network.state_dict()) == _shapes(weights):
                return config
    raise UserError(
        f"{path} does not describe the network of its {len(state)} weights, and their names are not those of a ViT or "
        f"of a released network: {', '.join(list(state)[:4])}, ...\n"
        f"In Python, pass it: load({str(path)!r}, backbone=Timm(name=...) or ViT(stem='conv', ...)); export the "
        "result for the command line."
    )


def _infer_vit(state: StateDict, path: Path, num_heads: int | None) -> ViT:
    """Return the ViT of these shapes, by default with 64 channels per head, as in the paper."""
    projection, positions = state["patch_embed.proj.weight"].shape, state["pos_embed"].shape
    if len(projection) != 4 or len(positions) != 3 or not all(projection):
        raise UserError(
            f"{path} is no ViT: expected patch_embed.proj.weight [D, 3, P, P] and pos_embed [1, N, D], got "
            f"{list(projection)} and {list(positions)}."
        )
    width, _, patch, _ = projection
    if num_heads is None and width % 64:
        raise UserError(
            f"{path} is a ViT of width {width}; its number of heads cannot be inferred as width / 64.\n"
            "Set `num_heads` to the number with which it was trained."
        )
    heads = width // 64 if num_heads is None else num_heads
    if num_heads is None:
        logger.info(
            f"{path}: assumed {heads} attention heads of 64 channels; set `num_heads` (in training `backbone.heads`) "
            "if it has others."
        )
    hidden = len(state[fc1]) if (fc1 := "blocks.0.mlp.fc1.weight") in state else 4 * width
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    shape = Size(width, len(blocks), heads)
    size = next((size for size, known in SIZES.items() if known == shape), None)
    architecture: dict[str, Any] = {"size": size} if size else shape._asdict()
    return ViT(
        **architecture,
        patch=patch,
        image_size=patch * round(max(positions[1] - 1, 1) ** 0.5),
        registers=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        mlp_ratio=hidden / width,
    )


def _published_settings(path: Path) -> dict[str, Any]:
    """Return the heads and the normalization in the JSON files next to weights of Hugging Face, if they are valid."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "num_attention_heads": lambda value: isinstance(value, int) and value > 0,
        "image_mean": _is_rgb,
        "image_std": lambda value: _is_rgb(value) and min(value) > 0,
    }
    found: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json") if path.name in PUBLISHED else ():
        file = path.parent / name
        try:
            found |= json.loads(file.read_text()) if file.is_file() else {}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file} cannot be read: expected a JSON object. ({error})") from error
    return {name: found[name] for name, is_valid in kinds.items() if name in found and is_valid(found[name])}


def _is_rgb(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(number) in (int, float) for number in value)


def _shapes(state: StateDict) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
