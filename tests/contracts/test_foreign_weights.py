"""Checkpoints of other programs: prefixes, nesting, names of Hugging Face, DINOv2 and timm, and unusable values."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from dino_ssl.config import to_dict
from dino_ssl.errors import UserError
from dino_ssl.models import Timm, ViT
from dino_ssl.models.pretrained import load
from dino_ssl.models.weights import save_backbone
from dino_ssl.preprocessing import Preprocessing

VIT = ViT(width=64, depth=3, heads=1, patch=8, image_size=32, registers=2, drop_path=0.0)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
State = dict[str, Tensor]

# The modules of a block with their names in other libraries; q, k and v are apart.
HUGGING_FACE_4 = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "attn.q": "attention.attention.query", "attn.k": "attention.attention.key", "attn.v": "attention.attention.value",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
HUGGING_FACE_5 = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
    "attn.q": "attention.q_proj", "attn.k": "attention.k_proj", "attn.v": "attention.v_proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
EMBEDDINGS = {
    "cls_token": "embeddings.cls_token", "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias",
}  # fmt: skip


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    network = VIT.build()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def output(network: Any) -> Tensor:
    assert not network.training
    with torch.no_grad():
        return network(X)


def hugging_face(state: State, modules: dict[str, str], blocks: str) -> State:
    """Rename the weights of `VisionTransformer` to those of a ViT or DINOv2 of Hugging Face."""
    renamed = {}
    for name, value in state.items():
        if not (match := re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", name)):
            renamed[EMBEDDINGS[name]] = value
            continue
        number, module, kind = match.groups()
        parts = {"attn.q": 0, "attn.k": 1, "attn.v": 2} if module == "attn.qkv" else {module: None}
        for part, index in parts.items():
            renamed[f"{blocks}.{number}.{modules[part]}.{kind}"] = value if index is None else value.chunk(3)[index]
    return {name: value.clone() for name, value in renamed.items()}


PREFIXES = (
    ("", "_orig_mod."), ("", "module._orig_mod."), ("", "student_backbone."), ("", "teacher_backbone."),
    ("", "module.base_encoder."), ("", "encoder."), ("state_dict", "model."), ("model_state_dict", "module."),
    ("state_dict", "student.backbone._orig_mod."), ("model", "encoder.vit."),
)  # fmt: skip


@pytest.mark.parametrize(("key", "prefix"), PREFIXES)
def test_weights_are_found_under_any_key_and_prefix(network, tmp_path: Path, key, prefix):
    state: dict[str, Any] = {prefix + name: value for name, value in network.state_dict().items()}
    state |= {"projection.weight": torch.zeros(3), f"{prefix}fc.bias": torch.zeros(3)}
    torch.save(
        {key: state, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}} if key else state, tmp_path / "x.bin"
    )
    which = "student" if "student" in prefix else "teacher"
    assert torch.equal(output(load(tmp_path / "x.bin", which=which)), output(network))


def test_of_two_encoders_the_trained_one_is_loaded(network, tmp_path: Path):
    state = {f"module.base_encoder.{name}": value for name, value in network.state_dict().items()}
    state |= {f"module.momentum_encoder.{name}": value + 1 for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    assert torch.equal(output(load(tmp_path / "moco.pth")), output(network))


def test_a_prefix_of_any_network_is_removed(tmp_path: Path):
    config = Timm(name="test_convnext")
    network = config.build().eval()
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "lightning.ckpt")
    assert torch.equal(output(load(tmp_path / "lightning.ckpt", backbone=config)), output(network))


@pytest.mark.parametrize(("modules", "blocks"), [(HUGGING_FACE_4, "encoder.layer"), (HUGGING_FACE_5, "layers")])
@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_directory_of_hugging_face(network, tmp_path: Path, modules, blocks, prefix, file):
    state = hugging_face(network.state_dict(), modules, blocks)
    state |= {"embeddings.mask_token": torch.zeros(1, 64), "pooler.dense.weight": torch.zeros(64, 64)}
    state = {prefix + name: value for name, value in state.items()}
    if file == "model.safetensors":
        safetensors.torch.save_file(state, tmp_path / file)
    else:
        torch.save(state, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    loaded = load(tmp_path)
    assert loaded.config == ViT(width=64, depth=3, heads=2, patch=8, image_size=32, registers=2)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    assert load(tmp_path).transform == Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0] * 3, "image_std": [1] * 3}))
    assert load(tmp_path).transform == Preprocessing(size=32, mean=(0, 0, 0), std=(1, 1, 1))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "image_std": [0.0] * 3}))
    assert load(tmp_path).transform == Preprocessing(size=32)
    for damaged in ("{bad", "[1]"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(UserError, match=r"config\.json cannot be read: expected a JSON object"):
            load(tmp_path)
    (tmp_path / "config.json").unlink()
    assert torch.equal(output(load(tmp_path)), output(network))


@pytest.mark.parametrize("chunked", [False, True])
def test_layer_scale_is_part_of_the_linear_layer_before_it(network, tmp_path: Path, chunked):
    """DINOv2's files, also those of its trainings, whose blocks are in chunks."""
    state = network.state_dict()
    for i in range(VIT.shape.depth):
        for scale, linear in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = torch.rand(64, generator=torch.Generator().manual_seed(i)) + 0.5
            state[f"blocks.{i}.{scale}.gamma"] = gamma
            state[f"blocks.{i}.{linear}.weight"] = state[f"blocks.{i}.{linear}.weight"] / gamma[:, None]
            state[f"blocks.{i}.{linear}.bias"] = state[f"blocks.{i}.{linear}.bias"] / gamma
    state["mask_token"] = torch.zeros(1, 64)
    if chunked:
        state = {re.sub(r"^blocks\.(\d)", r"blocks.1.\1", name): value for name, value in state.items()}
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "dinov2.pth")
    torch.testing.assert_close(output(load(tmp_path / "dinov2.pth")), output(network))


def test_a_dinov2_of_timm_with_registers(tmp_path: Path):
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0, init_values=0.7
    )
    reference: Any = timm.create_model("vit_small_patch14_reg4_dinov2", **settings).eval()
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    with torch.no_grad():
        expected = reference.forward_features(X)[:, 0]
    torch.testing.assert_close(output(load(tmp_path / "timm.pth")), expected)


def test_old_files_lack_the_counts_of_batch_norm(tmp_path: Path):
    config = Timm(name="test_resnet")
    network = config.build().eval()
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    assert torch.equal(output(load(tmp_path / "old.pth", backbone=config)), output(network))


def test_heads_that_a_file_does_not_name_are_assumed_aloud_and_can_be_set(network, tmp_path: Path, caplog):
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    with caplog.at_level("INFO", "dino_ssl"):
        assert load(tmp_path / "vit.pth").config == ViT(width=64, depth=3, heads=1, patch=8, image_size=32, registers=2)
        assert "assumed 1 attention heads of 64 channels; set `num_heads`" in caplog.text
        caplog.clear()
        four = load(tmp_path / "vit.pth", num_heads=4)
        assert not caplog.text
    assert not torch.equal(output(four), output(network))
    with pytest.raises(UserError, match="multiple of the heads, got 64 and 5"):
        load(tmp_path / "vit.pth", num_heads=5)
    with pytest.raises(UserError, match="`num_heads` must be at least 1; got 0"):
        load(tmp_path / "vit.pth", num_heads=0)
    save_backbone(VIT, network.state_dict(), tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match="`num_heads` is for a ViT that"):
        load(tmp_path / "ours.safetensors", num_heads=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "int64"])
def test_unusable_values_are_refused(network, tmp_path: Path, value):
    state = network.state_dict()
    state["norm.bias"] = state["norm.bias"].long() if value == "int64" else state["norm.bias"].clone()
    if value != "int64":
        state["norm.bias"][3] = value
    save_backbone(VIT, state, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=r"broken.safetensors cannot be used: 1 of .*: norm\.bias\."):
        load(tmp_path / "broken.safetensors")


def test_a_vit_of_zero_heads_is_refused():
    with pytest.raises(UserError, match=r"`heads` must be at least 1 and .*; got 0"):
        ViT(heads=0)


DESCRIPTIONS = (
    {"depth": 10**7}, {"width": 10**7}, {"heads": 0}, {"image_size": 10**9}, {"patch": 0}, {"registers": 10**9},
    {"mlp_ratio": float("nan")}, {"mlp_ratio": 1e9}, {"depth": 2.5}, {"size": "huge"}, {"type": "os.system"},
)  # fmt: skip


@pytest.mark.parametrize("change", DESCRIPTIONS)
def test_a_description_out_of_bounds_is_refused_before_the_network_is_built(network, tmp_path: Path, change):
    """A file of a few kB could describe a network of terabytes."""
    described = json.dumps(to_dict(VIT) | change)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors", metadata={"backbone": described})
    with pytest.raises(UserError, match=next(iter(change)) if "type" not in change else "os.system"):
        load(tmp_path / "x.safetensors")


def test_a_network_that_does_not_fit_the_weights_is_not_built(network, tmp_path: Path, monkeypatch):
    described = json.dumps(to_dict(VIT) | {"width": 2**16, "heads": 2**10, "depth": 50})  # 2.6e12 weights
    safetensors.torch.save_file(
        dict(network.state_dict()), tmp_path / "x.safetensors", metadata={"backbone": described}
    )
    with pytest.raises(UserError, match="do not fit the network"):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("described", ["[1]", '"x"', "[" * 100_000 + "]" * 100_000])
def test_metadata_that_is_no_description_is_refused(network, tmp_path: Path, described):
    safetensors.torch.save_file(
        dict(network.state_dict()), tmp_path / "x.safetensors", metadata={"backbone": described}
    )
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load(tmp_path / "x.safetensors")


SHAPES = {"patch_embed.proj.weight": ((64,), (0, 3, 8, 8), (64, 4, 8, 8)), "pos_embed": ((5,), (1, 7, 64), (1, 0, 64))}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in SHAPES for shape in SHAPES[name]])
def test_shapes_of_no_vit_are_refused(network, tmp_path: Path, name, shape):
    torch.save(network.state_dict() | {name: torch.zeros(shape)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth|do not have its shapes"):
        load(tmp_path / "x.pth")


def test_keys_that_are_no_names_are_ignored(network, tmp_path: Path):
    torch.save({**network.state_dict(), 5: torch.zeros(2), "blocks": {7: torch.zeros(2)}}, tmp_path / "x.pth")
    assert torch.equal(output(load(tmp_path / "x.pth")), output(network))
