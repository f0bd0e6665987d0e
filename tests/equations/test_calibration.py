"""The threshold of duplicates: the definition of precision and recall, and what counts as another image."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_ssl.data.dataset import BadImage
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.search import calibration
from dino_ssl.search.calibration import (
    EDITS,
    NUM_COPIES,
    SAME_CORRELATION,
    best_threshold,
    calibrate,
    correlation,
    edits_of,
    gray_thumbnail,
)

COSINES = st.lists(st.integers(-20, 20).map(lambda value: value / 20), min_size=1, max_size=30)


@settings(max_examples=100)
@given(COSINES, COSINES, st.sampled_from([0.5, 0.9, 0.99]))
def test_the_threshold_has_the_best_recall_at_the_precision(
    positives: list[float], negatives: list[float], least: float
) -> None:
    """Against every possible threshold."""
    threshold, precision, recall = best_threshold(np.array(positives), np.array(negatives), least)

    def measured(at: float) -> tuple[float, float]:
        matches, false = (sum(value >= at for value in values) for values in (positives, negatives))
        return matches / (matches + false) if matches + false else 1.0, matches / len(positives)

    assert measured(threshold) == pytest.approx((precision, recall))
    assert precision >= least
    assert recall == max((r for p, r in map(measured, positives) if p >= least), default=0.0)


def test_every_edit_is_used_and_as_many_copies_are_made_of_few_images() -> None:
    jobs = edits_of(100_000)
    assert len(jobs) == len({row for row, _ in jobs}) == NUM_COPIES
    assert min(Counter(edit for _, edit in jobs).values()) == NUM_COPIES // len(EDITS)
    assert len(edits_of(100)) == len(set(edits_of(100))) == NUM_COPIES
    assert sorted(edits_of(2)) == sorted((row, edit) for row in (0, 1) for edit in EDITS)
    assert edits_of(0) == []


def images() -> list[np.ndarray]:
    scenes = Scenes(count=12, size=64, classes=10).open()
    return [scenes.read(index) for index in range(12)]


def feature(image: np.ndarray) -> torch.Tensor:
    """A network that sees the gray values of a thumbnail."""
    values = gray_thumbnail(image)[::4, ::4].ravel().astype(np.float32)
    return torch.from_numpy(values - values.mean() + 1e-3)


def test_copies_are_told_from_other_images() -> None:
    pixels = images()
    features = torch.stack([feature(image) for image in pixels]).numpy()
    result = calibrate(features, np.arange(12), pixels.__getitem__, feature)
    assert result.copies == 12 * len(EDITS)
    assert result.precision >= 0.99
    assert result.recalls["half size"] == result.recalls["JPEG quality 30"] == 1
    assert result.recall == pytest.approx(np.mean(list(result.recalls.values())))
    assert f"{100 * result.recall:.1f} % of 84 edited copies" in result.sentence
    assert calibrate(features, np.arange(12), pixels.__getitem__, feature) == result


@pytest.mark.parametrize("known", [True, False])
def test_duplicates_in_the_index_are_no_other_images(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those known by their bytes or hash, nor those whose pixels correlate."""
    pixels = images() * 2
    features = torch.stack([feature(image) for image in pixels]).numpy()
    groups = np.tile(np.arange(12), 2) if known else np.arange(24)
    if known:
        monkeypatch.setattr(calibration, "SAME_CORRELATION", 2.0)
    result = calibrate(features, groups, pixels.__getitem__, feature)
    assert result.recalls["half size"] == 1
    monkeypatch.setattr(calibration, "SAME_CORRELATION", 2.0)
    result = calibrate(features, np.arange(24), pixels.__getitem__, feature)
    assert result.recall < 0.1  # each image has a copy of cosine 1 that would be another image


def test_correlation_of_copies_and_of_other_images() -> None:
    pixels = images()
    for number, image in enumerate(pixels):
        for copy in (image, image[:, ::-1], image[4:60, 2:58], np.full_like(image, 255) - (255 - image) // 2):
            assert correlation(gray_thumbnail(image), gray_thumbnail(np.ascontiguousarray(copy))) >= SAME_CORRELATION
        other = pixels[(number + 1) % 12]
        assert correlation(gray_thumbnail(image), gray_thumbnail(other)) < SAME_CORRELATION


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (700, 3), (600, 900)])
def test_edits_accept_every_size(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for edit in EDITS.values():
        copy = edit(calibration.reduced(image), np.random.default_rng(0))
        assert copy.dtype == np.uint8
        assert copy.ndim == 3
        assert copy.size


def test_images_that_are_gone_are_omitted() -> None:
    pixels = images()

    def read(row: int) -> np.ndarray:
        if row < 6:
            raise BadImage(str(row), "no such file")
        return pixels[row]

    def gone(row: int) -> np.ndarray:
        raise BadImage(str(row), "no such file")

    features = torch.stack([feature(image) for image in pixels]).numpy()
    assert calibrate(features, np.arange(12), read, feature).copies == 6 * len(EDITS)
    with pytest.raises(UserError, match="None of the images of the index can be read"):
        calibrate(features, np.arange(12), gone, feature)
