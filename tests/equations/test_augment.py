"""The supervised augmentation against Pillow's operations, simple definitions, and timm's own RandAugment."""

import math
import pickle
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dino_ssl.config import edit
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms import augment
from dino_ssl.data.transforms.augment import FILL, OPERATIONS, Augment, erase, rand_augment
from dino_ssl.data.transforms.multi_crop import MEAN, STD
from dino_ssl.errors import UserError

PHOTO = Scenes(count=1, size=64, seed=3).open().read(0)
SMOOTH = np.stack(
    [128 + 100 * np.sin(np.add.outer(np.arange(48) / 9, np.arange(56) / (7 + c))) for c in range(3)], axis=2
).astype(np.uint8)
DULL = (PHOTO // 4 + 60).astype(np.uint8)
FLAT = np.full((9, 7, 3), 90, np.uint8)


def pillow(change):
    return lambda view: np.asarray(change(Image.fromarray(view)))


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("view", [PHOTO, DULL, FLAT], ids=["photo", "dull", "flat"])
@pytest.mark.parametrize(
    ("ours", "theirs", "levels"),
    [
        (augment.auto_contrast, ImageOps.autocontrast, 1),
        (augment.equalize, ImageOps.equalize, 0),
        (augment.invert, ImageOps.invert, 0),
        *[(lambda v, b=b: augment.posterize(v, b), lambda i, b=b: ImageOps.posterize(i, b), 0) for b in (1, 3, 4, 8)],
        *[
            (
                lambda v, f=f: augment.adjust_sharpness(v, f),
                lambda i, f=f: ImageEnhance.Sharpness(i).enhance(f),
                2,
            )
            for f in (0.1, 1.0, 1.9)
        ],
    ],
)
def test_each_operation_is_pillows(view, ours, theirs, levels) -> None:
    assert apart(ours(view), pillow(theirs)(view)) <= levels


def test_solarize_add_changes_the_dark_half_alone() -> None:
    for value, expected in ((0, 50), (127, 177), (128, 128), (255, 255)):
        assert (augment.solarize_add(np.full((2, 2, 3), value, np.uint8), 50) == expected).all()


@pytest.mark.parametrize(
    ("ours", "matrix"),
    [
        (lambda v: augment.shear_x(v, 0.2), (1, 0.2, 0, 0, 1, 0)),
        (lambda v: augment.shear_y(v, -0.3), (1, 0, 0, -0.3, 1, 0)),
        (lambda v: augment.translate_x(v, 0.25), (1, 0, 0.25 * 56, 0, 1, 0)),
        (lambda v: augment.translate_y(v, -0.45), (1, 0, 0, 0, 1, -0.45 * 48)),
        (lambda v: augment.rotate(v, 25), 25),
        (lambda v: augment.rotate(v, -30), -30),
    ],
    ids=["shear x", "shear y", "move x", "move y", "left", "right"],
)
def test_moves_are_pillows(ours, matrix) -> None:
    """The same place and the same fill. On smooth ground the two bicubic kernels agree; borders are blended here."""
    image = Image.fromarray(SMOOTH)
    if isinstance(matrix, tuple):
        theirs = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)
    else:
        theirs = image.rotate(matrix, Image.Resampling.BICUBIC, fillcolor=FILL)
    difference = np.abs(ours(SMOOTH).astype(int) - np.asarray(theirs).astype(int)).max(2)
    assert (difference > 3).mean() < 0.09  # the border
    assert np.median(difference) <= 1
    outside = (np.asarray(theirs) == FILL).all(2)
    assert (difference[outside] <= 3).mean() > 0.7
    assert apart(ours(SMOOTH), SMOOTH) > 20


def test_an_operation_in_two_happens_and_all_are_as_frequent() -> None:
    rng = np.random.default_rng(0)
    drawn = [operation for _ in range(4000) for operation in rand_augment(2, 9, 0.5, rng)]
    assert len(drawn) / 8000 == pytest.approx(0.5, abs=0.03)  # 5 standard errors
    counts = np.array([sum(one.func is which for one in drawn) for which in OPERATIONS])
    expected = len(drawn) / len(OPERATIONS)
    assert len(OPERATIONS) == 15
    assert (np.abs(counts - expected) < 5 * math.sqrt(expected)).all()
    levels = np.array([one.keywords["level"] for one in drawn])
    # normal around 0.9 with deviation 0.05, cut at 1: two deviations above the middle
    cut = np.minimum(1, np.random.default_rng(1).normal(0.9, 0.05, 100_000))
    assert levels.mean() == pytest.approx(cut.mean(), abs=0.004)
    assert levels.std() == pytest.approx(cut.std(), abs=0.004)
    assert levels.max() == 1
    assert np.mean([one.keywords["sign"] for one in drawn]) == pytest.approx(0, abs=0.08)
    assert not rand_augment(0, 9, 0.5, rng)
    assert {one.keywords["level"] for one in rand_augment(50, 4, 0, rng)} == {0.4}


def test_every_operation_keeps_shape_and_type_at_any_level() -> None:
    for which in OPERATIONS:
        for level in (0.0, 0.5, 1.0):
            for sign in (-1, 1):
                view = which(PHOTO, level=level, sign=sign)
                assert view.shape == PHOTO.shape
                assert view.dtype == np.uint8


def test_operations_grow_with_the_level() -> None:
    """DeiT's variant: more magnitude, more change. Auto-contrast, equalize and invert know no level."""
    for which in OPERATIONS[3:]:
        weak, strong = (np.abs(which(PHOTO, level=level, sign=1).astype(int) - PHOTO).mean() for level in (0.1, 1.0))
        assert strong > weak + 0.5


def test_the_whole_is_distributed_as_timms() -> None:
    """Means, spreads and edges of 150 pictures through our operations and through timm's, as DeiT calls them."""
    timm_augment = pytest.importorskip("timm.data.auto_augment")
    random.seed(0)
    np.random.seed(0)
    options = dict(translate_const=100, img_mean=FILL, interpolation=Image.Resampling.BICUBIC)
    theirs = timm_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    rng, image, draws = np.random.default_rng(0), Image.fromarray(PHOTO), 150

    def mine() -> np.ndarray:
        view = PHOTO
        for operation in rand_augment(2, 9, 0.5, rng):
            view = operation(view)
        return view

    def facts(view: np.ndarray) -> list[float]:
        pixels = view.astype(float)
        filled = (view == FILL).all(2).mean()
        sharp = np.abs(np.diff(pixels, axis=1)).mean()
        return [*pixels.mean((0, 1)), *pixels.std((0, 1)), 10 * sharp, 100 * filled]

    ours = np.array([facts(mine()) for _ in range(draws)])
    reference = np.array([facts(np.asarray(theirs(image))) for _ in range(draws)])
    error = np.sqrt((ours.var(0) + reference.var(0)) / draws)
    assert (np.abs(ours.mean(0) - reference.mean(0)) < 4 * error + 0.3).all()
    np.testing.assert_allclose(ours.std(0), reference.std(0), rtol=0.3, atol=0.3)


def test_an_erased_rectangle_has_the_area_and_the_shape_that_were_asked() -> None:
    rng, black = np.random.default_rng(0), np.zeros((64, 80, 3), np.uint8)
    shares, tilts, noise = [], [], []
    for _ in range(200):
        view = erase(black, (0.02, 1 / 3), rng)
        rows, columns = (np.flatnonzero(view.any(2).any(axis)) for axis in (1, 0))
        patch = view[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        shares.append(patch.shape[0] * patch.shape[1] / (64 * 80))
        tilts.append(math.log(patch.shape[0] / patch.shape[1]))
        noise.append(patch.reshape(-1, 3))
        assert not view[: rows[0]].any()
        assert not view[:, : columns[0]].any()
    assert not black.any()  # what is given is not written to
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert min(shares) < 0.04
    assert max(shares) > 0.3
    assert np.mean(tilts) == pytest.approx(0, abs=0.12)  # tall ones that do not fit are drawn again
    assert max(map(abs, tilts)) <= -math.log(0.3) + 0.3
    normal = (np.concatenate(noise) / 255 - MEAN) / STD  # what the network gets
    assert np.abs(normal.mean(0)).max() < 0.05
    assert np.abs(normal.std(0) - 1).max() < 0.06


def test_the_view_is_a_function_of_the_generator() -> None:
    recipe = Augment(size=32)
    views = [recipe(PHOTO, np.random.default_rng(seed))[0] for seed in (1, 1, 2)]
    assert views[0].shape == (32, 32, 3)
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])
    assert recipe.view_shapes == [(1, 32)]
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # to the workers


def test_each_part_can_be_turned_off() -> None:
    still = Augment(size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, operations=0, erase=0.0)
    rng = np.random.default_rng(0)
    assert np.array_equal(still(PHOTO, rng)[0], PHOTO)
    assert np.array_equal(edit(still, flip=1.0)(PHOTO, rng)[0], PHOTO[:, ::-1])
    changed = edit(still, erase=1.0)(PHOTO, rng)[0]
    share = (changed != PHOTO).any(2).mean()
    assert 0.01 < share < 0.4
    assert any(not np.array_equal(edit(still, operations=2)(PHOTO, rng)[0], PHOTO) for _ in range(20))


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"repeats": 0}, {"flip": 1.5}, {"erase": -0.1}, {"magnitude": 11}, {"scale": (0.5, 0.1)},
     {"operations": -1}, {"magnitude_spread": -1.0}, {"erase_area": (0.0, 0.1)}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(UserError, match=rf"views\.{next(iter(wrong))}"):
        Augment(**wrong)
