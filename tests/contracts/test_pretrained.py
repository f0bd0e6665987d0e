"""Loading trained weights: every layout, no partial load, no code execution."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from dino_ssl.config import to_dict
from dino_ssl.errors import UserError
from dino_ssl.loading import open_checkpoint
from dino_ssl.models import DINOHead, Network, Timm, ViT, pretrained
from dino_ssl.models.pretrained import RELEASED, load
from dino_ssl.models.weights import load_strict, save_backbone

VIT = ViT(width=64, depth=2, heads=1, patch=8, image_size=32, drop_path=0.0)
X = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


KEYS = Path(__file__).parents[1] / "golden/data/official_state_dict_keys.json"


@pytest.fixture
def networks() -> dict[str, Network]:
    torch.manual_seed(0)
    return {which: Network(VIT.build(), DINOHead(64, 32, hidden=16, bottleneck=8)) for which in ("student", "teacher")}


def same(loaded, expected) -> bool:
    assert not loaded.training
    with torch.no_grad():
        return torch.equal(loaded(X), expected.eval()(X))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_authors_full_checkpoint(networks, tmp_path: Path, which):
    """The student comes from DistributedDataParallel, the teacher does not; the rest is an optimizer and
    arguments.
    """
    student = {f"module.{name}": value for name, value in networks["student"].state_dict().items()}
    optimizer = torch.optim.AdamW(networks["student"].parameters()).state_dict()
    saved = {
        "student": student,
        "teacher": networks["teacher"].state_dict(),
        "optimizer": optimizer,
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, data_path="/data"),
        "dino_loss": {"center": torch.zeros(1, 32)},
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    assert same(load(tmp_path / "checkpoint.pth", which=which), networks[which].backbone)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_this_projects_checkpoint(networks, tmp_path: Path, which):
    """The network comes from the file's Run: heads = 2 could not be read off the weights."""
    config = ViT(width=64, depth=2, heads=2, patch=8, image_size=32)
    backbones = {name: config.build(drop_path=0.0) for name in networks}
    method = {f"{n}.backbone.{key}": v for n, b in backbones.items() for key, v in b.state_dict().items()}
    method |= {f"{n}.head.{key}": v for n, b in networks.items() for key, v in b.head.state_dict().items()}
    saved = {
        "run": {"type": "Run", "backbone": to_dict(config)},
        "method": {**method, "center": torch.zeros(32)},
    }
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved, tmp_path / "checkpoints" / "last.pt")
    assert same(load(tmp_path, which=which), backbones[which])
    assert same(load(tmp_path / "checkpoints" / "last.pt", which=which), backbones[which])


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("registers", [0, 3])
def test_vit_is_inferred_from_weights(tmp_path: Path, prefix, registers):
    config = ViT(width=128, depth=3, patch=4, image_size=20, registers=registers, mlp_ratio=2, heads=2)
    network = config.build(drop_path=0.0)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    assert same(load(tmp_path / "weights.pth"), network)


def test_run_folder_loads_its_exported_teacher(networks, tmp_path: Path):
    save_backbone(VIT, networks["teacher"].backbone.state_dict(), tmp_path / "backbone.safetensors")
    assert same(load(str(tmp_path)), networks["teacher"].backbone)
    with pytest.raises(UserError, match=r"checkpoints/last\.pt"):
        load(tmp_path, which="student")


def test_saved_timm_weights_load_in_timm(tmp_path: Path):
    config = Timm(name="test_resnet", pretrained=True)  # pretrained must not download again
    ours = Timm(name="test_resnet").build()
    save_backbone(config, ours.state_dict(), tmp_path / "r.safetensors")
    reference = timm.create_model("test_resnet", num_classes=0)
    reference.load_state_dict(safetensors.torch.load_file(tmp_path / "r.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(reference.eval()(X), ours.eval()(X))
    assert same(load(tmp_path / "r.safetensors"), ours)


def test_saved_vit_loads_in_timm(tmp_path: Path):
    ours = ViT(size="tiny", depth=2).build()
    save_backbone(ViT(size="tiny", depth=2), ours.state_dict(), tmp_path / "v.safetensors")
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    reference.load_state_dict(safetensors.torch.load_file(tmp_path / "v.safetensors"))


def test_position_embeddings_of_any_name_are_loaded(tmp_path: Path):
    config = Timm(name="visformer_tiny", args=(("embed_dim", "64"), ("depth", "(1, 1, 1)"), ("num_heads", "2")))
    state = config.build().state_dict()  # timm's filter for an XCiT would remove pos_embed1
    save_backbone(config, state, tmp_path / "visformer.safetensors")
    assert torch.equal(load(tmp_path / "visformer.safetensors").state_dict()["pos_embed1"], state["pos_embed1"])


def test_classifier_is_dropped(tmp_path: Path):
    reference = timm.create_model("test_resnet", num_classes=10)
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "r.pth")
    reference.reset_classifier(0)
    assert same(load(tmp_path / "r.pth", backbone=Timm(name="test_resnet")), reference)


def test_official_xcit_names_are_converted(tmp_path: Path):
    """Released XCiT files name pos_embeder, and fuse q, k and v of class attention."""
    torch.manual_seed(0)
    reference = timm.create_model("xcit_nano_12_p8_224", num_classes=0)
    official = {}
    for name, value in reference.state_dict().items():
        if ".attn.q." in name and name.startswith("cls_attn_blocks"):
            parts = [reference.state_dict()[name.replace(".q.", f".{part}.")] for part in "qkv"]
            official[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not (name.startswith("cls_attn_blocks") and (".attn.k." in name or ".attn.v." in name)):
            official[name.replace("pos_embed.", "pos_embeder.")] = value
    torch.save(official, tmp_path / "xcit.pth")
    assert same(load(tmp_path / "xcit.pth", backbone=Timm(name="xcit_nano_12_p8_224")), reference)


# ---------------------------------------------------------------- what must not pass


def test_mismatched_weights_raise_and_load_nothing():
    network = VIT.build()
    state = dict(network.state_dict())
    state["norm.extra"] = torch.zeros(3)
    state["cls_token"] = torch.zeros(1, 1, 32)
    del state["norm.bias"]
    state["norm.weight"] = torch.full((64,), 7.0)
    with pytest.raises(UserError) as raised:
        load_strict(network, state, "some.pth")
    message = str(raised.value)
    assert "some.pth" in message
    assert "3 of " in message
    assert "norm.bias: expected [64], got nothing" in message
    assert "norm.extra: expected nothing, got [3]" in message
    assert "cls_token: expected [1, 1, 64], got [1, 1, 32]" in message
    assert (network.norm.weight == 1).all()


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape"])
def test_one_wrong_name_raises(wrong):
    network = VIT.build()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    if wrong == "missing":
        del state["norm.bias"]
    elif wrong == "unexpected":
        state["norm.extra"] = torch.zeros(3)
    else:
        state["norm.bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"norm\.(bias|extra): expected"):
        load_strict(network, state, "some.pth")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_loading_never_runs_code(tmp_path: Path, write):
    write({"teacher": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="run code"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


BAD = ("empty.pth", "text.pth", "cut.pth", "cut.safetensors", "list.pt", "nothing.pt")


def bad_files(folder: Path) -> dict[str, Path]:
    files = {
        name: folder / name for name in ("empty.pth", "text.pth", "cut.pth", "cut.safetensors", "list.pt", "nothing.pt")
    }
    files["empty.pth"].write_bytes(b"")
    files["text.pth"].write_text("not weights at all")
    torch.save(VIT.build().state_dict(), folder / "whole.pth")
    files["cut.pth"].write_bytes((folder / "whole.pth").read_bytes()[:-1000])
    save_backbone(VIT, VIT.build().state_dict(), folder / "whole.safetensors")
    files["cut.safetensors"].write_bytes((folder / "whole.safetensors").read_bytes()[:-1000])
    torch.save([1, 2], files["list.pt"])
    torch.save({"epoch": 3}, files["nothing.pt"])
    return files


@pytest.mark.parametrize("name", BAD)
def test_error_names_a_file_without_weights(tmp_path: Path, name):
    with pytest.raises(UserError, match=name):
        load(bad_files(tmp_path)[name])


def test_unknown_architecture_raises(tmp_path: Path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "unknown.pth")
    with pytest.raises(UserError, match="backbone="):
        load(tmp_path / "unknown.pth")
    narrow = ViT(width=48, depth=1, heads=3, patch=8, image_size=16)
    network = narrow.build(drop_path=0.0)
    torch.save(network.state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(UserError, match="width 48"):
        load(tmp_path / "narrow.pth")
    assert same(load(tmp_path / "narrow.pth", backbone=narrow), network)


def test_vit_with_another_mlp_raises(tmp_path: Path):
    state = VIT.build().state_dict()
    torch.save({name.replace("mlp.fc1", "mlp.w12"): value for name, value in state.items()}, tmp_path / "swiglu.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.w12"):
        load(tmp_path / "swiglu.pth")


@pytest.mark.parametrize("run", ["a name", {"backbone": None}])
def test_run_of_another_program_is_ignored(tmp_path: Path, run):
    torch.save({"run": run, "state_dict": VIT.build().state_dict()}, tmp_path / "other.pth")
    (tmp_path / "run.json").write_text("[1]")
    assert open_checkpoint(tmp_path / "other.pth").backbone.transform.size == 32


def test_missing_student_raises(networks, tmp_path: Path):
    torch.save({"teacher": networks["teacher"].state_dict()}, tmp_path / "t.pth")
    with pytest.raises(UserError, match="no student"):
        load(tmp_path / "t.pth", which="student")


def test_error_suggests_the_nearest_name(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean 'dino_vits16'"):
        load("dino_vit16")
    message = r"no last weights in .*with backbone.safetensors or checkpoints/last.pt; it has none\.$"
    with pytest.raises(UserError, match=message):
        load(tmp_path)
    with pytest.raises(
        UserError, match="`weights` best selects a file of a run's directory, and 'dino_vits16' is none"
    ):
        load("dino_vits16", weights="best")


def test_a_run_without_the_chosen_weights_names_those_it_has(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("backbone.safetensors", "checkpoints/last.pt"):
        (tmp_path / name).touch()
    message = r"no best weights .*; it has backbone.safetensors and checkpoints/last.pt\.\n.*, use `weights` last\.$"
    with pytest.raises(UserError, match=message):
        load(tmp_path, weights="best")


def test_old_file_is_kept_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_backbone(VIT, VIT.build().state_dict(), tmp_path / "b.safetensors")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_backbone(VIT, VIT.build().state_dict(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------- released weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.hub's cache in a fresh folder, and a download that serves a small ViT; gives the addresses asked
    for.
    """
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(RELEASED, "dino_vits16", RELEASED["dino_vits16"]._replace(backbone=VIT))
    torch.manual_seed(0)
    weights, asked = VIT.build().state_dict(), []

    def serve(url: str, path: str, *_, **__) -> None:
        asked.append(url)
        torch.save(weights, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", serve)
    return asked


def test_released_weights_are_downloaded_once(hub: list[str]):
    load("dino_vits16")
    load("dino_vits16")
    assert hub == ["https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"]


def test_changed_released_weights_are_refused(hub: list[str], tmp_path: Path):
    load("dino_vits16")
    path = tmp_path / "hub/checkpoints/dino_deitsmall16_pretrain.pth"
    torch.save({name: value + 1 for name, value in torch.load(path).items()}, path)
    with pytest.raises(UserError, match=r"has changed since it was downloaded, by its SHA-256"):
        load("dino_vits16")


def test_the_hash_of_a_broken_download_is_not_recorded(hub: list[str], tmp_path: Path, monkeypatch):
    def cut(url: str, path: str, *_, **__) -> None:
        Path(path).write_bytes(b"half of it")

    served = torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, "download_url_to_file", cut)
    with pytest.raises(UserError, match="Cannot load"):
        load("dino_vits16")
    assert list((tmp_path / "hub/checkpoints").iterdir()) == []
    monkeypatch.setattr(torch.hub, "download_url_to_file", served)
    load("dino_vits16")


def test_error_of_a_failed_download_has_url_and_path(hub: list[str], tmp_path: Path, monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as raised:
        load("dino_vitb8")
    assert "https://dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth" in str(raised.value)
    assert str(tmp_path / "hub/checkpoints/dino_vitbase8_pretrain.pth") in str(raised.value)


def test_released_architectures_have_the_names_of_their_files():
    keys = json.loads(KEYS.read_text())
    entries = {"dino_vits16": "vit_small_patch16", "dino_vitb8": "vit_base_patch8", "dino_resnet50": "resnet50"}
    for name, entry in entries.items():
        with torch.device("meta"):
            state = RELEASED[name].backbone.build().state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == keys[entry], name
        inferred = pretrained.infer_config({key: value for key, value in state.items()}, Path(name))
        assert inferred == RELEASED[name].backbone, name
