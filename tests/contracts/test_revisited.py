"""Revisited Oxford and Paris: files, errors for other layouts, and the synthetic benchmark."""

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dino_ssl.data.benchmarks.revisited import open_revisited, read_ground_truth
from dino_ssl.data.synthetic.landmarks import MAX_EASY_TURN, MIN_VISIBLE, VIEWS, synthetic_landmarks
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.retrieval import Retrieval

GND: dict[str, Any] = {
    "imlist": ["tower_1", "tower_2", "bridge_1", "bridge_2"],
    "qimlist": ["tower_0", "bridge_0"],
    "gnd": [
        {"bbx": [2, 3, 20.4, 15.6], "easy": [0], "hard": [1], "junk": []},
        {"bbx": [0.0, 0.0, 30.0, 24.0], "easy": [3], "hard": [], "junk": [2]},
    ],
}


def benchmark(folder: Path, name: str = "gnd_towers.pkl", gnd: dict | None = None, skip: str = "") -> Path:
    (folder / "jpg").mkdir(parents=True, exist_ok=True)
    for i, stem in enumerate([*GND["imlist"], *GND["qimlist"]]):
        if stem != skip:
            image = np.full((24, 30, 3), 20 * i, np.uint8)
            image[3:16, 2:20] = 255 - image[3:16, 2:20]
            assert cv2.imwrite(str(folder / "jpg" / f"{stem}.jpg"), image)
    data = GND if gnd is None else gnd
    file = folder / name
    file.write_text(json.dumps(data)) if name.endswith("json") else file.write_bytes(pickle.dumps(data))
    return folder


@pytest.mark.parametrize("name", ["gnd_towers.pkl", "gnd_towers.json"])
def test_the_official_layout(tmp_path: Path, name: str) -> None:
    for source in (benchmark(tmp_path, name), tmp_path / name):
        landmarks = open_revisited(source)
        assert landmarks.name == "towers"
        assert landmarks.database.names == [f"{stem}.jpg" for stem in GND["imlist"]]
        assert landmarks.queries.names == ["tower_0.jpg", "bridge_0.jpg"]
        assert landmarks.boxed.sizes.tolist() == [[18, 13], [30, 24]]
        assert landmarks.boxed.read(0).shape == (13, 18, 3)
        np.testing.assert_array_equal(landmarks.boxed.read(0), landmarks.queries.read(0)[3:16, 2:20])
        assert [part.tolist() for part in landmarks.ground_truth.truth[1]] == [[3], [], [2]]


def test_names_with_suffixes(tmp_path: Path) -> None:
    benchmark(tmp_path / "suffixes", gnd=GND | {"imlist": [f"{name}.jpg" for name in GND["imlist"]]})
    benchmark(tmp_path / "stems")
    assert len({open_revisited(tmp_path / name).ground_truth.fingerprint for name in ("suffixes", "stems")}) == 1


def test_the_gnd_file_with_existing_images_is_chosen(tmp_path: Path) -> None:
    benchmark(tmp_path)
    (tmp_path / "gnd_other.json").write_text(json.dumps({**GND, "imlist": ["a", "b", "c", "d"]}))
    assert open_revisited(tmp_path).name == "towers"
    (tmp_path / "gnd_also.json").write_text(json.dumps(GND))
    assert open_revisited(tmp_path / "gnd_also.json").name == "also"


def test_the_mini_benchmark(shared: Path) -> None:
    landmarks = open_revisited(shared / "data" / "rparis_mini")
    assert (landmarks.name, len(landmarks.database), len(landmarks.queries)) == ("rparis_mini", 238, 12)
    assert (landmarks.boxed.sizes <= landmarks.queries.sizes).all()
    official = read_ground_truth(shared / "data" / "rparis_mini" / "gnd_rparis6k.pkl")
    assert (len(official.database), len(official.queries)) == (6322, 70)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    benchmark(tmp_path)
    (tmp_path / "gnd_towers.pkl").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
    with pytest.raises(UserError, match=r"refers to os\.system, and could run any program"):
        open_revisited(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere has no gnd_"):
        open_revisited(tmp_path / "nowhere")
    benchmark(tmp_path / "roxford5k")
    with pytest.raises(UserError, match=r"has no gnd_[\s\S]*jpg/"):
        open_revisited(tmp_path)
    with pytest.raises(UserError, match=r"missing or broken[\s\S]*1 images, such as bridge_1"):
        open_revisited(benchmark(tmp_path / "lost", skip="bridge_1"))
    broken = benchmark(tmp_path / "broken")
    (broken / "jpg" / "tower_2.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(UserError, match=r"missing or broken[\s\S]*tower_2\.jpg: .+"):
        open_revisited(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gnd": GND["gnd"][:1]}, "one entry of gnd for each query, got 1 for 2"),
        ({"imlist": GND["imlist"][:3]}, r"expected different images of 3 for bridge_0; got \[3, 2\]"),
        ({"gnd": [GND["gnd"][0], {**GND["gnd"][1], "hard": [3]}]}, "expected different images of 4 for bridge_0"),
        ({"gnd": [{"bbx": [0, 0, 9, 9], "ok": [0], "junk": []}] * 2}, "not ok, as the original"),
        ({"gnd": [{**GND["gnd"][0], "easy": [0.5]}, GND["gnd"][1]]}, "interpreted as an integer"),
        ({"gnd": [{**GND["gnd"][0], "bbx": [500, 3, 900, 20]}, GND["gnd"][1]]}, "pixels of the original files"),
        ({"gnd": [{**GND["gnd"][0], "bbx": [1, 2, 3]}, GND["gnd"][1]]}, "not a ground truth"),
        ({"gnd": 3}, "not a ground truth"),
    ],
)
def test_invalid_ground_truth_is_rejected(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_revisited(benchmark(tmp_path, gnd=GND | change))


def test_other_datasets_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs ground truth"):
        Retrieval().prepare([open_revisited(benchmark(tmp_path)).database], EvalContext())
    assert Retrieval().prepare([benchmark(tmp_path)], EvalContext()).data["queries"]["benchmark"] == "towers"


SCENES = Scenes(count=12, size=48, part="test")


def test_synthetic_positives_show_the_object_of_the_query() -> None:
    landmarks = synthetic_landmarks(SCENES)
    database, truth = landmarks.database, landmarks.ground_truth.truth
    assert len(database) == 12 * (VIEWS + 1)
    for i, lists in enumerate(truth):
        numbers = np.sort(np.concatenate(lists))
        assert numbers.tolist() == list(range(i * VIEWS, (i + 1) * VIEWS))
        for number in lists.easy:
            np.testing.assert_array_equal(database.read(number), SCENES.draw(i, 1 + number % VIEWS)[0])
    assert list(landmarks.queries.names) == [SCENES.name(i) for i in range(12)]
    assert list(database.names[12 * VIEWS :]) == [SCENES.name(i) for i in range(12, 24)]


def test_synthetic_difficulty_is_the_rotation() -> None:
    kinds = set()
    for i, lists in enumerate(synthetic_landmarks(SCENES).ground_truth.truth):
        for kind, numbers in lists._asdict().items():
            for number in numbers:
                before, now = (SCENES.scene(i, view).object.pose for view in (0, 1 + number % VIEWS))
                visible = SCENES.draw(i, 1 + number % VIEWS)[1].mean() / now.size**2
                turned = abs(now.turn - before.turn)
                assert (kind == "junk") == (visible < MIN_VISIBLE)
                assert kind == "junk" or (kind == "hard") == (turned > MAX_EASY_TURN)
                kinds.add(kind)
    assert kinds == {"easy", "hard", "junk"}


def test_synthetic_boxes_contain_the_object() -> None:
    landmarks = synthetic_landmarks(SCENES)
    for thing in range(12):
        left, top, right, bottom = landmarks.ground_truth.boxes[thing].astype(int)
        mask = SCENES.mask(thing) == 1
        assert mask.sum() == mask[top:bottom, left:right].sum() > 0
        np.testing.assert_array_equal(landmarks.boxed.read(thing), SCENES.read(thing)[top:bottom, left:right])


def test_synthetic_benchmarks_have_different_content_keys() -> None:
    keys = {
        (d.content_key, d.fingerprint) for s in (SCENES, Scenes(count=12, size=48)) for d in synthetic_landmarks(s)[1:3]
    }
    assert len(keys) == 4
    assert synthetic_landmarks(SCENES).boxed.content_key != synthetic_landmarks(SCENES).queries.content_key
