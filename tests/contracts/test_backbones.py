"""The contract of every backbone, and properties of the Vision Transformer."""

import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch.nn import functional as F

from dino_ssl.errors import UserError
from dino_ssl.models import Attentive, Backbone, Timm, ViT

TINY = {"width": 32, "depth": 3, "heads": 2, "image_size": 32}
BACKBONES = {
    "vit": ViT(patch=8, **TINY),
    "vit-registers": ViT(patch=8, registers=3, **TINY),
    "vit-patch5": ViT(patch=5, **TINY),
    "vit-conv-stem": ViT(patch=8, stem="conv", **TINY),
    "resnet": Timm(name="test_resnet"),
    "convnext": Timm(name="test_convnext"),
    "efficientnet": Timm(name="test_efficientnet"),
    "xcit": Timm(name="xcit_nano_12_p16_224", args=(("depth", "2"),)),
    "swin (NHWC)": Timm(name="swin_tiny_patch4_window7_224", args=(("depths", "(1, 1, 1, 1)"), ("embed_dim", "24"))),
    "timm-vit": Timm(name="test_vit"),
    "timm-vit-registers": Timm(name="test_vit", args=(("reg_tokens", "2"),)),
}


@pytest.fixture(params=BACKBONES, scope="module")
def backbone(request) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES[request.param].build(drop_path=0.0).eval()


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height * width))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (67, 101)], ids=str)
def test_feature_vector_is_cls_at_any_size(backbone: Backbone, size):
    x = images(*size)
    with torch.no_grad():
        vector, [features] = backbone(x), backbone.features(x)
    assert vector.shape == (2, backbone.embed_dim)
    torch.testing.assert_close(features.cls, vector, atol=1e-5, rtol=1e-4)
    h, w = features.patches.shape[1:3]
    assert h in (size[0] // backbone.patch, -(-size[0] // backbone.patch))
    assert w in (size[1] // backbone.patch, -(-size[1] // backbone.patch))
    assert vector.std(0).max() > 0, "two images, one vector"


def test_images_of_a_batch_are_independent(backbone: Backbone):
    x = images(64, 64, count=3)
    with torch.no_grad():
        together, alone = backbone(x), torch.cat([backbone(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_spatial_map_has_the_orientation_of_the_image(backbone: Backbone):
    """A change in the upper right corner of a wide image changes the upper right of the map most."""
    x = images(64, 128, count=1)
    y = x.clone()
    y[..., : backbone.patch, -backbone.patch :] += 3.0
    with torch.no_grad():
        change = (backbone.features(y)[0].patches - backbone.features(x)[0].patches).norm(dim=-1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row <= change.shape[0] // 2 - (change.shape[0] > 2)
    assert column >= change.shape[1] // 2


def test_last_of_several_layers_equals_the_single_one(backbone: Backbone):
    x = images(64, 128)
    with torch.no_grad():
        [last], two = backbone.features(x), backbone.features(x, layers=2)
    assert len(two) == 2
    torch.testing.assert_close(two[-1].cls, last.cls)
    torch.testing.assert_close(two[-1].patches, last.patches)
    assert two[0].cls.shape != last.cls.shape or not torch.allclose(two[0].cls, last.cls)
    assert all(f.patches.shape[2] > 1.5 * f.patches.shape[1] for f in two), "rows, then columns"
    with pytest.raises(UserError):
        backbone.features(x, layers=99)


def test_every_parameter_gets_a_gradient(backbone: Backbone):
    x = images(64, 64)
    backbone.zero_grad()
    backbone(x).pow(2).sum().backward()
    idle = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


def test_attention_is_the_weighting_of_the_values(backbone: Backbone):
    if not isinstance(backbone, Attentive):
        pytest.skip("no self-attention over tokens")
    x = images(48, 64)
    net = getattr(backbone, "net", backbone)
    attn, seen = net.blocks[1].attn, {}
    hooks = [
        attn.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0])),
        attn.register_forward_hook(lambda _, __, out: seen.update(out=out)),
    ]
    with torch.no_grad():
        backbone(x)
        [hook.remove() for hook in hooks]
        weights = backbone.attention(x, layer=1)
        again = backbone.attention(x, layer=1 - backbone.num_blocks)
        heads = weights.shape[1]
        values = attn.qkv(seen["x"]).chunk(3, dim=-1)[2].unflatten(-1, (heads, -1))
        mixed = attn.proj(torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2))
    torch.testing.assert_close(mixed, seen["out"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(weights, again)
    h, w = backbone.features(x)[0].patches.shape[1:3]
    assert weights.shape[-1] == 1 + backbone.registers + h * w
    with pytest.raises(UserError):
        backbone.attention(x, layer=backbone.num_blocks)


# ---------------------------------------------------------------- the Vision Transformer


def test_parameter_counts_are_those_of_table_1():
    with torch.device("meta"):
        millions = {
            (size, patch): sum(p.numel() for p in ViT(size=size, patch=patch).build().parameters()) / 1e6
            for size, patch in (("tiny", 16), ("small", 16), ("small", 8), ("base", 16), ("base", 8))
        }
    table = {("tiny", 16): 5, ("small", 16): 21, ("small", 8): 21, ("base", 16): 85, ("base", 8): 85}
    assert {key: int(value) for key, value in millions.items()} == table


def test_vit_equals_timms():
    """Equal names and, with equal weights, equal features, also by timm's `forward_features`."""
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3).eval()
    ours = ViT(size="tiny", depth=3).build().eval()
    ours.load_state_dict(reference.state_dict())
    x = images(224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit-patch5", "vit-conv-stem"])
def test_incomplete_patches_are_ignored(name):
    vit = BACKBONES[name].build().eval()
    x, (height, width) = images(33, 37), (side - side % vit.patch for side in (33, 37))
    with torch.no_grad():
        torch.testing.assert_close(vit(x), vit(x[..., :height, :width]))
    with pytest.raises(UserError, match="smaller than one patch"):
        vit(images(4, 40))


@pytest.mark.parametrize("hw", [(2, 2), (3, 7), (16, 16), (13, 1)], ids=str)
def test_position_interpolation_adds_a_tenth(hw):
    """The authors' scale is (grid + 0.1) / side; grid / side would fail here."""
    vit = BACKBONES["vit"].build()
    torch.nn.init.normal_(vit.pos_embed)
    grid = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    scale = [(side + 0.1) / 4 for side in hw]
    authors = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).mT
    plain = F.interpolate(grid, size=hw, mode="bicubic").flatten(2).mT
    torch.testing.assert_close(vit.positions(*hw)[:, 1:], authors)
    assert not torch.allclose(authors, plain, atol=1e-3)
    torch.testing.assert_close(vit.positions(*hw)[:, :1], vit.pos_embed[:, :1])
    assert vit.positions(4, 4) is vit.pos_embed


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    torch.manual_seed(0)
    vit = ViT(patch=8, drop_path=0.4, **TINY).build()
    assert [block.drop_path for block in vit.blocks] == pytest.approx([0, 0.2, 0.4])
    from dino_ssl.models.blocks import drop_path

    dropped = drop_path(torch.ones(20000, 2, 2), 0.4)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (dropped == dropped[:, :1, :1]).all(), "a whole image's branch is dropped, or none of it"
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    x = images(32, 32)
    assert not torch.equal(vit(x), vit(x))
    vit.eval()
    assert torch.equal(vit(x), vit(x))
    teacher = ViT(patch=8, drop_path=0.4, **TINY).build(drop_path=0.0)
    assert torch.equal(teacher(x), teacher(x)), "in training mode, as the authors' teacher is"


def test_registers_only_add_keys_and_values():
    """A register is one more token for every query, without a position and not in the spatial map."""
    vit = BACKBONES["vit-registers"].build().eval()
    x = images(32, 48)
    with torch.no_grad():
        before = vit.features(x)[0]
        vit.register_tokens += 1.0
        after = vit.features(x)[0]
    assert before.patches.shape[1:3] == (4, 6)
    assert not torch.allclose(before.cls, after.cls)


def test_initial_weights_are_the_authors():
    torch.manual_seed(0)
    vit = ViT(size="tiny", depth=2, registers=4).build()
    for name, p in vit.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "patch_embed" not in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize("wrong", [{"patch": 0}, {"patch": 64, "image_size": 32}, {"width": 30, "heads": 4}])
def test_invalid_settings_raise(wrong):
    with pytest.raises(UserError):
        ViT(**wrong)


# ---------------------------------------------------------------- timm


def test_error_suggests_the_nearest_name():
    with pytest.raises(UserError, match="resnet50"):
        Timm(name="resnet_50").build()


def test_error_names_unsupported_arguments():
    with pytest.raises(UserError, match="no_such_setting"):
        Timm(name="resnet10t", args=(("no_such_setting", "1"),)).build()
    with pytest.raises(UserError, match="no_such_setting"):  # of a part of the network
        Timm(name="resnet10t", args=(("block_args", "{'no_such_setting': 1}"),)).build()
    with pytest.raises(UserError, match="stochastic depth"):
        Timm(name="hrnet_w18_small", drop_path=0.1).build()


def test_teacher_has_no_drop_path():
    config = Timm(name="test_vit", drop_path=0.5)
    x = images(64, 64)
    torch.manual_seed(0)
    student, teacher = config.build(), config.build(drop_path=0.0)
    assert not torch.equal(student(x), student(x))
    assert torch.equal(teacher(x), teacher(x))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the Hugging Face Hub unreachable, refuse to wait for a retry, and return its empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    return tmp_path


def test_without_a_connection_pretrained_weights_fail_at_once(offline: Path, monkeypatch: pytest.MonkeyPatch):
    message = rf"weights of test_resnet: http://127.0.0.1:9 cannot be reached, .* not in the cache {offline}.*\.\nCheck"
    with pytest.raises(UserError, match=message):
        Timm(name="test_resnet", pretrained=True).build()
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="weights of test_resnet: HF_HUB_OFFLINE is set, and they are not in"):
        Timm(name="test_resnet", pretrained=True).build()
    assert constants.HF_HUB_OFFLINE


def test_without_a_connection_cached_weights_are_loaded(offline: Path):
    repository, commit = offline / "models--timm--test_resnet.r160_in1k", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    network = timm.create_model("test_resnet")
    save_file(network.state_dict(), repository / "snapshots" / commit / "model.safetensors")
    x = images(64, 64)
    with torch.no_grad():
        expected = network.eval().forward_head(network.forward_features(x), pre_logits=True)
        assert torch.equal(Timm(name="test_resnet", pretrained=True).build().eval()(x), expected)


def test_a_failed_download_is_one_sentence_that_says_what_to_do(offline: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError("No space left on device. Please free some and so on.")

    monkeypatch.setattr(timm, "create_model", fail)
    message = r"pretrained weights of resnet10t: No space left on device\.\nCheck the connection"
    with pytest.raises(UserError, match=message):
        Timm(name="resnet10t", pretrained=True).build()


def test_conv_stem_equals_its_definition():
    """Three convolutions of stride 2 to 8, 16 and 32 channels, batch norm, ReLU; then 1 x 1. One token per patch."""
    stem = ViT(patch=8, stem="conv", **TINY).build().patch_embed
    x, state = images(32, 40), stem.state_dict()
    expected = x
    for i, width in zip((0, 3, 6), (8, 16, 32), strict=True):
        expected = F.conv2d(expected, state[f"layers.{i}.weight"], stride=2, padding=1)
        assert expected.shape[1] == width
        expected = F.relu(
            (expected - expected.mean((0, 2, 3), True)) / (expected.var((0, 2, 3), False, True) + 1e-5) ** 0.5
        )
    expected = F.conv2d(expected, state["layers.9.weight"], state["layers.9.bias"])
    with torch.no_grad():
        torch.testing.assert_close(stem(x), expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)
    assert expected.shape == (2, 32, 4, 5)


def test_conv_stem_needs_a_power_of_two():
    assert ViT(patch=8, stem="conv").describe() == "ViT-small/8 (conv stem)"
    with pytest.raises(UserError, match=r"patch size of 2, 4, 8, .* got 5 and 32; stem patch takes any"):
        ViT(patch=5, stem="conv", **TINY)
    with pytest.raises(UserError, match="up to the width"):
        ViT(patch=64, stem="conv", width=32, heads=2, image_size=64)
    with pytest.raises(UserError, match="got 1 and 32"):
        ViT(patch=1, stem="conv", **TINY)
