"""Copy detection: GeM, whitening and scores equal their definitions; complete evaluations."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import shaped_batches
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, Scores
from dino_ssl.evals.copy_detection import (
    CopyDetection,
    copy_descriptor,
    copy_scores,
    fit_whitening,
    gem,
    synthetic_copies,
    whiten,
)
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import ViT


def test_gem_is_the_generalized_mean_of_each_channel() -> None:
    patches = torch.rand(2, 3, 4, 5)
    for p in (1.0, 4.0, 2.5):
        for b in range(2):
            for channel in range(5):
                values = patches[b, :, :, channel].flatten().tolist()
                expected = (sum(x**p for x in values) / 12) ** (1 / p)
                assert gem(patches, p)[b, channel].item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gem(patches, 50.0), patches.amax((1, 2)), atol=0.06)  # 12 ** (-1 / 50) is 0.95
    assert torch.allclose(gem(-patches), torch.tensor(1e-6))  # negative values are clamped


def test_descriptor_concatenates_cls_and_gem() -> None:
    torch.manual_seed(0)
    vit = ViT(width=48, depth=2, heads=3, patch=8, image_size=32).build().eval()
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        out = copy_descriptor(vit, images)
        torch.testing.assert_close(out[:, :48], vit(images))  # skips the patches of the last block
        assert torch.equal(out[:, 48:], gem(vit.features(images)[0].patches))


def correlated(count: int, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)) * torch.tensor([9.0, 4, 2, 1, 0.5, 0.1])
    return torch.randn(count, 6, generator=make) @ mix.T + 3


@pytest.mark.parametrize("center", [True, False])
def test_whitened_features_are_uncorrelated_with_unit_variance(center: bool) -> None:
    x = correlated(300)
    y = whiten(x, fit_whitening(x, center=center)).double()
    y = y - y.mean(0) if center else y
    assert torch.allclose(y.T @ y / 300, torch.eye(6, dtype=torch.float64), atol=1e-4)


def test_whitened_dot_products_are_mahalanobis() -> None:
    """They equal (a - mean) C^-1 (b - mean)."""
    x, queries = correlated(300).double(), correlated(4, seed=9).double()
    centered = queries - x.mean(0)
    expected = centered @ torch.linalg.inv(torch.cov(x.T, correction=0)) @ centered.T
    y = whiten(queries, fit_whitening(x))
    assert torch.allclose(y @ y.T, expected, atol=1e-6)


def test_whitening_keeps_the_strongest_directions() -> None:
    x = correlated(300).double()
    full, two = (whiten(x, fit_whitening(x, dimensions)) for dimensions in (None, 2))
    assert two.shape == (300, 2)
    assert torch.allclose(two, full[:, :2])
    scale = fit_whitening(x).basis.norm(dim=0)  # eigenvalue ** -0.5, ascending
    assert (scale[:-1] <= scale[1:]).all()


def test_few_images_determine_few_components() -> None:
    """Components without variance would be amplified most."""
    x = correlated(4)
    assert whiten(x, fit_whitening(x)).shape == (4, 3)
    assert whiten(x, fit_whitening(x, center=False)).shape == (4, 4)
    assert whiten(torch.ones(5, 6), fit_whitening(torch.ones(5, 6))).isfinite().all()
    with pytest.raises(UserError, match="at least 2 images"):
        fit_whitening(x[:1])


def test_scores_are_averaged_by_block_and_strength() -> None:
    kinds = [("crops", "10"), ("jpeg", "3"), ("strong", ""), ("crops", "80"), ("jpeg", "3")]
    blocks, strengths = copy_scores([0, 1, 0, 4, 0], kinds)
    assert list(blocks) == ["strong", "crops", "jpeg"]
    assert blocks == pytest.approx({"strong": 100, "crops": 55, "jpeg": 62.5})
    assert strengths == pytest.approx({"crops/10": 100, "crops/80": 10, "jpeg/3": 62.5, "strong": 100})


SCENES = Scenes(count=4, size=32, part="test")
CONVNET = Timm(name="resnet18", args=(("channels", "(8,8,16,16)"), ("layers", "(1,1,1,1)")))


@pytest.mark.parametrize("network", [ViT(width=48, depth=1, heads=3, patch=8, image_size=32), CONVNET])
def test_a_complete_evaluation(network: ViT | Timm) -> None:
    torch.manual_seed(0)
    backbone = network.build().eval()
    prepared = CopyDetection().prepare([SCENES.open()], EvalContext(size=32))
    scores = prepared(backbone)
    assert list(scores) == ["mAP strong", "mAP crops", "mAP jpeg"]
    assert all(0 <= value <= 100 for value in scores.values())
    assert scores.details["whitened dimensions"] == 19  # one fewer than the 20 whitening images
    assert set(prepared.data) == {"copies", "originals", "distractors", "whitening"}
    fewer = CopyDetection(dimensions=8).prepare([SCENES.open()], EvalContext(size=32))(backbone)
    assert fewer.details["whitened dimensions"] == 8
    assert fewer.details["rank of the original"] != scores.details["rank of the original"]


def test_multiscale_descriptors_are_the_whitened_ones_of_each_size_side_by_side() -> None:
    torch.manual_seed(0)
    backbone = CONVNET.build().eval()
    copies, whitening = synthetic_copies(SCENES)
    searched = [copies.copies, copies.originals, copies.others]
    features = []
    for side in (32, 32, 64, 96):  # 0.5, 0.7, 1.0 and 1.4 times 64, in multiples of a patch of 32
        rows = [descriptors(backbone, dataset, side) for dataset in (*searched, whitening)]
        fit = fit_whitening(rows[-1])
        features.append([F.normalize(whiten(part, fit), dim=1) for part in rows[:-1]])
    queries, *database = (torch.cat(parts, dim=1) for parts in zip(*features, strict=True))
    ranks = (queries @ torch.cat(database).T).argsort(dim=1, descending=True)
    expected = [(ranks[q] == copies.original_of[q]).nonzero().item() for q in range(len(queries))]
    scores = CopyDetection(multiscale=True).prepare([SCENES.open()], EvalContext(size=64))(backbone)
    assert list(scores.details["rank of the original"].values()) == expected


@torch.no_grad()
def descriptors(backbone: Backbone, dataset: ImageDataset, side: int) -> Tensor:
    ((_, images),) = shaped_batches(
        dataset, np.full((len(dataset), 2), side), pixels=10**9, indices=np.arange(len(dataset))
    )
    return copy_descriptor(backbone, backbone.transform.normalize(images))


def pixel_scores(sources: list, context: EvalContext = EvalContext()) -> Scores:  # noqa: B008
    return CopyDetection().prepare(sources, context).references["raw_pixels"]()


def test_raw_pixels_find_weak_copies_but_not_strong_ones() -> None:
    scores = pixel_scores([SCENES.open()])
    assert scores["mAP jpeg"] > 90
    assert scores["mAP strong"] < 90
    strengths = scores.details["mAP by strength"]
    assert strengths["jpeg/75"] == strengths["strong/blur"] == 100
    assert strengths["strong/paste"] < 50


def test_distractors_never_improve_a_rank() -> None:
    more = Scenes(count=40, size=32, part="val", seed=7).open()
    few, many = pixel_scores([SCENES.open()]), pixel_scores([SCENES.open(), more])
    assert many.details["rank of the original"].keys() == few.details["rank of the original"].keys()
    for name, rank in few.details["rank of the original"].items():
        assert many.details["rank of the original"][name] >= rank
    assert many["mAP strong"] < few["mAP strong"]


class WidePatches(Backbone):
    """A backbone whose patches have more dimensions than its output, like some ConvNets."""

    embed_dim, patch = 2, 8

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0].cls

    def features(self, images: Tensor, layers: int = 1) -> list:
        from dino_ssl.models.backbone import Features

        small = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)
        return [Features(images.mean((2, 3))[:, :2], torch.cat([small, -small], -1))]


def test_patches_may_have_another_width() -> None:
    scores = CopyDetection().prepare([SCENES.open()], EvalContext(size=32))(WidePatches())
    assert scores.details["whitened dimensions"] == 8


def test_a_duplicate_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given twice"):
        CopyDetection().prepare([tmp_path, "none", f"{tmp_path}/../{tmp_path.name}"], EvalContext())


def test_invalid_settings_are_refused() -> None:
    for change in (dict(size=0), dict(gem=0.0), dict(dimensions=0), dict(originals=0), dict(seed=-1)):
        with pytest.raises(UserError, match=f"`{next(iter(change))}` must be"):
            CopyDetection(**change)  # pyright: ignore[reportArgumentType]


def test_queries_are_in_the_order_of_the_copies() -> None:
    copies, _ = synthetic_copies(SCENES)
    names = list(pixel_scores([SCENES.open()], EvalContext(batch_size=7)).details["rank of the original"])
    assert names == copies.copies.names
    assert np.array_equal(copies.original_of, np.repeat(np.arange(4), 15))
