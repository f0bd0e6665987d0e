"""The supervised loss equals loops over single images; mixup and CutMix follow their definitions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import mix_rng
from dino_ssl.errors import UserError
from dino_ssl.methods.method import BuildContext
from dino_ssl.methods.supervised import (
    Mix,
    Supervised,
    SupervisedConfig,
    draw_mix,
    mix_images,
    mix_targets,
    smooth_labels,
)
from dino_ssl.models.vit import ViT
from dino_ssl.schedules import Clock

VIT = ViT(width=8, depth=1, heads=1, patch=4, image_size=8, drop_path=0.0)


def method(seed: int = 0, **settings: float) -> Supervised:
    torch.manual_seed(0)
    return SupervisedConfig(head_scale=50.0, **settings).build(BuildContext(VIT, seed, classes=3))


def batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2, 1, 0, 0])  # most partners, half a batch apart, differ
    return Batch((torch.randn(1, count, 3, 8, 8, generator=generator),), labels[:count])


def slow_loss(model: Supervised, images: Tensor, labels: list[int], mix: Mix) -> float:
    """Return the mean cross-entropy of the mixed images and targets, image by image and class by class."""
    count, smoothing, losses = len(images), model.config.smoothing, []
    for i in range(count):
        other = (i - count // 2) % count
        image = images[i].clone()
        for y in range(8):
            for x in range(8):
                if mix.box is None:
                    image[:, y, x] = mix.weight * images[i, :, y, x] + (1 - mix.weight) * images[other, :, y, x]
                elif mix.box[0] <= y < mix.box[1] and mix.box[2] <= x < mix.box[3]:
                    image[:, y, x] = images[other, :, y, x]
        logits = model.network.head(model.network.backbone(image[None]))[0].tolist()
        total = sum(math.exp(value) for value in logits)
        loss = 0.0
        for k in range(3):
            own, reference = ((1 - smoothing) * (labels[j] == k) + smoothing / 3 for j in (i, other))
            loss -= (mix.weight * own + (1 - mix.weight) * reference) * math.log(math.exp(logits[k]) / total)
        losses.append(loss)
    return sum(losses) / count


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (dict(mixup=0.0, cutmix=0.0, smoothing=0.0), "none"),
        (dict(mixup=0.0, cutmix=0.0), "none"),
        (dict(cutmix=0.0), "mixup"),
        (dict(mixup=0.0, smoothing=0.2), "cutmix"),
    ],
)
def test_loss_equals_a_loop(settings, kind) -> None:
    model, inputs = method(**settings), batch(6)
    for step in range(4):
        mix = draw_mix(model.config, 8, 8, mix_rng(0, step))
        assert {"none": mix == Mix(), "mixup": mix.weight < 1 and mix.box is None, "cutmix": mix.box is not None}[kind]
        out = model(inputs, Clock(step, 10, 1))
        expected = slow_loss(model, inputs.views[0][0], [0, 1, 2, 1, 0, 0], mix)
        assert out.loss.item() == pytest.approx(expected, abs=1e-5)
        assert out.metrics["loss"] == out.loss.detach()


def test_loss_without_mixing_is_cross_entropy() -> None:
    model, inputs = method(mixup=0.0, cutmix=0.0), batch(5)
    logits = model.network([inputs.views[0]])[0]
    expected = torch.nn.functional.cross_entropy(logits, inputs.labels, label_smoothing=0.1)
    torch.testing.assert_close(model(inputs, Clock(0, 10, 1)).loss, expected)


def test_all_views_of_an_image_have_its_label() -> None:
    model, one = method(mixup=0.0, cutmix=0.0), batch(4)
    two = Batch((torch.cat([one.views[0], one.views[0].flip(-1)]),), one.labels)
    apart = [model(Batch((two.views[0][i : i + 1],), one.labels), Clock(0, 10, 1)).loss for i in (0, 1)]
    torch.testing.assert_close(model(two, Clock(0, 10, 1)).loss, sum(apart) / 2)


def test_batch_is_not_modified() -> None:
    inputs = batch(4)
    before = inputs.views[0].clone()
    for step in range(4):
        method()(inputs, Clock(step, 10, 1))
    assert torch.equal(inputs.views[0], before)


def test_mix_depends_on_seed_and_step_only() -> None:
    config = SupervisedConfig()
    assert draw_mix(config, 32, 32, mix_rng(1, 5)) == draw_mix(config, 32, 32, mix_rng(1, 5))
    draws = [draw_mix(config, 32, 32, mix_rng(seed, step)) for seed in (0, 1) for step in range(5)]
    assert len(set(draws)) == 10
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    method(seed=3, mixup=0.8)
    torch.manual_seed(0)
    draw_mix(config, 32, 32, mix_rng(0, 0))
    assert torch.equal(torch.rand(1), expected)


def test_lambda_has_a_beta_distribution() -> None:
    """Mixup: Beta(0.8, 0.8) has mean 1/2 and variance 1 / (4 (2 * 0.8 + 1)). Half of the steps use CutMix."""
    config, rng = SupervisedConfig(), np.random.default_rng(0)
    draws = [draw_mix(config, 64, 64, rng) for _ in range(2000)]
    mixup = np.array([mix.weight for mix in draws if mix.box is None])
    assert len(mixup) == pytest.approx(1000, abs=5 * math.sqrt(500))
    assert mixup.mean() == pytest.approx(0.5, abs=0.05)
    assert mixup.var() == pytest.approx(1 / (4 * 2.6), abs=0.01)
    only = [draw_mix(SupervisedConfig(mixup=0), 64, 64, rng) for _ in range(5)]
    assert all(mix.box is not None for mix in only)


def test_cutmix_box_has_the_area_of_lambda() -> None:
    """1 - lambda of the image, less at the border; its center is uniform; lambda is adjusted."""
    config, rng, middles = SupervisedConfig(mixup=0.0), np.random.default_rng(0), []
    for _ in range(500):
        mix = draw_mix(config, 40, 60, rng)
        assert mix.box is not None
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 40
        assert 0 <= left <= right <= 60
        assert mix.weight == pytest.approx(1 - (bottom - top) * (right - left) / 2400)
        middles.append(((top + bottom) / 80, (left + right) / 120))
    assert np.mean(middles, axis=0) == pytest.approx([0.5, 0.5], abs=0.05)
    # lambda is uniform before the cut at the border, which only gives back: its mean is above 1/2
    weights = [draw_mix(config, 40, 60, rng).weight for _ in range(2000)]
    assert 0.6 < np.mean(weights) < 0.8


def test_targets_are_distributions() -> None:
    labels = torch.tensor([0, 2, 1, 1])
    targets = smooth_labels(labels, 3, 0.1)
    assert targets[0].tolist() == pytest.approx([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    torch.testing.assert_close(mix_targets(targets, Mix(0.3)).sum(1), torch.ones(4))
    torch.testing.assert_close(mix_targets(targets, Mix(1.0)), targets)


def test_mixing_does_not_depend_on_the_number_of_ranks() -> None:
    """Rank r has positions r, r + 2, ...: partners must be on the same rank."""
    views, mix = torch.randn(1, 8, 3, 4, 4), Mix(0.25, (0, 2, 1, 4))
    whole = mix_images(views, mix)
    for rank in (0, 1):
        assert torch.equal(mix_images(views[:, rank::2], mix), whole[:, rank::2])


def test_initial_classifier_is_small_and_backbone_is_pretrained() -> None:
    torch.manual_seed(3)
    trained = VIT.build()
    start = BuildContext(VIT, 0, classes=4, weights=trained.state_dict(), source="somewhere")
    built = SupervisedConfig().build(start)
    assert all(torch.equal(a, b) for a, b in zip(built.backbone.parameters(), trained.parameters(), strict=True))
    head = built.network.head
    assert 0 < head.weight.abs().max() < 1e-3
    assert not head.bias.any()
    logits = built.classifier([torch.randn(1, 2, 3, 8, 8)])
    assert logits.shape == (1, 2, 4)
    with pytest.raises(UserError, match=r"somewhere.*do not fit"):
        SupervisedConfig().build(BuildContext(ViT(width=16, depth=1, heads=1, patch=4, image_size=8), 0, 4,
                                       start.weights, "somewhere"))  # fmt: skip


class Labelled(ImageDataset):
    def __init__(self, labels: list[int] | None) -> None:
        count = 5 if labels is None else len(labels)
        super().__init__(names=[str(i) for i in range(count)], sizes=[(4, 4)] * count, labels=labels, classes=["a"])

    def read(self, index: int) -> np.ndarray:
        return np.zeros((4, 4, 3), np.uint8)


def test_unlabelled_images_are_filtered() -> None:
    config = SupervisedConfig()
    assert config.filter_dataset(Labelled([0, -1, 2, -1])).names == ["0", "2"]
    whole = Labelled([0, 1])
    assert config.filter_dataset(whole) is whole
    for nothing in (Labelled(None), Labelled([-1, -1])):
        with pytest.raises(UserError, match="needs labels"):
            config.filter_dataset(nothing)
    with pytest.raises(UserError, match="2 classes"):
        config.build(BuildContext(VIT, 0, classes=1))


@pytest.mark.parametrize("wrong", [dict(smoothing=1.5), dict(mixup=-1.0), dict(cutmix_share=2.0), dict(head_scale=0.0)])
def test_error_names_a_setting_out_of_range(wrong) -> None:
    with pytest.raises(UserError, match=rf"method\.{next(iter(wrong))}"):
        SupervisedConfig(**wrong)
