"""Supervised augmentation: determinism, the operations of RandAugment, the size of erased rectangles."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from dino_ssl.config import edit
from dino_ssl.data.loader import sample_rng
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.augment import MAX_MAGNITUDE, Augment, _operations
from dino_ssl.errors import UserError
from dino_ssl.preprocessing import MEAN, STD, denormalize, normalize

IMAGE = Scenes(count=1, size=64, seed=3).open().read(0)
IDENTITY = Augment(size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, operations=0, erase=0.0)


def test_the_view_is_a_function_of_seed_epoch_index_and_copy() -> None:
    transform = Augment(size=32, operations=4, erase=1.0)
    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1, 2, 1)]
    views = [transform(IMAGE, sample_rng(*key))[0] for key in keys]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    again = [transform(IMAGE, sample_rng(*key))[0] for key in reversed(keys)]
    assert all(np.array_equal(a, b) for a, b in zip(views, reversed(again), strict=True))
    assert len({view.tobytes() for view in views}) == len(keys)
    assert views[0].shape == (32, 32, 3)
    assert views[0].dtype == np.uint8
    assert transform.view_shapes == [(1, 32)]
    assert pickle.loads(pickle.dumps(transform)) == transform  # sent to workers


def test_global_random_generators_are_restored() -> None:
    random.seed(1)
    torch.manual_seed(1)
    expected = random.getstate(), torch.get_rng_state().tolist()
    Augment(size=32, erase=1.0)(IMAGE, np.random.default_rng(0))
    assert expected == (random.getstate(), torch.get_rng_state().tolist())


def test_each_part_can_be_disabled() -> None:
    rng, before = np.random.default_rng(0), IMAGE.copy()
    assert np.array_equal(IDENTITY(IMAGE, rng)[0], IMAGE)
    assert np.array_equal(edit(IDENTITY, flip=1.0)(IMAGE, rng)[0], IMAGE[:, ::-1])
    assert not np.array_equal(edit(IDENTITY, erase=1.0)(IMAGE, rng)[0], IMAGE)
    assert np.array_equal(IMAGE, before)


def test_half_of_the_operations_are_applied_and_magnitude_0_is_weaker() -> None:
    rng = np.random.default_rng(0)

    def distances(**changes: object) -> np.ndarray:
        transform = edit(IDENTITY, operations=1, magnitude_std=0.0, **changes)
        return np.array([np.abs(transform(IMAGE, rng)[0].astype(int) - IMAGE).mean() for _ in range(400)])

    strong, weak = distances(magnitude=9.0), distances(magnitude=0.0)
    assert 0.4 < (strong > 0).mean() < 0.56
    assert weak.mean() < 0.75 * strong.mean()


def test_every_operation_works_at_the_largest_magnitude() -> None:
    """Timm's posterize has 0 bits at magnitude 10, which Pillow refuses."""
    image = Image.fromarray(IMAGE)
    for magnitude_std in (0.0, 5.0):
        for seed in range(8):
            random.seed(seed)
            assert all(op(image).size == image.size for op in _operations(10.0, magnitude_std))


def test_erased_rectangle_has_the_specified_area_and_normal_noise() -> None:
    transform, rng, black = edit(IDENTITY, erase=1.0), np.random.default_rng(0), np.zeros((64, 64, 3), np.uint8)
    shares, noise = [], []
    for _ in range(300):
        view = transform(black, rng)[0]
        rows, columns = (np.flatnonzero(view.any(2).any(axis)) for axis in (1, 0))
        patch = view[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        shares.append(patch.shape[0] * patch.shape[1] / 64**2)
        noise.append(patch.reshape(-1, 3))
        assert np.count_nonzero(view) == np.count_nonzero(patch)  # nothing else changes
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert min(shares) < 0.04
    assert max(shares) > 0.3
    normalized = (np.concatenate(noise) / 255 - MEAN) / STD  # as the network receives it, clipped to 0..255
    assert np.abs(normalized.mean(0)).max() < 0.05
    assert np.abs(normalized.std(0) - 1).max() < 0.06
    share = np.mean([edit(IDENTITY, erase=0.25)(black, rng)[0].any() for _ in range(400)])
    assert share == pytest.approx(0.25, abs=0.07)


def test_operations_are_those_of_timms_rand_augment() -> None:
    hparams = {"img_mean": (124, 116, 104), "magnitude_max": MAX_MAGNITUDE}
    reference = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    assert list(map(repr, _operations(9.0, 0.5))) == [repr(op).replace("m=9,", "m=9.0,") for op in reference.ops]
    assert len(reference.ops) == 15
    assert all(a.kwargs == b.kwargs for a, b in zip(_operations(9.0, 0.5), reference.ops, strict=True))


def test_denormalize_inverts_normalize_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    assert torch.equal(denormalize(normalize(values)), values)


@pytest.mark.parametrize(
    "settings",
    [{"size": 0}, {"repeats": 0}, {"flip": 1.5}, {"erase": -0.1}, {"magnitude": 11}, {"scale": (0.5, 0.1)},
     {"operations": -1}, {"magnitude_std": -1.0}, {"erase_area": (0.0, 0.1)}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_invalid_settings_are_rejected_by_name(settings: dict) -> None:
    with pytest.raises(UserError, match=rf"views\.{next(iter(settings))}"):
        Augment(**settings)
