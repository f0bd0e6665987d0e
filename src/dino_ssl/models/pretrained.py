"""Trained backbones: by name, from a run's directory, or from a file."""

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
from dino_ssl.models import Backbone, BackboneConfig, Timm, ViT
from dino_ssl.models.vit import SIZES, Size
from dino_ssl.models.weights import (
    StateDict,
    Which,
    backbone_weights,
    drop_classifier,
    load_strict,
    read_file,
    read_safetensors,
    xcit_to_timm,
)


class Released(NamedTuple):
    """One of the authors' released backbones."""

    backbone: BackboneConfig
    file: str
    """Path below `HOST`."""
    sha256: str | None = None
    """None: the hash of the first download is saved next to the file; the authors publish none."""


HOST = "https://dl.fbaipublicfiles.com/dino/"
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
XCIT = ("small_12_p16", "small_12_p8", "medium_24_p16", "medium_24_p8")
RELEASED = {
    "dino_vits16": Released(ViT(size="small", patch=16), "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vits8": Released(ViT(size="small", patch=8), "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "dino_vitb16": Released(ViT(size="base", patch=16), "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dino_vitb8": Released(ViT(size="base", patch=8), "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    "dino_resnet50": Released(Timm(name="resnet50"), "dino_resnet50_pretrain/dino_resnet50_pretrain.pth"),
    **{
        f"dino_xcit_{x}": Released(Timm(name=f"xcit_{x}_224"), f"dino_xcit_{x}_pretrain/dino_xcit_{x}_pretrain.pth")
        for x in XCIT
    },
}
"""The authors' released backbones by the names of their torch.hub entries."""


class Loaded(NamedTuple):
    """A trained backbone with its description."""

    backbone: Backbone
    config: BackboneConfig
    run: Mapping[str, Any] | None = None
    """The Run of a training checkpoint of this project, as JSON data."""


def load(
    source: str | Path, *, which: Which = "teacher", backbone: BackboneConfig | None = None, trust: bool = False
) -> Backbone:
    """Return a trained backbone in evaluation mode on the CPU.

    Args:
        source: the name of a released network (`RELEASED`), `timm:NAME`, the directory of a run, or a file: weights of
            a backbone (.safetensors, .pth, .pt), a checkpoint of this project, or a full checkpoint of the authors.
        which: the network of a checkpoint that has a student and a teacher.
        backbone: the architecture, if the file does not describe it.
        trust: import the backbone's class if the file names it as `module:Class`, which runs code of that module.
    """
    return load_described(source, which=which, backbone=backbone, trust=trust).backbone


def load_described(
    source: str | Path, *, which: Which = "teacher", backbone: BackboneConfig | None = None, trust: bool = False
) -> Loaded:
    """Return the backbone of `load` with its settings, and the Run that trained it if known."""
    name, path = str(source), Path(source)
    if name in RELEASED:
        released = RELEASED[name]
        path = download(HOST + released.file, released.sha256)
        weights = backbone_weights(read_file(path), path, which)
        return Loaded(build_with_weights(released.backbone, weights, name), released.backbone)
    if name.startswith("timm:"):
        config = Timm(name=name.removeprefix("timm:"), pretrained=True)
        return Loaded(config.build().eval(), config)
    if path.is_dir():
        path = weights_file(path, which)
    if not path.is_file():
        hint = "" if path.suffix or len(path.parts) > 1 else did_you_mean(name, RELEASED)
        raise UserError(
            f"There is no file {name!r}{hint or '.'}\n"
            f"Expected a run's directory, a file of weights, timm:NAME, or one of {', '.join(RELEASED)}."
        )
    run = None
    if path.suffix == ".safetensors":
        state, described = read_safetensors(path, trust=trust)
    else:
        content = read_file(path)
        state, described = backbone_weights(content, path, which), _checkpoint_config(content, trust)
        run = content["run"] if described else None
    config = backbone or described or infer_config(state, path)
    return Loaded(build_with_weights(config, state, str(path)), config, run)


def build_with_weights(config: BackboneConfig, state: StateDict, source: str) -> Backbone:
    """Return the network with the weights of `state`, in evaluation mode.

    A classifier (fc, head) in `state` is dropped, and the official XCiT's names are converted to timm's.
    """
    network = config.untrained().build(drop_path=0.0)  # downloads nothing
    expected = network.state_dict()
    load_strict(network, drop_classifier(xcit_to_timm(state, expected), expected), source)
    return network.eval()


def weights_file(run: Path, which: Which) -> Path:
    """Return the file of a run's directory that has the `which` backbone."""
    exported = [run / "backbone.safetensors"] if which == "teacher" else []
    candidates = [*exported, run / "checkpoints/best.pt", run / "checkpoints/last.pt"]
    for path in candidates:
        if path.is_file():
            return path
    names = ", ".join(str(path.relative_to(run)) for path in candidates)
    raise UserError(f"There are no weights in {run}: expected a run's directory with one of {names}.")


def download(url: str, sha256: str | None) -> Path:
    """Return the path of `url` in torch.hub's cache after downloading it once and checking its SHA-256.

    Without a known hash, the hash of the first download is saved next to the file as FILE.sha256.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except Exception as error:  # of the network or the disk
            raise UserError(
                f"Cannot download {url} ({error}).\nCheck the connection, or download the file yourself to {path}"
            ) from error
    hash_file = path.with_name(f"{path.name}.sha256")
    expected = sha256 or (hash_file.read_text().split()[0] if hash_file.is_file() else None)
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and actual != expected:
        raise UserError(
            f"{path} has the SHA-256 {actual}, expected {expected}.\n"
            f"Remove it and {hash_file.name} to download it again."
        )
    if not hash_file.is_file():
        with contextlib.suppress(OSError):  # a read-only cache
            hash_file.write_text(f"{actual}  {path.name}\n")
    return path


def _checkpoint_config(content: Any, trust: bool) -> BackboneConfig | None:
    """Return the backbone of the Run in a checkpoint of this project; None for any other file."""
    run = content.get("run") if isinstance(content, Mapping) else None
    described = run.get("backbone") if isinstance(run, Mapping) else None
    return from_dict(BackboneConfig, described, trust=trust) if described else None


def infer_config(state: StateDict, path: Path) -> BackboneConfig:
    """Return the network of weights without a description, from their names and shapes. Raise UserError if unknown."""
    if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return _infer_vit(state, path)
    if {"layer4.0.conv1.weight", "cls_attn_blocks.0.norm1.weight"} & state.keys():
        import timm

        for config in (Timm(name=name) for name in (*RESNETS, *timm.list_models("xcit_*_224"))):
            with torch.device("meta"):
                expected = {name: value.shape for name, value in config.build().state_dict().items()}
            weights = drop_classifier(xcit_to_timm(state, expected), expected)
            if expected == {name: value.shape for name, value in weights.items()}:
                return config
    raise UserError(
        f"{path} does not describe the network of its {len(state)} weights, and their names are not those of a ViT, a "
        f"ResNet or an XCiT: {', '.join(list(state)[:4])}, ...\n"
        f"Pass it: load({str(path)!r}, backbone=Timm(name=...))."
    )


def _infer_vit(state: StateDict, path: Path) -> ViT:
    """Return the ViT of these shapes with 64 channels per head, as in the paper."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    if width % 64:
        raise UserError(
            f"{path} is a ViT of width {width}; its number of heads cannot be inferred as width / 64.\n"
            f"Pass it: load({str(path)!r}, backbone=ViT(width={width}, heads=...))."
        )
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    shape = Size(width, _count(state, r"blocks\.(\d+)\."), width // 64)
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * width
    size = next((size for size, known in SIZES.items() if known == shape), None)
    architecture: dict[str, Any] = shape._asdict() if size is None else {"size": size}
    return ViT(
        **architecture,
        patch=patch,
        image_size=side * patch,
        registers=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        mlp_ratio=hidden / width,
    )


def _count(state: StateDict, pattern: str) -> int:
    """Return 1 + the largest number that the pattern matches at the beginning of the names."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)
