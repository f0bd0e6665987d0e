"""Synthetic scenes: functions of (settings, i), exact masks, and no class information in raw pixels or colors."""

import pickle
import subprocess
import sys
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest

from dino_ssl.data.synthetic.painting import KINDS, PATTERNS, Pose, render
from dino_ssl.data.synthetic.scenes import SIMPLE_SCENES, Scenes
from dino_ssl.errors import UserError


def test_an_image_is_a_function_of_settings_and_index():
    """In any order, for any count, and in another process."""
    forward = [Scenes(count=30).read(i) for i in range(12)]
    few = Scenes(count=3)
    for i in reversed(range(12)):
        np.testing.assert_array_equal(few.read(i), forward[i])
    assert not any(np.array_equal(forward[0], other) for other in forward[1:])
    code = "import zlib; from dino_ssl.data.synthetic.scenes import *; "
    code += "print([zlib.crc32(Scenes().read(i)) for i in (7, 3)])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == f"{[zlib.crc32(forward[i].tobytes()) for i in (7, 3)]}\n"


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(part="val"),
        dict(rotation=10.0),
        dict(clutter=0),
        dict(one_palette=True),
        dict(object_size=(0.2, 0.3)),
    ],
)
def test_every_setting_changes_the_images_and_the_fingerprint(change):
    plain, other = Scenes(count=20), replace(Scenes(count=20), **change)
    assert any(not np.array_equal(plain.read(i), other.read(i)) for i in range(4))
    assert plain.open().fingerprint != other.open().fingerprint


def test_parts_and_seeds_are_disjoint():
    sources = [Scenes(seed=seed, part=part) for seed in (0, 1) for part in ("train", "val", "test")]
    images = {source.read(i).tobytes() for source in sources for i in range(5)}
    assert len(images) == 30


def test_another_size_is_the_same_scene():
    for i in range(6):
        small, large = Scenes(size=64), Scenes(size=256)
        shrunk = cv2.resize(large.read(i), (64, 64), interpolation=cv2.INTER_AREA).astype(float)
        assert np.abs(shrunk - small.read(i)).mean() < 8
        overlap = cv2.resize(large.mask(i) * 255, (64, 64), interpolation=cv2.INTER_AREA) > 127
        both, any_ = overlap & (small.mask(i) > 0), overlap | (small.mask(i) > 0)
        assert both.sum() / any_.sum() > 0.95


def test_it_is_an_image_dataset():
    source = pickle.loads(pickle.dumps(Scenes(count=40, classes=4).open()))
    assert len(source) == len(set(source.names)) == 40
    assert source.classes == list(KINDS[:4])
    assert source.labels is not None
    for i in (0, 5, 39):
        assert source.names[i].split("/")[0] == source.classes[source.labels[i]]
        assert source.read(i).shape[:2] == (source.sizes[i][1], source.sizes[i][0])
        np.testing.assert_array_equal(source.read(i), Scenes(classes=4).read(i))
        np.testing.assert_array_equal(source.mask(i), Scenes(classes=4).mask(i))
    train, val = source.split(0.25, seed=0)
    assert set(train.names).isdisjoint(val.names)
    assert np.bincount(val.labels, minlength=4).tolist() == [2, 2, 2, 2] or len(val) == 12  # 10 of a class: 2 or 3


def test_the_mask_is_the_silhouette_of_the_object():
    """The mask holds the pixels that the object covers by more than half and nothing occludes."""
    scenes = Scenes()
    for i in range(20):
        background, obj, occluders = scenes.scene(i)
        image, mask = scenes.draw(i)
        white = obj.texture._replace(colors=np.full((2, 3), [100, 0, 0]), light=(0, 0))
        alpha = render(96, [obj._replace(texture=white)])[0][..., 0]
        hidden = sum(render(96, [piece._replace(label=1)])[1] for piece in occluders) > 0
        np.testing.assert_array_equal(mask > 0, (alpha > 127) & ~hidden)
        without = render(96, [*background, *occluders])[0]
        changed = (image != without).any(axis=-1)
        assert changed[mask > 0].mean() > 0.99
        assert not changed[cv2.dilate(alpha, np.ones((3, 3), np.uint8)) == 0].any()  # the shadow is one pixel wide
    assert any(scenes.scene(i).occluders for i in range(20))


def test_kinds_do_not_differ_in_area_position_or_mean_color():
    """Every outline covers the same area around its center of mass; every pattern is positive on half of the plane."""
    for i, kind in enumerate(KINDS * 3):
        obj = Scenes().scene(i).object
        inside = render(200, [obj._replace(pose=Pose(0, 0, 0, 0.35))])[1] > 0
        assert inside.mean() == pytest.approx(0.35**2, rel=0.04), kind
        np.testing.assert_allclose(np.argwhere(inside).mean(axis=0), 99.5, atol=1, err_msg=kind)
    u, v = np.meshgrid(*2 * [np.linspace(0, 30, 600)])
    for kind, pattern in zip(KINDS, PATTERNS, strict=True):
        wave = pattern(u, v)
        assert (wave > 0).mean() == pytest.approx(0.5, abs=0.02), kind
        assert np.clip(wave, -0.5, 0.5).mean() == pytest.approx(0, abs=0.02), kind


def test_one_palette_leaves_the_class_to_the_pattern():
    """Objects are as bright as the background, and all images have the same mean color."""
    images = np.stack([SIMPLE_SCENES.read(i) for i in range(40)]).astype(float)
    masks = np.stack([SIMPLE_SCENES.mask(i) for i in range(40)]) > 0
    assert abs(images[masks].mean() - images[~masks].mean()) < 12
    assert images.mean((1, 2)).std(axis=0).max() < 6


def test_another_view_keeps_the_object_and_changes_the_rest():
    scenes = Scenes()
    first, second = scenes.scene(5, 1), scenes.scene(5, 2)
    for scene in (second, scenes.scene(5)):
        np.testing.assert_array_equal(first.object.outline, scene.object.outline)
        np.testing.assert_array_equal(first.object.texture.colors, scene.object.texture.colors)
    assert first.object.pose != second.object.pose
    assert not np.array_equal(first.background[0].texture.colors, second.background[0].texture.colors)


def test_video_moves_smoothly_and_keeps_its_objects():
    for i, objects in ((0, 1), (1, 2)):
        frames, masks = Scenes().video(i, 20)
        assert frames.shape == (20, 96, 96, 3)
        assert masks.max() == objects
        for k in range(1, objects + 1):
            visible = masks == k
            assert visible.any(axis=(1, 2)).all()
            middles = np.array([np.argwhere(frame).mean(axis=0) for frame in visible])
            steps = np.linalg.norm(np.diff(middles, axis=0), axis=1)
            assert steps.max() < 12  # an eighth of the side
            assert np.ptp(middles, axis=0).max() > 6
        np.testing.assert_array_equal(Scenes().video(i, 20).frames, frames)


def test_written_folder_has_the_same_images(tmp_path):
    scenes = Scenes(count=6, classes=3)
    scenes.write(tmp_path / "photos")
    for i in range(6):
        image = cv2.imread(str(tmp_path / "photos" / scenes.name(i)))
        assert image is not None
        np.testing.assert_array_equal(image[..., ::-1], scenes.read(i))
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["flower", "gear", "star"]


@pytest.mark.parametrize(
    "settings", [dict(count=-1), dict(size=8), dict(classes=11), dict(rotation=200.0), dict(part="dev")]
)
def test_invalid_settings_are_rejected_by_name(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Scenes(**settings)


def _vote(train: np.ndarray, test: np.ndarray, classes: int = 10) -> float:
    """Return the accuracy of weighted 20-NN, by its definition; the classes of the rows alternate."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    similarity = test @ train.T
    nearest = np.argpartition(-similarity, 20, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = np.stack([(weights * (nearest % classes == c)).sum(1) for c in range(classes)], 1)
    return float((votes.argmax(1) == np.arange(len(test)) % classes).mean())


def _pixels(image: np.ndarray) -> np.ndarray:
    small = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    return small - small.mean()


def _colors(image: np.ndarray) -> np.ndarray:
    return np.sqrt(cv2.calcHist([image], [0, 1, 2], None, [6, 6, 6], [0, 256] * 3).ravel())


def test_neither_raw_pixels_nor_colors_reveal_the_class():
    """Chance is 10 % (standard deviation 1.7); the classifier is checked on the silhouettes without rotation."""
    train, val = Scenes(size=48), Scenes(size=48, part="val")
    images = [[scenes.read(i) for i in range(n)] for scenes, n in ((train, 800), (val, 300))]
    for features, bound in ((_pixels, 0.16), (_colors, 0.145)):
        vectors = [np.stack([features(image) for image in part]) for part in images]
        assert _vote(vectors[0], vectors[1]) < bound, features.__name__

    def upright(scenes: Scenes, count: int) -> np.ndarray:
        objects = [scenes.scene(i).object._replace(pose=Pose(0, 0, 0, 0.5)) for i in range(count)]
        return np.stack([_pixels(render(48, [obj])[1] * 255) for obj in objects])

    assert _vote(upright(train, 300), upright(val, 100)) > 0.9
