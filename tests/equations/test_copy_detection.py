"""GeM, whitening and the copies' scores against their definitions, and whole evaluations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals import copy_detection
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.copy_detection import CopyDetection, copy_descriptor, copy_scores, fit_whitening, gem, whiten
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT


def test_gem_is_the_generalised_mean_of_each_channel() -> None:
    patches = torch.rand(2, 3, 4, 5)
    for p in (1.0, 4.0, 2.5):
        for b in range(2):
            for channel in range(5):
                values = patches[b, :, :, channel].flatten().tolist()
                expected = (sum(x**p for x in values) / 12) ** (1 / p)
                assert gem(patches, p)[b, channel].item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gem(patches, 50.0), patches.amax((1, 2)), atol=0.06)  # 12 ** (-1 / 50) is 0.95
    assert torch.allclose(gem(-patches), torch.tensor(1e-6))  # what is negative counts as the floor


def test_descriptor_is_cls_beside_gem() -> None:
    torch.manual_seed(0)
    vit = ViT(width=48, depth=2, heads=3, patch=8, image_size=32).build().eval()
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        out = copy_descriptor(vit, images)
        torch.testing.assert_close(out[:, :48], vit(images))  # which renews no patch in its last block
        assert torch.equal(out[:, 48:], gem(vit.features(images)[0].patches))


def correlated(count: int, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)) * torch.tensor([9.0, 4, 2, 1, 0.5, 0.1])
    return torch.randn(count, 6, generator=make) @ mix.T + 3


@pytest.mark.parametrize("center", [True, False])
def test_whitened_features_are_uncorrelated_and_of_unit_spread(center: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(300)
    y = whiten(x, fit_whitening(x, center=center)).double()
    y = y - y.mean(0) if center else y
    assert torch.allclose(y.T @ y / 300, torch.eye(6, dtype=torch.float64), atol=1e-4)
    monkeypatch.setattr(copy_detection, "FIT_ROWS", 7)  # parts change nothing
    parts = whiten(x, fit_whitening(x, center=center)).double()
    parts = parts - parts.mean(0) if center else parts
    assert torch.allclose(parts @ parts.T, y @ y.T, atol=1e-4)  # of which the signs of eigenvectors say nothing


def test_whitening_against_the_covariance() -> None:
    """Dot products of whitened features are Mahalanobis: (a - mean) C^-1 (b - mean)."""
    x, asked = correlated(300).double(), correlated(4, seed=9).double()
    away = asked - x.mean(0)
    expected = away @ torch.linalg.inv(torch.cov(x.T, correction=0)) @ away.T
    y = whiten(asked, fit_whitening(x))
    assert torch.allclose(y @ y.T, expected, atol=1e-6)


def test_whitening_keeps_the_strongest_directions() -> None:
    x = correlated(300).double()
    full, two = (whiten(x, fit_whitening(x, dimensions, power=0.0)) for dimensions in (None, 2))
    assert two.shape == (300, 2)
    assert torch.allclose(two, full[:, :2])
    spread = full.var(0)
    assert (spread[:-1] >= spread[1:]).all()


def test_few_pictures_tell_few_directions() -> None:
    """Directions that no picture of the whitening's shows would be blown up most of all."""
    x = correlated(4)
    assert whiten(x, fit_whitening(x)).shape == (4, 3)
    assert whiten(x, fit_whitening(x, center=False)).shape == (4, 4)
    assert whiten(torch.ones(5, 6), fit_whitening(torch.ones(5, 6))).isfinite().all()
    with pytest.raises(UserError, match="learnt on many pictures"):
        fit_whitening(x[:1])


def test_scores_of_blocks_and_strengths() -> None:
    kinds = [("crops", "10"), ("jpeg", "3"), ("strong", ""), ("crops", "80"), ("jpeg", "3"), ("other", "")]
    blocks, strengths = copy_scores([0, 1, 0, 4, 0, 9], kinds)
    assert list(blocks) == ["strong", "crops", "jpeg", "other"]
    assert blocks == pytest.approx({"strong": 1, "crops": 0.55, "jpeg": 0.625, "other": 0.05})
    assert strengths == pytest.approx({"crops/10": 1, "crops/80": 0.1, "jpeg/3": 0.625, "other": 0.05, "strong": 1})


SCENES = Scenes(count=6, size=32, part="test")
CONVNET = Timm(name="resnet18", args=(("channels", "(8,8,16,16)"), ("layers", "(1,1,1,1)")))


@pytest.mark.parametrize("network", [ViT(width=48, depth=1, heads=3, patch=8, image_size=32), CONVNET])
def test_a_whole_evaluation(network: ViT | Timm) -> None:
    torch.manual_seed(0)
    backbone = network.build().eval()
    evaluator = CopyDetection().bind([SCENES.open()], EvalContext(size=32))
    scores = evaluator(backbone)
    assert list(scores) == ["mAP strong", "mAP crops", "mAP jpeg"]
    assert all(0 <= value <= 100 for value in scores.values())
    assert scores.details["whitened to"] == 29  # one fewer than the 30 pictures that it is learnt on
    assert set(evaluator.data) == {"copies", "originals", "distractors", "whitening"}
    assert scores == evaluator(backbone)
    plain = CopyDetection(whiten=False).bind([SCENES.open()], EvalContext(size=32))(backbone)
    assert plain.details["whitened to"] is None
    assert plain.details["place of the original"] != scores.details["place of the original"]


def test_pixels_know_weak_copies_from_strong_ones() -> None:
    floor = CopyDetection().bind([SCENES.open()], EvalContext()).pixel_reference()
    assert floor["mAP jpeg"] > 90
    assert floor["mAP strong"] < 90
    strengths = floor.details["mAP by strength"]
    assert strengths["jpeg/75"] == strengths["strong/blur"] == 100
    assert strengths["strong/paste"] < 50


def test_distractors_can_only_hurt() -> None:
    more = Scenes(count=40, size=32, part="val", seed=7).open()
    alone = CopyDetection().bind([SCENES.open()], EvalContext()).pixel_reference()
    among = CopyDetection().bind([SCENES.open(), more], EvalContext()).pixel_reference()
    assert among.details["place of the original"].keys() == alone.details["place of the original"].keys()
    for name, place in alone.details["place of the original"].items():
        assert among.details["place of the original"][name] >= place
    assert among["mAP strong"] < alone["mAP strong"]


class Half(Backbone):
    """Its patches are wider than its vector, as in some ConvNets."""

    embed_dim, patch = 2, 8

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0].cls

    def features(self, images: Tensor, layers: int = 1) -> list:
        from dino_ssl.models.backbone import Features

        small = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)
        return [Features(images.mean((2, 3))[:, :2], torch.cat([small, -small], -1))]


def test_patches_of_another_width() -> None:
    scores = CopyDetection().bind([SCENES.open()], EvalContext(size=32))(Half())
    assert scores.details["whitened to"] == 8


def test_the_same_folder_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        CopyDetection().bind([tmp_path, "none", f"{tmp_path}/../{tmp_path.name}"], EvalContext())


def test_settings_out_of_range() -> None:
    for wrong in (dict(size=0), dict(gem=0.0), dict(dimensions=0), dict(originals=0), dict(seed=-1)):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))} must be"):
            CopyDetection(**wrong)  # pyright: ignore[reportArgumentType]


def test_what_is_read_is_in_the_order_of_the_copies() -> None:
    """Row q of the queries is copy q, whatever the batches."""
    evaluator = CopyDetection().bind([SCENES.open()], EvalContext(batch_size=7))
    names = list(evaluator.pixel_reference().details["place of the original"])
    assert names == evaluator.copies.copies.names
    assert np.array_equal(evaluator.copies.original_of, np.repeat(np.arange(6), 15))
