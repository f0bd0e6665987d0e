"""`backbone.transform`: the preprocessing that a file of weights contains, and what follows from it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import dino_ssl
from dino_ssl.config import to_dict
from dino_ssl.data.sources import open_dataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.loading import open_checkpoint
from dino_ssl.models import Backbone, Features, ViT
from dino_ssl.models import timm as timm_networks
from dino_ssl.models.pretrained import load
from dino_ssl.models.weights import save_backbone
from dino_ssl.preprocessing import MEAN, STD, Preprocessing

VIT = ViT(width=48, depth=1, heads=2, patch=8, image_size=32, drop_path=0.0)
OTHER = Preprocessing(size=24, crop=0.9, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1), interpolation="bilinear")
IMAGES = [Scenes(size=48).read(index)[: 30 + 5 * index] for index in range(3)]


class Recorder(Backbone):
    """Network that keeps its inputs."""

    embed_dim = patch = 1

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inputs = nn.Parameter(torch.ones(1)), []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images)
        return self.scale * images.mean((1, 2, 3))[:, None]

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError


@pytest.mark.parametrize("transform", [Preprocessing(size=32), OTHER])
def test_transform_returns_what_embed_feeds_to_the_network(transform: Preprocessing):
    network = Recorder()
    network.transform = transform
    dino_ssl.embed(network, IMAGES)
    (inputs,) = network.inputs
    for image, expected in zip(IMAGES, inputs, strict=True):
        for form in (image, Image.fromarray(image), torch.from_numpy(image).movedim(-1, 0)):
            assert torch.equal(transform(form), expected)
    assert inputs.shape == (3, 3, transform.size, transform.size)


def test_transform_of_one_channel_and_of_other_types():
    gray = IMAGES[0][..., 0]
    expected = Preprocessing(size=32)(np.stack([gray] * 3, -1))
    for form in (gray, gray[..., None], torch.from_numpy(gray)[None], Image.fromarray(gray)):
        assert torch.equal(Preprocessing(size=32)(form), expected)
    message = r"expected a PIL image, a uint8 array \[H, W, 3\] .* got Tensor of torch.float32 \(3, 8, 8\)"
    with pytest.raises(UserError, match=message):
        Preprocessing()(torch.zeros(3, 8, 8))


def test_weights_are_saved_with_their_preprocessing(tmp_path: Path):
    weights = VIT.build().state_dict()
    assert load(save_backbone(VIT, weights, tmp_path / "a.safetensors", OTHER)).transform == OTHER
    assert load(save_backbone(VIT, weights, tmp_path / "b.safetensors")).transform == Preprocessing(size=32)
    description = {"format": 1, **to_dict(VIT)}
    save_file(weights, tmp_path / "c.safetensors", {"backbone": json.dumps(description)})  # without preprocessing
    torch.save(weights, tmp_path / "d.pth")
    assert load(tmp_path / "c.safetensors").transform == Preprocessing(size=32)
    assert load(tmp_path / "d.pth", backbone=VIT).transform == Preprocessing(size=32)
    description["preprocessing"] = {**to_dict(OTHER), "channels": "BGR"}
    save_file(weights, tmp_path / "e.safetensors", {"backbone": json.dumps(description)})
    with pytest.raises(UserError, match=r"channels: expected one of 'RGB', got 'BGR'"):
        load(tmp_path / "e.safetensors")


def test_released_weights_have_the_papers_preprocessing(tmp_path: Path):
    assert Preprocessing() == Preprocessing(size=224, crop=224 / 256, mean=MEAN, std=STD)
    assert ViT().build().transform == Preprocessing()  # the networks of the releases


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k", "resnet18.tv_in1k", "vit_tiny_patch16_384"])
def test_pretrained_timm_networks_have_timms_preprocessing(name: str, monkeypatch: pytest.MonkeyPatch):
    create = timm_networks.create
    monkeypatch.setattr(
        timm_networks, "create", lambda *args, **options: create(*args, **options | {"pretrained": False})
    )
    transform = load(f"timm:{name}").transform
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    image = Image.fromarray(Scenes(size=500).read(0)[:430])
    expected = timm.data.create_transform(**config)(image)
    gray_levels = 255 * torch.tensor(transform.std)[:, None, None] * (transform(image) - expected).abs()
    assert gray_levels.max() < 2.5
    assert gray_levels.gt(1.5).double().mean() < 1e-4


def test_reference_network_has_the_same_preprocessing(tmp_path: Path):
    save_backbone(VIT, VIT.build().state_dict(), tmp_path / "a.safetensors", OTHER)
    build = open_checkpoint(tmp_path / "a.safetensors").fresh
    assert build is not None
    assert build().transform == OTHER


def test_attention_of_a_dataset_is_none_for_an_unreadable_image(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for index in range(3):
        Image.fromarray(IMAGES[index]).save(tmp_path / f"{index}.png")
    network, dataset = VIT.build(), open_dataset(tmp_path)
    (tmp_path / "1.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "dino_ssl"):
        first, second, third = dino_ssl.attention(network, dataset)  # pyright: ignore[reportGeneralTypeIssues]
    assert second is None
    assert "1.png" in caplog.text
    for maps, image in ((first, IMAGES[0]), (third, IMAGES[2])):
        for form in (image, torch.from_numpy(image).movedim(-1, 0)):
            np.testing.assert_array_equal(maps.heads, dino_ssl.attention(network, form).heads)


def test_a_changed_weight_of_an_exported_backbone_is_refused(tmp_path: Path):
    path = save_backbone(VIT, VIT.build().state_dict(), tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # the lowest bit of a weight or its exponent
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors is damaged: the weights differ"):
        load(path)
