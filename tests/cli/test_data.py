"""dino data pack, info, check; and a pack in the folder's place in other commands."""

import json
import signal
from pathlib import Path

import pytest

from dino_ssl.data import pack_writer
from dino_ssl.data.folder import Folder
from dino_ssl.terminal import Terminal

SMALL = {"labels", "sums", "data-00000"}


@pytest.fixture
def pack(dino, photos: Path) -> Path:
    ran = dino("data", "pack", photos, "-o", "photos.ds")
    assert ran.code == 0, ran.err
    return Path("photos.ds")


def test_help_teaches(dino) -> None:
    for words in (("data",), ("data", "--help"), ("data", "pack", "--help"), ("data", "check", "--help")):
        ran = dino(*words)
        assert ran.code == 0
        assert "dino data pack photos/ -o photos.ds" in ran.out
    ran = dino("data", "pakc")
    assert ran.code == 2
    assert "did you mean 'pack'" in ran.err


def test_it_says_what_it_holds_and_the_same_command_again_does_nothing(dino, photos: Path) -> None:
    first = dino("data", "pack", photos, "-o", "photos.ds", "--json")
    assert first.code == 0, first.err
    assert first.json["images"] == 40
    assert first.json["classes"] == Folder(path=str(photos)).open().classes
    assert {item["name"] for item in first.json["skipped"]} == {"star/not a picture.jpg", "star/empty.png"}
    assert first.json["fingerprint"] == Folder(path=str(photos)).open().fingerprint
    assert first.json["files"].keys() > SMALL
    before = {path.name: path.stat().st_mtime_ns for path in Path("photos.ds").iterdir()}
    again = dino("data", "pack", photos, "-o", "photos.ds", "--json")
    assert again.json == first.json
    assert "already" in again.err
    assert {path.name: path.stat().st_mtime_ns for path in Path("photos.ds").iterdir()} == before
    told = dino("data", "info", "photos.ds")
    for part in ("40, median short side 40 pixels", "the files as they are", "star/empty.png: empty file"):
        assert part in told.out
    assert dino("data", "info", "photos.ds", "--json").json == first.json


def test_the_place_without_one_is_beside(dino, photos: Path) -> None:
    ran = dino("data", "pack", photos, "--side", "30", "--quality", "80")
    assert ran.code == 0, ran.err
    assert "short side of 30, as JPEG of quality 80" in ran.out
    assert Folder(path=f"{photos.name}.ds").open().short_side == 30


def test_ctrl_c_says_how_far_it_is_and_the_same_command_goes_on(dino, photos, pack, monkeypatch) -> None:
    def stop(self: pack_writer.Writer, item: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack_writer.Writer, "skip", stop)
        ran = dino("data", "pack", photos, "-o", "again.ds")
    assert ran.code == 130
    assert "30 files are packed; the same command goes on" in ran.out
    ran = dino("data", "pack", photos, "-o", "again.ds")
    assert ran.code == 0, ran.err
    assert "Going on after 30 files." in ran.out
    for path in Path("again.ds").iterdir():
        assert path.read_bytes() == (pack / path.name).read_bytes(), path


def test_killed_it_goes_on(process, photos: Path, pack: Path, tmp_path: Path, dino) -> None:
    """A process that nobody could ask to stop."""
    with process("data", "pack", photos, "-o", "again.ds", cwd=tmp_path) as packing:
        while packing.poll() is None and not Path("again.ds.part/data-00000").exists():
            pass
        packing.send_signal(signal.SIGKILL)
        packing.communicate()
    assert dino("data", "pack", photos, "-o", "again.ds").code == 0
    for path in Path("again.ds").iterdir():
        assert path.read_bytes() == (pack / path.name).read_bytes(), path


def test_check_names_what_is_damaged(dino, pack: Path) -> None:
    ran = dino("data", "check", pack)
    assert ran.code == 0
    assert "all 40 pictures are as they were packed" in ran.out
    data = bytearray((pack / "data-00000").read_bytes())
    data[5] ^= 255
    (pack / "data-00000").write_bytes(data)
    name = Folder(path=str(pack)).open().names[0]
    ran = dino("data", "check", pack, "--json")
    assert ran.code == 2
    assert json.loads(ran.out)["damaged"] == [f"{name}: damaged in the pack: wrong check sum in data-00000"]
    assert name in ran.err
    assert "1 of 40 pictures" in ran.err


def test_long_work_shows_how_far_it_is(dino, photos: Path, pack: Path, monkeypatch) -> None:
    told: dict[str, list] = {}

    def progress(_self, label):
        from contextlib import nullcontext

        return nullcontext(lambda *both: told.setdefault(label, []).append(both))

    monkeypatch.setattr(Terminal, "progress", progress)
    assert dino("data", "pack", photos, "-o", "other.ds").code == 0
    assert dino("data", "check", pack).code == 0
    assert told["packing"] == [(done, 42) for done in range(1, 43)]
    assert told["looking at the folder"][-1] == (42, 0)
    assert told["checking"][-1] == (49, 49)


def test_a_pack_stands_where_a_folder_does(dino, trained, photos: Path, tmp_path: Path) -> None:
    """Its pictures, names and labels come out as the folder's, also where a command asks for pictures to draw."""
    run, few = trained[0], tmp_path / "few"
    for name in ("star", "ring"):
        (few / name).mkdir(parents=True)
        (few / name / "1.png").symlink_to(min(photos.rglob("*.png")))
    assert dino("data", "pack", few).code == 0
    for words in (("embed", run, "few.ds", "-o", "a.csv"), ("embed", run, few, "-o", "b.csv")):
        ran = dino(*words)
        assert ran.code == 0, ran.err
    assert Path("a.csv").read_text() == Path("b.csv").read_text()
    drawn = dino("attention", run, "few.ds", "-o", "maps", "--size", "32")
    assert drawn.code == 0, drawn.err
    assert {"star/1", "ring/1"} <= {str(path.relative_to("maps").parent) for path in Path("maps").rglob("*.png")}


def test_what_cannot_work_is_said(dino, photos: Path, pack: Path) -> None:
    for words, part in (
        (("data", "pack", "nowhere"), "nowhere is not there"),
        (("data", "pack", pack, "-o", "x.ds"), "is a pack already"),
        (("data", "pack", photos, "-o", pack, "--side", "20"), "was made with the files as they are"),
        (("data", "pack", photos, "-o", photos), "exists and is no pack"),
        (("data", "pack", photos, "-o", "x.ds", "--side", "0"), "--side must be at least 1"),
        (("data", "pack", photos, "-o", "x.ds", "--quality", "0"), "--quality must be at least 1 and at most 100"),
        (("data", "info", photos), "is no pack"),
        (("data", "check", "nowhere"), "There is no pack nowhere"),
        (("train", pack / "data-00000"), "is a file"),
    ):
        ran = dino(*words)
        assert ran.code == 2, words
        assert part in ran.err
        assert "Traceback" not in ran.err
