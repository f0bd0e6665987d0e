"""Backbones that somebody has trained: by name, from a run's directory, or from a file."""

import contextlib
import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino_ssl.config import from_dict
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.models import AnyBackbone, Backbone, BackboneConfig, Timm, ViT
from dino_ssl.models.vit import Size
from dino_ssl.models.weights import (
    State,
    Which,
    backbone_weights,
    classifier_dropped,
    load_strict,
    read_file,
    read_safetensors,
    save_backbone,
    xcit_names,
)

__all__ = ["RELEASED", "Loaded", "load", "load_described", "load_strict", "save_backbone"]


class Released(NamedTuple):
    """One of the authors' released backbones."""

    backbone: ViT | Timm
    file: str
    """Its place below `HOST`."""
    sha256: str | None = None
    """Where it is known; the authors publish none, so the first download's is kept beside the file."""


HOST = "https://dl.fbaipublicfiles.com/dino/"
RELEASED = {
    "dino_vits16": Released(ViT(size="small", patch=16), "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vits8": Released(ViT(size="small", patch=8), "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "dino_vitb16": Released(ViT(size="base", patch=16), "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dino_vitb8": Released(ViT(size="base", patch=8), "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    "dino_resnet50": Released(Timm(name="resnet50"), "dino_resnet50_pretrain/dino_resnet50_pretrain.pth"),
    **{
        f"dino_xcit_{size}": Released(
            Timm(name=f"xcit_{size}_224"), f"dino_xcit_{size}_pretrain/dino_xcit_{size}_pretrain.pth"
        )
        for size in ("small_12_p16", "small_12_p8", "medium_24_p16", "medium_24_p8")
    },
}
"""The names of the authors' torch.hub entries, and what they stand for."""


def load(source: str | Path, *, which: Which = "teacher", backbone: BackboneConfig | None = None) -> Backbone:
    """A trained backbone in evaluation mode, on the CPU.

    `source` is the name of a released network (`RELEASED`), `timm:NAME`, the directory of a run, or a file:
    weights of a backbone (.safetensors, .pth, .pt), a checkpoint of this project, or a full checkpoint of the
    authors' code. The last two hold a `which` each. `backbone` says what the network is, where the file does
    not tell.
    """
    return load_described(source, which=which, backbone=backbone).backbone


class Loaded(NamedTuple):
    """A trained backbone, and what its source says of it."""

    backbone: Backbone
    config: BackboneConfig
    run: Mapping[str, Any] | None = None
    """The Run of a training checkpoint of this project, as JSON data."""


def load_described(source: str | Path, *, which: Which = "teacher", backbone: BackboneConfig | None = None) -> Loaded:
    """`load`, with what the source says of the network and of its training."""
    name, path = str(source), Path(source)
    if name in RELEASED:
        released = RELEASED[name]
        path = download(HOST + released.file, released.sha256)
        weights = backbone_weights(read_file(path), path, which)
        return Loaded(built(released.backbone, weights, name), released.backbone)
    if name.startswith("timm:"):
        config = Timm(name=name.removeprefix("timm:"), pretrained=True)
        return Loaded(config.build().eval(), config)
    if path.is_dir():
        path = file_of_run(path, which)
    if not path.is_file():
        hint = "" if path.suffix or len(path.parts) > 1 else did_you_mean(name, RELEASED)
        raise UserError(
            f"Nothing to load at {name!r}{hint or '.'}\n"
            f"Expected a run's directory, a file of weights, timm:NAME, or one of {', '.join(RELEASED)}."
        )
    run = None
    if path.suffix == ".safetensors":
        state, described = read_safetensors(path)
    else:
        content = read_file(path)
        state, described = backbone_weights(content, path, which), config_of_checkpoint(content)
        run = content["run"] if described else None
    config = backbone or described or infer(state, path)
    return Loaded(built(config, state, str(path)), config, run)


def built(config: BackboneConfig, state: State, source: str) -> Backbone:
    """The network of `config` with the weights of `state`, ready to be evaluated.

    A classifier on top (fc, head) is the one thing that a file may have too much. XCiT's official names are
    put into timm's.
    """
    network = config.untrained().build(drop_path=0.0)  # nothing is downloaded: the weights are given
    own = network.state_dict()
    load_strict(network, classifier_dropped(xcit_names(state, own), own), source)
    return network.eval()


def file_of_run(run: Path, which: Which) -> Path:
    """The file of a run's directory that holds the `which` backbone."""
    exported = [run / "backbone.safetensors"] if which == "teacher" else []
    candidates = [*exported, run / "checkpoints/best.pt", run / "checkpoints/last.pt"]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"{run} is not the directory of a run that has saved something: expected one of "
        f"{', '.join(str(path.relative_to(run)) for path in candidates)} in it."
    )


def download(url: str, sha256: str | None) -> Path:
    """The file of `url` in torch.hub's cache, downloaded once, and the same as ever: its SHA-256 is checked.

    Without a known sum, that of the first download is kept beside the file, as FILE.sha256.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except Exception as error:  # of the network, of the disk: whatever it is, the way out is the same
            raise UserError(
                f"Cannot download {url} ({error}).\nCheck the connection, or get the file by hand and put it at {path}"
            ) from error
    note = path.with_name(f"{path.name}.sha256")
    expected = sha256 or (note.read_text().split()[0] if note.is_file() else None)
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and actual != expected:
        raise UserError(
            f"{path} has the SHA-256 {actual}, expected {expected}.\nRemove it, and {note.name}, to get it again."
        )
    if not note.is_file():
        with contextlib.suppress(OSError):  # a cache that others own
            note.write_text(f"{actual}  {path.name}\n")
    return path


def config_of_checkpoint(content: Any) -> BackboneConfig | None:
    """The backbone that a checkpoint of this project names in its Run; None for any other file."""
    run = content.get("run") if isinstance(content, Mapping) else None
    described = run.get("backbone") if isinstance(run, Mapping) else None
    return from_dict(AnyBackbone, described) if described else None


def infer(state: State, path: Path) -> BackboneConfig:
    """The network that weights without a description belong to, from their names and shapes."""
    if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return infer_vit(state, path)
    if "conv1.weight" in state and "layer4.0.conv1.weight" in state:
        blocks = [count(state, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)]
        layer_ids = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
        depth = next((depth for depth, known in layer_ids.items() if known == blocks), None)
        if depth == 50 and "layer1.0.conv3.weight" not in state:
            depth = 34
        if depth:
            return Timm(name=f"resnet{depth}")
    if "cls_attn_blocks.0.norm1.weight" in state and "cls_token" in state:
        sizes = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}
        size, depth = sizes.get(state["cls_token"].shape[-1]), count(state, r"blocks\.(\d+)\.")
        halvings = count(state, r"patch_embed\.proj\.(\d+)\.") // 2 + 1  # convolutions of stride 2, with GELU between
        patch = {4: 16, 3: 8}.get(halvings)
        if size and patch:
            return Timm(name=f"xcit_{size}_{depth}_p{patch}_224")
    raise UserError(
        f"{path} does not say which network its {len(state)} weights belong to, and their names are not "
        f"those of a ViT, a ResNet or an XCiT: {', '.join(list(state)[:4])}, ...\n"
        f"Say it: load({str(path)!r}, backbone=Timm(name=...))."
    )


def infer_vit(state: State, path: Path) -> ViT:
    """Width, depth, patch, positions and registers from shapes; 64 channels per head, as in the paper."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    if width % 64:
        raise UserError(
            f"{path} is a ViT of width {width}, and its heads are not the usual width / 64.\n"
            f"Say it: load({str(path)!r}, backbone=ViT(width={width}, heads=...))."
        )
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    depth, heads = count(state, r"blocks\.(\d+)\."), width // 64
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * width
    rest: dict[str, Any] = {
        "patch": patch,
        "image_size": side * patch,
        "registers": registers,
        "mlp_ratio": hidden / width,
    }
    for size in ("tiny", "small", "base"):
        if ViT(size=size).shape == Size(width, depth, heads):
            return ViT(size=size, **rest)
    return ViT(width=width, depth=depth, heads=heads, **rest)


def count(state: State, pattern: str) -> int:
    """1 + the largest number that the pattern finds at the beginning of the names."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)
