"""Copydays: layout, errors for other layouts, and distorted copies of other images."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from dino_ssl.data.benchmarks.copydays import DistortedCopies, distort, find_copies, make_copies
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms import distortions
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.copy_detection import CopyDetection, synthetic_copies

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
    """Write images whose texture depends on the group, the first four characters of the name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(list(Path(name).stem[:4].encode()))
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / name), cv2.resize(coarse, (20, 16), interpolation=cv2.INTER_NEAREST))
    return folder


def open_copies(folder: Path, names: list[str]):
    return find_copies(Folder(path=str(write(folder, names))).open())


@pytest.mark.parametrize("prefix", ["", "copydays_"])
def test_the_official_layout(tmp_path: Path, prefix: str) -> None:
    copies = open_copies(tmp_path, [prefix + name for name in OFFICIAL])
    assert copies is not None
    assert [name[-10:] for name in copies.originals.names] == ["200000.jpg", "200100.jpg"]
    copies_by_block = {
        (block, strength, copies.copies.names[q][-10:]): int(copies.original_of[q])
        for q, (block, strength) in enumerate(copies.blocks)
    }
    assert copies_by_block == {
        ("crops", "10", "200000.jpg"): 0,
        ("crops", "80", "200101.jpg"): 1,
        ("jpeg", "3", "200001.jpg"): 0,
        ("strong", "", "200002.jpg"): 0,
        ("strong", "", "200113.jpg"): 1,
    }


def test_the_authors_name_of_jpeg_is_known_and_unknown_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [name.replace("jpeg/", "jpegqual/") for name in OFFICIAL]
    copies = open_copies(tmp_path, names)
    assert copies is not None
    assert ("jpeg", "3") in copies.blocks
    assert not caplog.messages
    with caplog.at_level("WARNING", "dino_ssl"):
        assert open_copies(tmp_path, ["zoom/3/200001.jpg"]) is not None
    assert "ignored the images in zoom/3. Expected:" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ["cat/1.jpg", "dog/2.jpg"],
        ["000001.jpg", "000100.jpg", "005000.jpg"],  # names of VOC 2007
        ["original/cat.jpg", "original/dog.jpg"],
        ["jpeg/cat.jpg", "png/dog.jpg"],
    ],
)
def test_other_folders_are_not_copydays(tmp_path: Path, names: list[str]) -> None:
    assert open_copies(tmp_path, names) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (OFFICIAL[2:], "5 images have .* no original"),
        (OFFICIAL[:2], "Found 0 copies"),
        ([*OFFICIAL, "strong/200250.jpg"], r"1 images have .* no original .* strong/200250\.jpg"),
        ([*OFFICIAL, "strong/cat.jpg"], "1 images have no name of six digits, .* strong/cat.jpg"),
        ([*OFFICIAL, "original/200001.jpg"], "1 images .* original/200001.jpg"),
        ([*OFFICIAL, "original/b/200000.jpg"], "originals with the same first four digits"),
    ],
)
def test_errors_show_the_expected_layout(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message + r"[\s\S]*original/ +200000\.jpg"):
        open_copies(tmp_path, names)


def test_copies_are_a_function_of_the_seed() -> None:
    dataset, pages = Scenes(count=3, size=40).open(), Scenes(count=2, size=24, part="val").open()
    copies = DistortedCopies(dataset, pages, seed=1)
    assert len(copies) == 45
    images = [copies.read(i) for i in range(len(copies))]
    assert [image.shape[1::-1] for image in images] == [tuple(size) for size in copies.sizes.tolist()]
    again = pickle.loads(pickle.dumps(DistortedCopies(dataset, pages, seed=1)))
    for i in (44, 0, 20, 3):
        np.testing.assert_array_equal(again.read(i), images[i])
    other = DistortedCopies(dataset, pages, seed=2)
    assert not np.array_equal(other.read(4), images[4])
    assert len({copies.content_key, other.content_key, copies.fingerprint, other.fingerprint}) == 4
    assert len({image.tobytes() for image in images}) == 45
    repeated = DistortedCopies(dataset.subset([0, 0]), pages.subset([0]), seed=1)
    random_kinds = [
        i for i, (_, kind) in enumerate(repeated.items) if kind in ("crop_50", "strong_rotate", "strong_paste")
    ]
    assert not any(np.array_equal(repeated.read(i), repeated.read(i + 15)) for i in random_kinds if i < 15)


def test_blocks_are_named_as_in_copydays() -> None:
    copies = distort(Scenes(count=2, size=24).open(), Scenes(count=1, size=24, part="val").open(), None)
    assert {block for block, _ in copies.blocks} == {"crops", "jpeg", "strong"}
    assert copies.original_of.tolist() == [0] * 15 + [1] * 15
    assert ("strong", "paste") in copies.blocks


@pytest.mark.parametrize(("count", "originals", "expected"), [(4, 100, 2), (40, 10, 10), (12, 100, 6)])
def test_originals_pages_and_others_are_disjoint(count: int, originals: int, expected: int) -> None:
    dataset = Scenes(count=count, size=16).open()
    copies = make_copies(dataset, originals)
    assert isinstance(copies.copies, DistortedCopies)
    assert copies.others is not None
    parts = [copies.originals.names, copies.copies.pages.names, copies.others.names]
    assert len(parts[0]) == expected
    assert all(parts)
    assert sorted(name for part in parts for name in part) == sorted(dataset.names)
    assert make_copies(dataset, originals).originals.names == parts[0]
    with pytest.raises(UserError, match="at least 4"):
        make_copies(dataset.subset(range(3)), 10)


def test_synthetic_sets_are_disjoint() -> None:
    copies, whitening = synthetic_copies(Scenes(count=4, size=16, part="test"))
    assert isinstance(copies.copies, DistortedCopies)
    assert copies.others is not None
    names = [*copies.originals.names, *copies.copies.pages.names, *copies.others.names, *whitening.names]
    assert len(set(names)) == len(names) == 4 + 4 + 16 + 20


def test_a_folder_with_distractors_and_whitening(tmp_path: Path) -> None:
    write(tmp_path / "copydays", OFFICIAL)
    Scenes(count=5, size=16).write(tmp_path / "others")
    Scenes(count=6, size=16, part="val").write(tmp_path / "more")
    prepared = CopyDetection().prepare([tmp_path / n for n in ("copydays", "others", "more")], EvalContext())
    assert {name: side["images"] for name, side in prepared.data.items()} == {
        "copies": 5,
        "originals": 2,
        "distractors": 5,
        "whitening": 6,
    }
    prepared = CopyDetection(originals=2).prepare(
        [str(tmp_path / "others"), "none", str(tmp_path / "more")], EvalContext()
    )
    assert {name: side["images"] for name, side in prepared.data.items()} == {
        "copies": 30,
        "originals": 2,
        "distractors": 2,
        "whitening": 6,
    }


def test_unreadable_copies_are_skipped_and_listed(tmp_path: Path) -> None:
    prepared = CopyDetection().prepare([write(tmp_path, OFFICIAL)], EvalContext())
    (tmp_path / "strong/200002.jpg").write_bytes(b"gone")
    (tmp_path / "original/200000.jpg").write_bytes(b"gone")  # the first: the later rows keep their indices
    scores = prepared.references["raw_pixels"]()
    assert sorted(skip["name"] for skip in scores.details["skipped"]) == ["original/200000.jpg", "strong/200002.jpg"]
    ranks = scores.details["rank of the original"]
    assert "strong/200002.jpg" not in ranks
    assert ranks["strong/200113.jpg"] == 0  # its original 200100 is the only one left
    assert ranks["jpeg/3/200001.jpg"] == 1  # its original is broken: last of two


def test_distortions_are_as_strong_as_their_names() -> None:
    rng, image = np.random.default_rng(0), Scenes(size=128).read(3)
    copies = distortions.copies(image, rng, into=Scenes(size=128).read(4))
    assert {name.split("_")[0] for name in copies} == {"crop", "jpeg", "strong"}
    for lost in (10, 50, 80):
        h, w, _ = copies[f"crop_{lost}"].shape
        assert 1 - h * w / 128**2 == pytest.approx(lost / 100, abs=0.02)
    errors = [np.abs(copies[f"jpeg_{q}"].astype(float) - image).mean() for q in (75, 30, 15, 8, 3)]
    assert errors == sorted(errors)
    assert errors[-1] > 2 * errors[0]
    np.testing.assert_array_equal(copies["strong_mirror"][:, ::-1], image)
    pasted = distortions.paste(image, np.zeros((128, 128, 3), np.uint8), rng, share=0.25)
    assert (pasted.max(axis=-1) > 0).mean() == pytest.approx(0.25, abs=0.01)
