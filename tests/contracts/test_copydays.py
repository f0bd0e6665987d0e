"""Copydays' files, what is said of those that are laid out otherwise, and copies made of any pictures."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from dino_ssl.data.benchmarks.copydays import EditedCopies, edited, find_copies, make_copies
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.copy_detection import CopyDetection, drawn_copies

OFFICIAL = [
    "original/200000.jpg",
    "original/200100.jpg",
    "crops/10/200000.jpg",
    "crops/80/200101.jpg",
    "jpeg/3/200001.jpg",
    "strong/200002.jpg",
    "strong/200113.jpg",
]


def write(folder: Path, names: list[str]) -> Path:
    """Pictures with a texture that their group, the first four characters of the name, has for itself."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(list(Path(name).stem[:4].encode()))
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / name), cv2.resize(coarse, (20, 16), interpolation=cv2.INTER_NEAREST))
    return folder


def found(folder: Path, names: list[str]):
    return find_copies(Folder(path=str(write(folder, names))).open())


@pytest.mark.parametrize("prefix", ["", "copydays_"])
def test_the_official_layout(tmp_path: Path, prefix: str) -> None:
    """A group is the first four digits; blocks are the folders."""
    copies = found(tmp_path, [prefix + name for name in OFFICIAL])
    assert copies is not None
    assert [name[-10:] for name in copies.originals.names] == ["200000.jpg", "200100.jpg"]
    told = {
        (block, strength, copies.copies.names[q][-10:]): int(copies.original_of[q])
        for q, (block, strength) in enumerate(copies.blocks)
    }
    assert told == {
        ("crops", "10", "200000.jpg"): 0,
        ("crops", "80", "200101.jpg"): 1,
        ("jpeg", "3", "200001.jpg"): 0,
        ("strong", "", "200002.jpg"): 0,
        ("strong", "", "200113.jpg"): 1,
    }


def test_all_in_one_folder(tmp_path: Path) -> None:
    copies = found(tmp_path, ["200000.jpg", "200001.jpg", "200100.jpg", "200101.jpg", "200102.jpg"])
    assert copies is not None
    assert copies.original_of.tolist() == [0, 1, 1]
    assert set(copies.blocks) == {("copies", "")}


@pytest.mark.parametrize(
    "names",
    [
        ["cat/1.jpg", "dog/2.jpg"],
        ["000001.jpg", "000100.jpg", "005000.jpg"],  # VOC 2007 is named so
        ["original/cat.jpg", "original/dog.jpg"],
        ["jpeg/cat.jpg", "png/dog.jpg"],
    ],
)
def test_other_folders_are_no_copydays(tmp_path: Path, names: list[str]) -> None:
    assert found(tmp_path, names) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (OFFICIAL[2:], "Found 0 originals and 5 copies"),
        (OFFICIAL[:2], "Found 2 originals and 0 copies"),
        ([*OFFICIAL, "strong/200250.jpg"], r"1 copies have no original: strong/200250\.jpg"),
        ([*OFFICIAL, "strong/cat.jpg"], "strong/cat.jpg is not named by six digits"),
        ([*OFFICIAL, "original/200001.jpg"], "names end with 00"),
        ([*OFFICIAL, "original/b/200000.jpg"], "share their first four digits"),
    ],
)
def test_what_is_wrong_is_said_beside_the_layout(tmp_path: Path, names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said + r"[\s\S]*original/ +200000\.jpg"):
        found(tmp_path, names)


def test_copies_are_a_function_of_the_seed_and_say_their_sizes() -> None:
    dataset, pages = Scenes(count=3, size=40).open(), Scenes(count=2, size=24, part="val").open()
    copies = EditedCopies(dataset, pages, seed=1)
    assert len(copies) == 45
    drawn = [copies.read(i) for i in range(len(copies))]
    assert [picture.shape[1::-1] for picture in drawn] == [tuple(size) for size in copies.sizes.tolist()]
    again = pickle.loads(pickle.dumps(EditedCopies(dataset, pages, seed=1)))
    for i in (44, 0, 20, 3):
        np.testing.assert_array_equal(again.read(i), drawn[i])
    other = EditedCopies(dataset, pages, seed=2)
    assert not np.array_equal(other.read(4), drawn[4])
    assert len({copies.content_key, other.content_key, copies.fingerprint, other.fingerprint}) == 4
    assert len({picture.tobytes() for picture in drawn}) == 45
    twins = EditedCopies(dataset.subset([0, 0]), pages.subset([0]), seed=1)  # each original has edits of its own
    drawn_to = [i for i, (_, kind) in enumerate(twins.items) if kind in ("crop_50", "strong_rotate", "strong_paste")]
    assert not any(np.array_equal(twins.read(i), twins.read(i + 15)) for i in drawn_to if i < 15)


def test_blocks_are_named_as_in_copydays() -> None:
    copies = edited(Scenes(count=2, size=24).open(), Scenes(count=1, size=24, part="val").open(), None)
    assert {block for block, _ in copies.blocks} == {"crops", "jpeg", "strong"}
    assert copies.original_of.tolist() == [0] * 15 + [1] * 15
    assert ("strong", "paste") in copies.blocks


@pytest.mark.parametrize(("count", "originals", "expected"), [(4, 100, 2), (40, 10, 10), (12, 100, 6)])
def test_originals_pages_and_others_are_different_pictures(count: int, originals: int, expected: int) -> None:
    dataset = Scenes(count=count, size=16).open()
    copies = make_copies(dataset, originals)
    assert isinstance(copies.copies, EditedCopies)
    assert copies.others is not None
    parts = [copies.originals.names, copies.copies.pages.names, copies.others.names]
    assert len(parts[0]) == expected
    assert all(parts)
    assert sorted(name for part in parts for name in part) == sorted(dataset.names)
    assert make_copies(dataset, originals).originals.names == parts[0]
    with pytest.raises(UserError, match="at least 4"):
        make_copies(dataset.subset(range(3)), 10)


def test_drawn_sets_share_no_picture() -> None:
    copies, whitening = drawn_copies(Scenes(count=4, size=16, part="test"))
    assert isinstance(copies.copies, EditedCopies)
    assert copies.others is not None
    names = [*copies.originals.names, *copies.copies.pages.names, *copies.others.names, *whitening.names]
    assert len(set(names)) == len(names) == 4 + 4 + 16 + 20


def test_a_folder_with_distractors_and_whitening(tmp_path: Path) -> None:
    """Copydays, and two folders more: the database is the originals and the distractors."""
    write(tmp_path / "copydays", OFFICIAL)
    Scenes(count=5, size=16).write(tmp_path / "others")
    Scenes(count=6, size=16, part="val").write(tmp_path / "more")
    bound = CopyDetection().bind([tmp_path / n for n in ("copydays", "others", "more")], EvalContext())
    assert {name: side["images"] for name, side in bound.data.items()} == {
        "copies": 5,
        "originals": 2,
        "distractors": 5,
        "whitening": 6,
    }
    bound = CopyDetection(originals=2).bind([str(tmp_path / "others"), "none", str(tmp_path / "more")], EvalContext())
    assert {name: side["images"] for name, side in bound.data.items()} == {
        "copies": 30,
        "originals": 2,
        "distractors": 2,
        "whitening": 6,
    }


def test_a_copy_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    bound = CopyDetection().bind([write(tmp_path, OFFICIAL)], EvalContext())
    (tmp_path / "strong/200002.jpg").write_bytes(b"gone")
    (tmp_path / "original/200000.jpg").write_bytes(b"gone")  # the first: the rows behind it must stay where they are
    scores = bound.pixel_reference()
    assert sorted(skip["name"] for skip in scores.details["skipped"]) == ["original/200000.jpg", "strong/200002.jpg"]
    places = scores.details["place of the original"]
    assert "strong/200002.jpg" not in places
    assert places["strong/200113.jpg"] == 0  # of 200100, the only one left
    assert places["jpeg/3/200001.jpg"] == 1  # of the broken one: the last of two
