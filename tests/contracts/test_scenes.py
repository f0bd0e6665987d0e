"""The drawn pictures: pure functions of (settings, i), true masks, and no class in raw pixels or colours."""

import pickle
import subprocess
import sys
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest

from dino_ssl.data.synthetic.painting import place
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.synthetic.shapes import KINDS
from dino_ssl.data.transforms import distortions
from dino_ssl.errors import UserError


def test_picture_is_a_function_of_settings_and_index_alone():
    forward = [Scenes(count=30).read(i) for i in range(12)]
    few = Scenes(count=3)
    for i in reversed(range(12)):
        np.testing.assert_array_equal(few.read(i), forward[i])
    assert not any(np.array_equal(forward[0], other) for other in forward[1:])


def test_another_process_draws_the_same():
    code = "import zlib; from dino_ssl.data.synthetic.scenes import *; print([zlib.crc32(Scenes().read(i)) for i in (7, 3)])"
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
        for _ in range(2)
    ]
    assert told[0] == told[1] == f"{[zlib.crc32(Scenes().read(i)) for i in (7, 3)]}\n"


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(part="val"),
        dict(turn=10.0),
        dict(texture=0.1),
        dict(clutter=0),
        dict(noise=0.0),
        dict(herd=4),
        dict(level=True),
    ],
)
def test_every_setting_changes_the_pictures_and_the_fingerprint(change):
    plain, other = Scenes(count=20), replace(Scenes(count=20), **change)
    assert any(not np.array_equal(plain.read(i), other.read(i)) for i in range(4))
    assert plain.open().fingerprint != other.open().fingerprint


def test_parts_and_seeds_share_no_picture():
    sources = [Scenes(seed=seed, part=part) for seed in (0, 1) for part in ("train", "val", "test")]
    drawn = {source.read(i).tobytes() for source in sources for i in range(10)}
    assert len(drawn) == 60


def test_another_size_is_the_same_scene():
    for i in range(6):
        small, large = Scenes(noise=0.0, size=64), Scenes(noise=0.0, size=256)
        shrunk = cv2.resize(large.read(i), (64, 64), interpolation=cv2.INTER_AREA).astype(float)
        assert np.abs(shrunk - small.read(i)).mean() < 8
        overlap = cv2.resize(np.minimum(large.mask(i), 1) * 255, (64, 64), interpolation=cv2.INTER_AREA) > 127
        both, any_ = overlap & (small.mask(i) > 0), overlap | (small.mask(i) > 0)
        assert both.sum() / any_.sum() > 0.85


def test_it_meets_the_contract_of_pictures():
    source = pickle.loads(pickle.dumps(Scenes(count=40, classes=4).open()))
    assert len(source) == len(set(source.names)) == 40
    assert source.classes == list(KINDS[:4])
    assert source.labels is not None
    for i in (0, 5, 39):
        assert source.names[i].split("/")[0] == source.classes[source.labels[i]]
        assert source.read(i).shape[:2] == (source.sizes[i][1], source.sizes[i][0])
        np.testing.assert_array_equal(source.read(i), Scenes(classes=4).read(i))
    rest, held = source.split(0.25, seed=0)
    assert set(rest.names).isdisjoint(held.names)
    assert np.bincount(held.labels, minlength=4).tolist() == [2, 2, 2, 2] or len(held) == 12  # 10 of a class: 2 or 3


def test_mask_is_where_the_thing_is():
    """The mask is the placed silhouette, and the picture is darker or lighter inside it than around it."""
    scenes = Scenes(noise=0.0, company=0.0, clutter=0, texture=0.0, coats=False)
    for i in range(20):
        things, _ = scenes.scene(i)
        (thing, pose) = things[0]
        inside = place(thing, pose, scenes.size)[..., 0] > 0
        np.testing.assert_array_equal(scenes.mask(i) == 1, inside)
        picture, mask = scenes.draw(i)
        core = cv2.erode(mask, np.ones((3, 3), np.uint8)) > 0
        far = cv2.dilate(mask, np.ones((15, 15), np.uint8)) == 0
        assert core.sum() > 50
        inner, outer = (np.median(picture[where].astype(float) @ [0.3, 0.6, 0.1]) for where in (core, far))
        assert abs(inner - outer) > 10, i


def test_company_is_the_second_object_of_a_mask():
    lonely, crowded = Scenes(company=0.0), Scenes(company=1.0)
    assert max(lonely.mask(i).max() for i in range(10)) == 1
    for i in range(10):
        things, _ = crowded.scene(i)
        assert things[0][0].kind == things[1][0].kind == KINDS[crowded.label(i)]
        counts = np.bincount(crowded.mask(i).ravel(), minlength=3)
        assert counts[1] > 2 * counts[2] > 0


def test_a_herd_is_so_many_things_of_one_kind_and_every_quarter_shows_one():
    scenes = Scenes(herd=4, span=(0.36, 0.46), clutter=0, company=0.0, noise=0.0)
    for i in range(20):
        things, mask = scenes.scene(i).things, scenes.mask(i)
        assert [thing.kind for thing, _ in things] == [KINDS[scenes.label(i)]] * 4
        half = scenes.size // 2
        quarters = [mask[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        assert all((quarter > 0).mean() > 0.1 for quarter in quarters)
    assert set(np.unique(scenes.mask(0))) <= {0, 1, 2, 3, 4}


def test_level_things_are_as_light_as_their_ground():
    """The mean lightness under the mask and beside it: far apart without, near with."""

    def gap(level: bool) -> float:
        scenes = Scenes(level=level, span=(0.45, 0.5), clutter=0, company=0.0, noise=0.0, texture=0.1, variety=0.3)
        apart = []
        for i in range(30):
            picture, mask = scenes.draw(i)
            light = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)[..., 0].astype(float)
            apart.append(abs(light[mask > 0].mean() - light[mask == 0].mean()))
        return float(np.median(apart))

    assert gap(True) < 15 < 30 < gap(False)


def test_every_kind_covers_the_same_area():
    """Whole things, placed in the middle of a large sheet: the area is the pose's, whatever the kind."""
    scenes = Scenes(classes=10, company=0.0)
    for i in range(30):
        (thing, pose), *_ = scenes.scene(i).things
        covered = (place(thing, pose._replace(x=0.0, y=0.0, size=0.35), 200)[..., 0] > 0).mean()
        assert covered == pytest.approx(0.35**2, rel=0.04), thing.kind


def test_instance_keeps_the_thing_and_changes_the_rest():
    scenes = Scenes()
    np.testing.assert_array_equal(scenes.instance(5, 0), scenes.read(5))
    first, second = scenes.scene(5, 1), scenes.scene(5, 2)
    assert first.things[0][0].variant == second.things[0][0].variant == scenes.scene(5).things[0][0].variant
    np.testing.assert_array_equal(first.things[0][0].texture.colours, second.things[0][0].texture.colours)
    assert first.things[0][1] != second.things[0][1]
    assert not np.array_equal(first.ground.texture.colours, second.ground.texture.colours)


def test_video_moves_smoothly_and_keeps_its_objects():
    for i, objects in ((0, 1), (1, 2)):
        frames, masks = Scenes().video(i, 20)
        assert frames.shape == (20, 96, 96, 3)
        assert masks.max() == objects
        for k in range(1, objects + 1):
            seen = masks == k
            assert seen.any(axis=(1, 2)).all()
            middles = np.array([np.argwhere(frame).mean(axis=0) for frame in seen])
            steps = np.linalg.norm(np.diff(middles, axis=0), axis=1)
            assert steps.max() < 12  # an eighth of the side
            assert np.ptp(middles, axis=0).max() > 6
        np.testing.assert_array_equal(Scenes().video(i, 20).frames, frames)


def test_copies_are_the_edits_their_names_say():
    scenes = Scenes(size=128)
    picture, copies = scenes.read(3), scenes.copies(3)
    assert {name.split("_")[0] for name in copies} == {"crop", "jpeg", "strong"}
    for lost in (10, 50, 80):
        h, w, _ = copies[f"crop_{lost}"].shape
        assert 1 - h * w / 128**2 == pytest.approx(lost / 100, abs=0.02)
    damage = [np.abs(copies[f"jpeg_{q}"].astype(float) - picture).mean() for q in (75, 30, 15, 8, 3)]
    assert damage == sorted(damage)
    assert damage[-1] > 2 * damage[0]
    np.testing.assert_array_equal(copies["strong_mirror"][:, ::-1], picture)
    whole = distortions.paste(picture, np.zeros((128, 128, 3), np.uint8), np.random.default_rng(0), share=0.25)
    assert (whole.max(axis=-1) > 0).mean() == pytest.approx(0.25, abs=0.01)
    for name, copy in scenes.copies(3).items():
        np.testing.assert_array_equal(copy, copies[name])


def test_written_folder_holds_the_same_pictures(tmp_path):
    scenes = Scenes(count=6, classes=3)
    scenes.write(tmp_path / "photos", masks=tmp_path / "masks")
    for i in range(6):
        picture = cv2.imread(str(tmp_path / "photos" / scenes.name(i)))[..., ::-1]
        np.testing.assert_array_equal(picture, scenes.read(i))
        mask = cv2.imread(str(tmp_path / "masks" / scenes.name(i)), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(mask, scenes.mask(i))
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["flower", "gear", "star"]
    with pytest.raises(UserError, match="outside"):
        scenes.write(tmp_path / "photos", masks=tmp_path / "photos" / "masks")


@pytest.mark.parametrize(
    "wrong",
    [dict(count=-1), dict(size=8), dict(classes=11), dict(classes=1), dict(turn=200.0), dict(part="dev"), dict(herd=0)],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Scenes(**wrong)


def _vote(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """Weighted 20-NN by its definition."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    similarity = test @ train.T
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = np.stack([(weights * (train_labels[nearest] == c)).sum(1) for c in range(classes)], 1)
    return votes.argmax(1)


def test_neither_raw_pixels_nor_colours_tell_the_class():
    """Chance is 10 %: raw pixels stay below 1.6 times that, colour histograms below 1.35 times.

    The vote itself is checked with an oracle: on the silhouettes alone, unturned, it is nearly always right.
    """
    train, test = Scenes(count=2000, size=48), Scenes(count=600, size=48, part="val")
    drawn = [[source.read(i) for i in range(source.count)] for source in (train, test)]
    labels = [source.open().labels for source in (train, test)]

    def pixels(picture: np.ndarray) -> np.ndarray:
        small = cv2.resize(picture, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
        return small - small.mean()

    def colours(picture: np.ndarray) -> np.ndarray:
        return np.sqrt(cv2.calcHist([picture], [0, 1, 2], None, [6, 6, 6], [0, 256] * 3).ravel())

    for look, bound in ((pixels, 0.16), (colours, 0.135)):
        seen = [np.stack([look(picture) for picture in dataset]) for dataset in drawn]
        right = (_vote(seen[0], labels[0], seen[1], 10) == labels[1]).mean()
        assert right < bound, look.__name__

    upright = [
        Scenes(count=n, size=48, turn=0.0, company=0.0, clutter=0, part=p) for n, p in ((300, "train"), (100, "val"))
    ]
    shapes = [
        np.stack([place(thing, pose._replace(x=0.0, y=0.0, size=0.4), 48)[..., 0].clip(-4, 4).ravel()
                  for thing, pose in (source.scene(i).things[0] for i in range(source.count))])
        for source in upright
    ]  # fmt: skip
    assert (_vote(shapes[0], upright[0].open().labels, shapes[1], 10) == upright[1].open().labels).mean() > 0.9
