"""Files that are moved: none is lost or overwritten, whatever interrupts the move."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dino_ssl.errors import UserError
from dino_ssl.files import OUTPUT_MARK
from dino_ssl.search import moves
from dino_ssl.search.moves import JOURNAL, Move, move_files, undo_moves

NAMES = ["a.jpg", "sub/b.jpg", "sub/two\nlines \u2028 \udcff.jpg"]


class Killed(BaseException):
    """Stands for kill -9: no handler of the package catches it."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name!r}")
        os.utime(path, ns=(1, 12345678901))
    return tmp_path / "photos"


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file by its name, except those of the move itself."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (JOURNAL, OUTPUT_MARK)]
    return {str(path.relative_to(folder)): (path.read_text(), path.stat().st_mtime_ns) for path in files}


def planned(photos: Path, target: Path) -> list[Move]:
    return [Move(photos / name, target / name) for name in NAMES]


@pytest.fixture(params=["hard links", "no hard links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no hard links":

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("file_system")
def test_files_are_moved_with_their_folders_and_moved_back(photos: Path, tmp_path: Path) -> None:
    before = contents(photos)
    assert move_files(planned(photos, tmp_path / "moved"), tmp_path / "moved") == []
    assert contents(photos) == {}
    assert contents(tmp_path / "moved") == before
    assert undo_moves(tmp_path / "moved") == (3, [])
    assert contents(photos) == before
    assert not (tmp_path / "moved").exists()


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the process at the numbered call that changes a folder: a link, a copy, a rename or a removal."""
    calls = iter(range(1000))

    def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise Killed
        return function(*arguments, **options)

    for owner, name in ((os, "link"), (shutil, "copy2"), (Path, "rename"), (Path, "unlink")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **o: counted(original, *a, **o))


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("number", range(12))
def test_a_killed_move_loses_nothing(photos: Path, tmp_path: Path, number: int) -> None:
    """At every step: all contents exist, the same move completes, and so does its undo after a kill."""
    before, folder = contents(photos), tmp_path / "moved"
    plan = planned(photos, folder)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(number, patch)
        with suppress(Killed):
            move_files(plan, folder)
    assert set(contents(photos).values()) | set(contents(folder).values()) == set(before.values())
    left = [move for move in plan if move.source.exists()]
    if number % 2:
        assert move_files(left, folder) == []
        assert contents(folder) == before
    with pytest.MonkeyPatch.context() as patch:
        killed_at(number, patch)
        with suppress(Killed):
            undo_moves(folder)
    assert set(contents(photos).values()) | set(contents(folder).values()) == set(before.values())
    if (folder / JOURNAL).exists():
        undo_moves(folder)
    assert contents(photos) == before
    assert not folder.exists()


def test_no_file_is_overwritten(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    move_files(planned(photos, folder), folder)
    (photos / "a.jpg").write_text("new")
    (refused,) = move_files([Move(photos / "a.jpg", folder / "a.jpg")], folder)
    assert refused.reason == f"{folder / 'a.jpg'} is another file"
    count, (refused,) = undo_moves(folder)
    assert count == 2
    assert refused.reason == f"{photos / 'a.jpg'} is another file"
    assert contents(photos)["a.jpg"][0] == "new"
    assert contents(folder).keys() == {"a.jpg"}
    (photos / "a.jpg").unlink()
    assert undo_moves(folder) == (1, [])  # the journal is kept until nothing is left
    assert not folder.exists()


def test_a_link_to_the_folder_itself_is_refused(photos: Path, tmp_path: Path) -> None:
    before = contents(photos)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / OUTPUT_MARK).touch()
    (tmp_path / "moved" / JOURNAL).touch()
    (tmp_path / "moved" / "sub").symlink_to(photos / "sub")
    refused = move_files(planned(photos, tmp_path / "moved")[1:], tmp_path / "moved")
    assert [item.reason for item in refused] == ["the folder to move to is a link to its own folder"] * 2
    assert contents(photos) == before


def test_a_folder_that_cannot_be_written_keeps_its_files(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, unlink = contents(photos), Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if photos in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    refused = move_files(planned(photos, tmp_path / "moved"), tmp_path / "moved")
    assert [item.reason for item in refused] == ["Permission denied"] * 3
    assert contents(photos) == before
    assert contents(tmp_path / "moved") == {}


def test_a_folder_with_other_content_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has other content"):
        move_files(planned(photos, photos), photos)
    with pytest.raises(UserError, match=f"has no {JOURNAL}"):
        undo_moves(photos)


def test_the_journal_is_complete_before_the_first_move(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[int] = []

    def count(plan: Any, progress: Any) -> Iterator[None]:
        lines.append(len((tmp_path / "moved" / JOURNAL).read_text().splitlines()))
        return iter(())

    monkeypatch.setattr(moves, "_move_all", count)
    move_files(planned(photos, tmp_path / "moved"), tmp_path / "moved")
    assert lines == [3]


def test_a_renamed_folder_is_moved_back_and_missing_files_are_reported(photos: Path, tmp_path: Path) -> None:
    before = contents(photos)
    move_files(planned(photos, tmp_path / "moved"), tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "renamed")
    (tmp_path / "renamed/a.jpg").rename(tmp_path / "kept.jpg")
    moved, refused = undo_moves(tmp_path / "renamed")
    assert (moved, [(each.path.name, each.reason) for each in refused]) == (2, [("a.jpg", "is missing")])
    (tmp_path / "kept.jpg").rename(tmp_path / "renamed/a.jpg")
    assert undo_moves(tmp_path / "renamed") == (1, [])
    assert contents(photos) == before
    assert not (tmp_path / "renamed").exists()


def test_a_line_of_the_journal_that_was_cut_does_not_lose_the_next_one(photos: Path, tmp_path: Path) -> None:
    before, plan = contents(photos), planned(photos, tmp_path / "moved")
    move_files(plan[:1], tmp_path / "moved")
    journal = tmp_path / "moved" / JOURNAL
    journal.write_text(journal.read_text() + '{"format": 1, "sour')  # a full disk
    move_files(plan[1:], tmp_path / "moved")
    assert undo_moves(tmp_path / "moved") == (3, [])
    assert contents(photos) == before
