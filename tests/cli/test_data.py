"""dino data pack, info, check; and shards in place of a folder in other commands."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from dino_ssl.data import shard_writer
from dino_ssl.data.folder import Folder
from dino_ssl.models.vit import ViT
from dino_ssl.models.weights import save_backbone
from dino_ssl.terminal import Terminal


@pytest.fixture
def shards(dino, photos: Path) -> Path:
    ran = dino("data", "pack", photos, "-o", "shards")
    assert ran.code == 0, ran.err
    return Path("shards")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_help_has_examples(dino) -> None:
    for words in (("data",), ("data", "--help"), ("data", "pack", "--help"), ("data", "check", "--help")):
        ran = dino(*words)
        assert ran.code == 0
        assert "dino data pack photos/ -o photos-shards" in ran.out
    ran = dino("data", "pakc")
    assert ran.code == 2
    assert "did you mean 'pack'" in ran.err


def test_pack_prints_the_content_and_does_nothing_the_second_time(dino, photos: Path) -> None:
    first = dino("data", "pack", photos, "-o", "shards", "--json")
    assert first.code == 0, first.err
    folder = Folder(path=str(photos)).open()
    assert first.json["images"] == 40
    assert first.json["classes"] == folder.classes
    assert first.json["skipped"] == [item._asdict() for item in folder.skipped]
    assert first.json["fingerprint"] == folder.fingerprint
    before = {path.name: path.stat().st_mtime_ns for path in Path("shards").iterdir()}
    assert dino("data", "pack", photos, "-o", "shards", "--json").json == first.json
    assert {path.name: path.stat().st_mtime_ns for path in Path("shards").iterdir()} == before
    assert dino("data", "info", "shards", "--json").json == first.json
    printed = dino("data", "info", "shards").out
    for text in ("40, median short side 40 pixels", "the folder's files, unchanged", "star/empty.png: empty file"):
        assert text in printed


def test_pack_with_side_and_the_default_directory(dino, photos: Path) -> None:
    ran = dino("data", "pack", photos, "--side", "30", "--quality", "80", "--shard-size", "0.01")
    assert ran.code == 0, ran.err
    assert "short side of at most 30, as JPEG of quality 80" in ran.out
    dataset = Folder(path=f"{photos.name}-shards").open()
    assert dataset.short_side == 30
    assert len(list(Path(f"{photos.name}-shards").glob("*.tar"))) > 3


def test_an_interrupted_command_resumes(dino, photos: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_index", stop)
        ran = dino("data", "pack", photos, "-o", "again")
    assert ran.code == 130
    ran = dino("train", "again")
    assert ran.code == 2
    assert "again is incomplete" in ran.err
    assert dino("data", "pack", photos, "-o", "again").code == 0
    assert contents(Path("again")) == contents(shards)


def test_a_killed_process_resumes(dino, photos: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_index", lambda *_: os._exit(9))
        if os.fork() == 0:
            dino("data", "pack", photos, "-o", "again")
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    assert Path("again.part/info.json").exists()
    assert dino("data", "pack", photos, "-o", "again").code == 0
    assert contents(Path("again")) == contents(shards)


def test_check_lists_damaged_images(dino, shards: Path) -> None:
    ran = dino("data", "check", shards)
    assert ran.code == 0
    assert "all 40 images are intact" in ran.out
    tar = shards / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 255
    tar.write_bytes(data)
    ran = dino("data", "check", shards, "--json")
    name = Folder(path=str(shards)).open().names[0]
    assert ran.code == 2
    assert json.loads(ran.out)["damaged"] == [f"{name}: wrong checksum in shard-000000.tar"]
    assert "1 of 40 images" in ran.err


def test_progress_is_shown(dino, photos: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list] = {}

    def progress(_self, label):
        return nullcontext(lambda *args: calls.setdefault(label, []).append(args))

    monkeypatch.setattr(Terminal, "progress", progress)
    assert dino("data", "pack", photos, "-o", "other").code == 0
    assert dino("data", "check", shards).code == 0
    assert calls["packing"][-40:] == [(done, 40) for done in range(1, 41)]
    assert calls["checking"][-1] == (40, 40)


def test_shards_replace_a_folder_in_other_commands(dino, photos: Path, tmp_path: Path) -> None:
    network, run, few = ViT(width=24, depth=1, heads=1, patch=8, image_size=32), "net.safetensors", tmp_path / "few"
    save_backbone(network, network.build().state_dict(), Path(run))
    for name in ("star", "ring"):
        (few / name).mkdir(parents=True)
        (few / name / "1.png").symlink_to(min(photos.rglob("*.png")))
    assert dino("data", "pack", few).code == 0
    for words in (("embed", run, "few-shards", "-o", "a.csv"), ("embed", run, few, "-o", "b.csv")):
        ran = dino(*words)
        assert ran.code == 0, ran.err
    assert Path("a.csv").read_text() == Path("b.csv").read_text()
    ran = dino("attention", run, "few-shards", "-o", "maps", "--size", "32")
    assert ran.code == 0, ran.err
    assert {"star/1", "ring/1"} <= {str(path.relative_to("maps").parent) for path in Path("maps").rglob("*.png")}


def test_impossible_commands_are_explained(dino, photos: Path, shards: Path) -> None:
    for words, text in (
        (("data", "pack", "nowhere"), "nowhere"),
        (("data", "pack", photos, "-o", shards, "--side", "20"), "was begun with other settings: --side was None"),
        (("data", "pack", photos, "-o", photos), "was not written by"),
        (("data", "pack", photos, "-o", "x", "--side", "0"), "--side must be at least 1"),
        (("data", "pack", photos, "-o", "x", "--quality", "0"), "--quality must be at least 1 and at most 100"),
        (("data", "info", photos), "has no tar shards"),
        (("data", "check", "nowhere"), "There is no file or folder nowhere"),
        (("train", shards / "shard-000000.tar"), "got the file"),
    ):
        ran = dino(*words)
        assert ran.code == 2, words
        assert text in ran.err
        assert "Traceback" not in ran.err
