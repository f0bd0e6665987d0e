"""Two-crop retrieval: a score without labels, of crops that are a function of (seed, image)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.loader import sample_rng, shaped_batches
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.features import ImageFeatures
from dino_ssl.evals.two_crop_retrieval import VIEWS, CropPairs, TwoCropRetrieval, two_crop_scores
from dino_ssl.feature_stats import effective_rank
from dino_ssl.models.backbone import Backbone, Features


class Noise(ImageDataset):
    """Images of one random color each, with noise; those in `bad` cannot be read."""

    def __init__(self, count: int = 11, *, labels: list[int] | None = None, bad: tuple[int, ...] = ()) -> None:
        names = [f"{i}.png" for i in range(count)]
        super().__init__(names=names, sizes=[(40, 30)] * count, labels=labels, classes=["a"] if labels else [])
        self.bad, self.reads = bad, []

    @property
    def content_key(self) -> str:
        return f"{len(self)} {self.bad}"

    def read(self, index: int) -> np.ndarray:
        self.reads.append(index)
        if index in self.bad:
            raise BadImage(self.names[index], "cut short")
        rng = np.random.default_rng(index)
        return (rng.integers(0, 200, 3) + rng.integers(0, 55, (30, 40, 3))).astype(np.uint8)


class MeanColor(Backbone):
    """The mean color and the mean difference of neighbors: equal for similar crops."""

    embed_dim, patch = 6, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * torch.cat([images.mean((2, 3)), images.diff(dim=3).abs().mean((2, 3))], 1)


def table(features: Tensor, indices: list[int] | None = None) -> ImageFeatures:
    rows = torch.arange(len(features)) if indices is None else torch.tensor(indices)
    return ImageFeatures(features, torch.full((len(features),), -1), rows, [])


def crops_of(dataset: ImageDataset, seed: int = 0) -> CropPairs:
    return CropPairs(dataset, replace(VIEWS, global_size=16), seed)


def test_scores_equal_a_loop_over_all_crops() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 1, 3, generator=generator) + 0.9 * torch.randn(7, 2, 3, generator=generator)
    ranks = []
    for image in range(7):
        for query in (0, 1):
            cosines = torch.cosine_similarity(features[image, query], features[:, 1 - query], dim=1)
            ranks.append(sum(float(other) > float(cosines[image]) for other in cosines))
    assert 0 < sum(rank == 0 for rank in ranks) < 14
    scores = two_crop_scores(table(features.flatten(0, 1)))
    assert scores["two-crop retrieval"] == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 14)
    assert scores["two-crop retrieval top-5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 14)
    directions = features.flatten(0, 1) / features.flatten(0, 1).norm(dim=1, keepdim=True)
    assert scores["effective rank"] == pytest.approx(float(effective_rank(directions)))


def test_equal_features_score_zero() -> None:
    assert two_crop_scores(table(torch.ones(20, 4)))["two-crop retrieval top-5"] == 0


def test_images_with_one_unreadable_crop_are_ignored() -> None:
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    fewer = two_crop_scores(table(features[[0, 1, 2, 5, 6, 7, 8, 9]], [0, 1, 2, 5, 6, 7, 8, 9]))
    assert dict(fewer) == dict(two_crop_scores(table(features[[0, 1, 6, 7, 8, 9]])))


def test_crops_are_a_function_of_seed_and_image() -> None:
    """For any order, number of workers and batch size."""
    dataset = Noise()
    crops, expected = crops_of(dataset), []
    for i in range(len(dataset)):
        expected += crops.views(dataset.read(i), sample_rng(0, 0, i))
    assert crops.names[:3] == ["0.png#1", "0.png#2", "1.png#1"]
    for index in np.random.default_rng(0).permutation(22).tolist():
        np.testing.assert_array_equal(crops.read(index), expected[index])
    shapes = np.full((22, 2), 16)
    batches = shaped_batches(crops, shapes, pixels=3 * 16 * 16, indices=np.arange(1, 22, 2), workers=1)
    images = torch.cat([images for _, images in batches])
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(expected[1::2]))
    assert (crops_of(dataset, seed=1).read(0) != expected[0]).any()
    assert len({crops.content_key, crops_of(dataset, seed=1).content_key, crops_of(Noise(9)).content_key}) == 3


def test_an_image_is_decoded_once() -> None:
    dataset = Noise()
    TwoCropRetrieval().prepare_dataset(dataset, EvalContext(size=16))(MeanColor())
    assert dataset.reads == list(range(11))


def test_evaluation_of_a_backbone_ignores_labels_and_unreadable_images() -> None:
    context = EvalContext(size=16, batch_size=4)
    prepared = TwoCropRetrieval().prepare([Noise(bad=(3,))], context)
    scores = prepared(MeanColor())
    assert scores["two-crop retrieval"] > 100 / 10
    assert [skip["name"] for skip in scores.details["skipped"]] == ["3.png#1", "3.png#2"]
    assert prepared.references.keys() == {"raw_pixels"}
    assert prepared.references["raw_pixels"]().keys() == scores.keys()
    labeled = TwoCropRetrieval().prepare([Noise(labels=[0] * 11, bad=(3,))], context)
    assert dict(labeled(MeanColor())) == dict(scores)
    images = [dataset.read(i) for dataset in [Noise()] for i in range(11)]
    assert TwoCropRetrieval().prepare([images], context)(MeanColor()).keys() == scores.keys()


def test_images_are_limited_evenly() -> None:
    dataset = Noise()
    prepared = TwoCropRetrieval(max_images=4).prepare([dataset], EvalContext(size=16))
    assert prepared.data["images"]["fingerprint"] == dataset.subset([0, 3, 7, 10]).fingerprint


def test_a_single_image_is_refused() -> None:
    with pytest.raises(UserError, match="expected at least 2 images, got 1"):
        TwoCropRetrieval().prepare([Noise(1)], EvalContext())
    with pytest.raises(UserError, match="`max_images` must be at least 2; got 1"):
        TwoCropRetrieval(max_images=1)
