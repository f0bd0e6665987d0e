"""Weighted k-NN, compared with a loop, and edge cases: few images, few classes, missing labels, chunks."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, evaluating, reference_scores
from dino_ssl.evals.features import extract, pixel_feature, raw_pixels
from dino_ssl.evals.knn import KNN, knn_accuracy
from dino_ssl.evals.nearest import top_k
from dino_ssl.evals.online import OnlineEval
from dino_ssl.models.backbone import Backbone, Features


def loop(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, t: float) -> tuple:
    """Appendix F.1, one image and one vote at a time."""
    top1 = top5 = 0
    for feature, label in zip(test, test_labels.tolist(), strict=True):
        near = [
            (float(feature @ other / (feature.norm() * other.norm())), int(other_label))
            for other, other_label in zip(train, train_labels, strict=True)
        ]
        near.sort(reverse=True)
        votes = dict.fromkeys(sorted({*train_labels.tolist(), *test_labels.tolist()}), 0.0)
        for similarity, other_label in near[:k]:
            votes[other_label] += math.exp(similarity / t)
        ranked = sorted(votes, key=lambda name: -votes[name])
        top1 += ranked[0] == label
        top5 += label in ranked[: min(5, k)]
    return 100 * top1 / len(test), 100 * top5 / len(test)


def clusters(count: int, classes: int, seed: int, spread: float = 1.4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=rng)
    return centers[labels] + spread * torch.randn(count, 8, generator=rng), labels


@pytest.mark.parametrize("k", [1, 3, 7, 20, 60])
def test_knn_equals_a_loop(k: int) -> None:
    train, test = clusters(60, 9, 0), clusters(41, 9, 1)
    top1, top5 = loop(*train, *test, k, 0.07)
    assert knn_accuracy(*train, *test, k=(k,)) == pytest.approx({f"{k}-NN": top1, f"{k}-NN top-5": top5})
    assert 0 < top1 < 100


def test_closer_neighbors_have_larger_votes() -> None:
    """One close neighbor outvotes two distant ones, which have the majority."""
    angles = torch.tensor([0.05, 1.2, 1.3])
    train = torch.stack([angles.cos(), angles.sin()], 1)
    test = torch.tensor([[1.0, 0.0]])
    labels, truth = torch.tensor([4, 7, 7]), torch.tensor([4])
    assert knn_accuracy(train, labels, test, truth, k=(3,))["3-NN"] == 100
    assert knn_accuracy(train, labels, test, truth, k=(3,), temperature=1e6)["3-NN"] == 0


def test_label_values_and_feature_scales_do_not_matter() -> None:
    (train, labels), (test, truth) = clusters(80, 6, 0), clusters(50, 6, 1)
    before = knn_accuracy(train, labels, test, truth, k=(5, 20))
    names = torch.tensor([3, 1000, 17, 2**40, 5, 6]).sort().values
    scaled = train * torch.rand(80, 1).add(0.1)
    assert knn_accuracy(scaled, names[labels], 9 * test, names[truth], k=(5, 20)) == before


def test_chunk_sizes_do_not_matter() -> None:
    (train, labels), (test, truth) = clusters(70, 5, 0), clusters(33, 5, 1)
    whole = knn_accuracy(train, labels, test, truth)
    assert knn_accuracy(train, labels, test, truth, chunk=4) == whole
    one, many = top_k(test, train, 9), top_k(test, train, 9, block_rows=7)
    torch.testing.assert_close(one[0], many[0])
    assert torch.equal(one[1], many[1])


def test_k_above_the_number_of_images_uses_all() -> None:
    (train, labels), (test, truth) = clusters(12, 3, 0), clusters(9, 3, 1)
    result, exact = (knn_accuracy(train, labels, test, truth, k=(k,)) for k in (200, 12))
    assert result["200-NN"] == exact["12-NN"]
    assert list(knn_accuracy(train, labels, test, truth, k=(5, 200))) == ["5-NN", "5-NN top-5"]
    assert result["200-NN top-5"] == 100  # three classes: any of five guesses


def test_unknown_classes_are_errors_and_unlabeled_images_are_ignored() -> None:
    train, labels = torch.eye(4), torch.tensor([0, 1, -1, 1])
    test, truth = torch.eye(4)[[0, 1, 2, 0]], torch.tensor([0, 1, -1, 8])
    assert knn_accuracy(train, labels, test, truth, k=(1,))["1-NN"] == pytest.approx(100 * 2 / 3)
    assert knn_accuracy(train, labels.clone().fill_(1), test, truth, k=(1,))["1-NN"] == pytest.approx(100 / 3)


def test_equal_votes_are_ranked_by_label() -> None:
    train, labels = torch.eye(2).repeat(2, 1), torch.tensor([5, 2, 2, 5])
    test = torch.tensor([[1.0, 1.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([2]), k=(4,))["4-NN"] == 100


def test_zero_and_bfloat16_features_are_accepted() -> None:
    (train, labels), (test, truth) = clusters(30, 3, 0), clusters(20, 3, 1)
    assert knn_accuracy(torch.zeros_like(train), labels, test, truth, k=(5,))["5-NN"] >= 0
    exact = knn_accuracy(train.bfloat16().float(), labels, test.bfloat16().float(), truth, k=(5,))
    assert knn_accuracy(train.bfloat16(), labels, test.bfloat16(), truth, k=(5,)) == exact


def test_votes_are_float32_under_autocast() -> None:
    (train, _), (test, _) = clusters(60, 5, 0), clusters(40, 5, 1)
    exact = top_k(test, train, 9)
    before = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(top_k(test, train, 9)[0], exact[0], rtol=0, atol=0)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=(0,)), "`k` must be at least 1"),
        (dict(k=()), "`k` needs at least one"),
        (dict(temperature=0.0), "`temperature` must be above 0"),
        (dict(val_fraction=1.0), "`val_fraction` must be above 0 and below 1"),
    ],
)
def test_invalid_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KNN(**change)


def test_images_without_labels_are_refused() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UserError, match=r"photos/cat/1\.jpg"):
        knn_accuracy(torch.rand(4, 2), labels - 1, torch.rand(4, 2), labels)


class Squares(ImageDataset):
    """Images whose brightness rises with their index; the images `bad` cannot be read."""

    def __init__(self, count: int = 11, bad: tuple[int, ...] = (3, 10)) -> None:
        self.bad = bad
        labels = [i % 2 for i in range(count)]
        super().__init__(names=[f"{i}.png" for i in range(count)], sizes=[(40, 40)] * count, labels=labels)

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise BadImage(self.names[index], "cut short")
        image = np.full((40, 40, 3), 10 * index, np.uint8)
        image[:20] += 100
        return image


class MeanColor(Backbone):
    """The mean of every channel, and a batch norm whose statistics must not change."""

    embed_dim, patch = 3, 8

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(images.mean((2, 3)))

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_extract_keeps_the_order_and_skips_unreadable_images(batch_size: int) -> None:
    backbone = MeanColor().train()
    backbone.frozen.eval()
    calls: list[tuple[int, int]] = []
    progress = nullcontext(lambda done, total: calls.append((done, total)))
    context = EvalContext(size=16, batch_size=batch_size, progress=lambda label: progress)
    out = extract(backbone, Squares(), context)
    assert out.indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [(skipped.name, skipped.reason) for skipped in out.skipped] == [
        ("3.png", "cut short"),
        ("10.png", "cut short"),
    ]
    assert out.labels.tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 1]
    assert (out.features[1:, 0] > out.features[:-1, 0]).all()  # rows belong to their image
    assert calls[-1] == (9, 11)
    assert backbone.training
    assert backbone.norm.training
    assert not backbone.frozen.training
    assert backbone.norm.num_batches_tracked == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_is_an_error(value: float) -> None:
    backbone = MeanColor()
    backbone.norm.bias.data[1] = value
    with pytest.raises(UserError, match="Features contain NaN or infinity"):
        extract(backbone, Squares(), EvalContext(size=16))


def test_modes_are_restored_after_an_error() -> None:
    backbone = MeanColor().train()
    with pytest.raises(RuntimeError), evaluating(backbone):
        raise RuntimeError
    assert backbone.norm.training


def test_raw_pixels_ignore_brightness_and_skip_unreadable_images() -> None:
    out = raw_pixels(Squares(), EvalContext())
    assert out.features.shape == (9, 768)
    assert len(out.skipped) == 2
    torch.testing.assert_close(out.features[0], out.features[-1], atol=1e-5, rtol=0)  # same image, other brightness
    flat = pixel_feature(np.full((5, 9, 3), 7, np.uint8))
    assert np.isfinite(flat).all()  # nothing to normalise


def test_raw_pixels_reach_their_published_accuracy(shared) -> None:
    """The description of imagenette128 states 35.6 %."""
    from PIL import Image

    features, labels = {}, {}
    for part in ("train", "val"):
        files = sorted((shared / f"data/imagenette128/{part}").glob("*/*.JPEG"))
        classes = sorted({file.parent.name for file in files})
        pixels = [pixel_feature(np.asarray(Image.open(file).convert("RGB"))) for file in files]
        features[part] = torch.from_numpy(np.stack(pixels))
        labels[part] = torch.tensor([classes.index(file.parent.name) for file in files])
    result = knn_accuracy(features["train"], labels["train"], features["val"], labels["val"], k=(20,))
    assert result["20-NN"] == pytest.approx(35.6, abs=0.05)


def test_reference_scores_do_not_change_the_random_state() -> None:
    dataset = Squares(bad=())
    prepared = KNN(k=(1,)).prepare((dataset, dataset), EvalContext(size=16, batch_size=4))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    references = reference_scores(prepared, MeanColor)
    assert torch.equal(torch.rand(3), expected)
    assert set(references) == {"raw_pixels", "random_weights"}
    assert reference_scores(prepared, MeanColor) == references
    assert prepared.name == "knn"
    assert set(prepared(MeanColor())) == set(references["random_weights"]) == {"1-NN", "1-NN top-5"}


def test_online_eval_limits_the_memory_evenly() -> None:
    dataset = Squares()
    prepared = OnlineEval(max_train_images=4).prepare_knn(dataset, dataset, EvalContext(size=16))
    assert prepared.data["train"]["fingerprint"] == dataset.subset([0, 3, 7, 10]).fingerprint
    assert prepared.data["val"]["images"] == 11
