"""dino duplicates: lists, a page, and files that are moved and moved back."""

import csv
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest

import dino_ssl
from dino_ssl.search import deduplicate, moves
from dino_ssl.search.calibration import Calibration
from dino_ssl.search.moves import undo_moves

ODD = os.fsencode("two\nlines \u202e") + b"\xff.jpg"


@pytest.fixture(scope="session")
def collection(photos: Path, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with a copy in another folder, the same pixels in another format, and a JPEG of one."""
    folder = tmp_path_factory.mktemp("collection")
    shutil.copytree(photos, folder / "photos")
    images = sorted((folder / "photos").rglob("*.png"))
    images = [path for path in images if path.stat().st_size]
    (folder / "photos" / "copies").mkdir()
    shutil.copy(images[0], os.fsencode(folder / "photos" / "copies") + b"/" + ODD)
    pixels = cv2.imread(str(images[1]))
    assert pixels is not None
    cv2.imwrite(str(folder / "photos" / "copies" / "same.bmp"), pixels)
    cv2.imwrite(str(folder / "photos" / "copies" / "small.jpg"), pixels[::2, ::2])
    dino_ssl.Index.build(trained[0], folder / "photos", path=folder / "photos.idx")
    return folder


@pytest.fixture
def index(collection: Path, tmp_path: Path) -> Path:
    """A copy of the collection, with its times, in the working directory."""
    shutil.copytree(collection, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "photos.idx" / "index.json"
    info.write_text(info.read_text().replace(str(collection), str(tmp_path)))
    return info.parent


def files(folder: Path) -> dict[bytes, bytes]:
    return {
        os.path.relpath(os.fsencode(path), os.fsencode(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_duplicates_are_listed_by_tier_in_every_form(dino, index: Path) -> None:
    """The threshold is measured once, and kept until the images change."""
    ran = dino("duplicates", index, "--html", "d.html", "--csv", "d.csv", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["calibration"]["precision"] >= 0.99
    assert result["threshold"] == result["calibration"]["threshold"]
    assert "edited copies at a precision of" in ran.err
    tiers = {copy["name"]: copy["tier"] for group in result["groups"] for copy in group["copies"]}
    kept = {group["keep"] for group in result["groups"]}
    (odd,) = (name for name in kept if "two" in name)  # of equal size, the first by name is kept
    assert {odd, "copies/same.bmp"} <= kept  # the largest file
    assert tiers.get("copies/small.jpg") in ("hash", "features")
    assert result["counts"]["bytes"] == result["counts"]["pixels"] == 1
    with open("d.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {*tiers, *kept}
    assert all((row["name"] in kept) == (row["action"] == "keep") for row in rows)
    page = Path("d.html").read_text()
    assert page.count("<figure") == len(rows)
    assert page.count(">keep</em>") == len(kept)
    assert "\u202e" not in page

    before = (index / "duplicates.json").read_bytes()
    again = dino("duplicates", index, "--json")
    assert again.json["calibration"] == result["calibration"]
    assert (index / "duplicates.json").read_bytes() == before


def test_a_threshold_of_another_state_of_the_index_is_measured_again(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def calibrate(features: Any, *_: Any) -> Calibration:
        measured.append(len(features))
        return Calibration(threshold=0.9, precision=1.0, recall=0.5, copies=2)

    monkeypatch.setattr(deduplicate, "calibrate", calibrate)
    opened = dino_ssl.Index(index)
    assert opened.duplicates().threshold == opened.duplicates().threshold == 0.9
    assert len(measured) == 1
    (index.parent / "photos/copies/small.jpg").unlink()
    assert opened.update().duplicates().calibration
    assert measured[1] == measured[0] - 1
    assert opened.duplicates(0.5).calibration is None
    assert len(measured) == 2


def test_without_perceptual_hashes_the_tier_is_skipped_and_named(
    dino, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino_ssl.search.items.Items.perceptual_hashes", None)
    ran = dino("duplicates", index, "--threshold", "1", "--json")
    assert "hash" not in ran.json["counts"]
    assert 'that tier is skipped: pip install "dino-ssl[search]"' in ran.err.replace("\n", " ")


def test_files_are_moved_after_a_confirmation_and_moved_back(
    dino, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(Path("photos"))
    move = ("duplicates", index, "--threshold", "1", "--move", "removed")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    ran = dino(*move)
    assert ran.code == 2
    assert "Add --yes to move them" in ran.err

    questions: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    ran = dino(*move, "--json")
    assert ran.json["moved"] == 0
    copies = {copy["name"] for group in ran.json["groups"] for copy in group["copies"]}
    assert questions[0].startswith(f"Move {len(copies)} images (")
    assert files(Path("photos")) == before
    assert not Path("removed").exists()

    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert dino(*move, "--json").json["moved"] == len(copies)
    moved, left = files(Path("removed")), files(Path("photos"))
    assert len(left) == len(before) - len(copies)
    assert all(before[name] == moved[name] for name in before.keys() - left.keys())
    assert dino(*move, "--yes", "--json").json["moved"] == 0  # the index still lists them, but they are gone

    ran = dino("duplicates", index, "--undo", "removed", "--json")
    assert ran.json == {"moved": len(copies), "stay": []}
    assert files(Path("photos")) == before
    assert not Path("removed").exists()


def test_files_that_changed_stay(index: Path) -> None:
    """Whatever is moved, the image to keep must exist as it was indexed."""
    opened = dino_ssl.Index(index)
    result = opened.duplicates(1.0)
    (group,) = (group for group in result.groups if group.copies[0].tier == "bytes")
    keep, copy = map(opened.path_of, group.rows)
    assert keep
    assert copy

    def reasons() -> dict[Path, str]:
        plan, refused = result.plan(index.parent / "removed")
        assert len(plan) + len(refused) == len(result.copies)
        return {item.path: item.reason for item in refused}

    assert reasons() == {}
    times = copy.stat().st_mtime_ns
    os.utime(copy, ns=(0, 1))
    assert reasons() == {copy: "has changed since it was indexed"}
    os.utime(copy, ns=(0, times))
    name = opened.items.names[group.keep]
    keep.write_bytes(keep.read_bytes() + b"\0")
    assert reasons() == {copy: f"the image to keep, {name}, has changed since it was indexed"}
    keep.unlink()
    assert reasons() == {copy: f"the image to keep, {name}, is missing"}


def test_links_stay(trained: Any, photos: Path, tmp_path: Path) -> None:
    """Moving a file would break a symbolic link to it, which may be the image to keep."""
    folder = tmp_path / "links"
    folder.mkdir()
    image = next(path for path in sorted(photos.rglob("*.png")) if path.stat().st_size)
    shutil.copy(image, folder / "b.png")
    (folder / "a.png").symlink_to("b.png")
    (folder / "c.png").symlink_to("b.png")
    (folder / "d.png").hardlink_to(folder / "b.png")
    shutil.copy(image, folder / "e.png")
    result = dino_ssl.Index.build(trained[0], folder, path=tmp_path / "links.idx").duplicates(1.0, keep="first")
    plan, refused = result.plan(tmp_path / "removed")
    assert [move.source.name for move in plan] == ["e.png"]
    same = "the image to keep, a.png, is a link to it"
    assert {item.path.name: item.reason for item in refused} == {"b.png": same, "c.png": "is a link", "d.png": same}


def test_an_interrupted_move_says_how_to_continue(dino, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, original = files(Path("photos")), moves._move
    count = iter(range(9))

    def interrupted(*arguments: Any) -> None:
        if next(count) == 1:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(moves, "_move", interrupted)
    move = ("duplicates", index, "--threshold", "1", "--move", "removed", "--yes")
    ran = dino(*move)
    assert ran.code == 130
    assert "Interrupted. The same command continues, --undo removed moves back what was moved." in ran.out
    assert len(files(Path("photos"))) == len(before) - 1
    assert dino(*move, "--json").json["moved"] == 2
    undo_moves(Path("removed"))
    assert files(Path("photos")) == before
