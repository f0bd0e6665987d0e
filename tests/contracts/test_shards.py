"""Tar shards give what their folder gives, wherever packing was stopped; damage is reported by name."""

import errno
import gc
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from PIL import Image

from dino_ssl.data import shard_writer, shards
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode
from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import train_batches
from dino_ssl.data.shard_writer import downscale, pack
from dino_ssl.data.shards import PackSettings, ShardDataset, open_shards
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError

RNG = np.random.default_rng(0)
SMALL = PackSettings(shard_size=0.006)
"""A few images a shard."""


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def jpeg(*shape: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(*shape)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of many kinds in two class folders, and files that are not images."""
    root = tmp_path_factory.mktemp("data") / "my photos"
    for name in ("cat", "dög"):
        (root / name).mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    Image.fromarray(noise(40, 50, 3)).save(root / "cat" / "a.b.jpg")
    Image.fromarray(noise(30, 60, 3)).save(root / "cat" / "b turned.jpeg", exif=exif)
    Image.fromarray(noise(30, 30, 4)).save(root / "cat" / "b.png")
    Image.fromarray(noise(20, 30, 2).view(np.uint16)[..., 0]).save(root / "cat" / "deep.png")
    Image.fromarray(noise(40, 40)).convert("P").save(root / "dög" / "c.gif")
    Image.fromarray(noise(40, 40, 3)).convert("CMYK").save(root / "dög" / "ink.tiff")
    Image.fromarray(noise(36, 44, 3)).save(root / "dög" / "Z.WEBP", lossless=True)
    Image.fromarray(noise(90, 120, 3) // np.array([1, 2, 4], np.uint8)).save(root / "dög" / "large.png")  # reddish
    (root / "dög" / "empty.jpg").touch()
    (root / "cat" / "page.jpg").write_text("<html>")
    (root / "notes.txt").touch()
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    return root


@pytest.fixture
def photos(album: Path, tmp_path: Path) -> Path:
    """The same images, free to be changed."""
    return Path(shutil.copytree(album, tmp_path / "photos", symlinks=True))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flip_byte(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def assert_same(actual: ImageDataset, expected: ImageDataset) -> None:
    for name in ("names", "classes", "skipped", "fingerprint", "short_side"):
        assert getattr(actual, name) == getattr(expected, name), name
    np.testing.assert_array_equal(actual.sizes, expected.sizes)
    np.testing.assert_array_equal(np.asarray(actual.labels), np.asarray(expected.labels))
    for index, name in enumerate(expected.names):
        for times in (1, 2):
            images = (dataset.read_downscaled(index, times) for dataset in (actual, expected))
            np.testing.assert_array_equal(*images, err_msg=name)


# -- shards of a folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [PackSettings(), SMALL], ids=["one shard", "several shards"])
def test_shards_equal_their_folder(album: Path, tmp_path: Path, settings: PackSettings) -> None:
    folder, dataset = Folder(path=str(album)).open(), pack(album, tmp_path / "out", settings)
    assert (len(folder), len(folder.skipped)) == (8, 3)
    assert (len(dataset.shards) > 2) == (settings is SMALL)
    assert_same(dataset, folder)
    assert_same(Folder(path=str(tmp_path / "out")).open(), folder)
    assert_same(pickle.loads(pickle.dumps(dataset)), folder)
    assert len(pickle.dumps(dataset)) < 500  # other processes open it by its path
    for part, folder_part in zip(dataset.split(0.3, 1), folder.split(0.3, 1), strict=True):
        assert_same(part, folder_part)
    assert {path.name for path in dataset.path.iterdir()} == {"info.json", "index.arrow", *dataset.shards}


def test_without_class_folders_there_are_no_labels(album: Path, tmp_path: Path) -> None:
    dataset = pack(album / "cat", tmp_path / "out")
    assert dataset.labels is None
    assert dataset.fingerprint == Folder(path=str(album / "cat")).open().fingerprint
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert not [name for name in tar.getnames() if name.endswith("cls")]


def test_names_that_are_not_utf8_are_kept(photos: Path, tmp_path: Path) -> None:
    try:
        os.rename(os.fsencode(photos / "cat/b.png"), os.fsencode(photos) + b"/cat/\xff\xfe.png")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert_same(pack(photos, tmp_path / "out"), Folder(path=str(photos)).open())


def test_any_position_of_an_epoch_gives_the_same_batches(album: Path, tmp_path: Path) -> None:
    """Also in worker processes, and if the epoch is resumed in the middle."""
    views = MultiCrop(global_size=24, local_size=16, local=2)
    folder, dataset = Folder(path=str(album)).open(), pack(album, tmp_path / "out", SMALL)
    expected = list(train_batches(folder, views, batch_size=3, seed=5, epochs=2, workers=0))
    assert len(expected) == 4
    for start, workers in ((0, 2), (1, 0), (3, 0)):
        steps = list(
            train_batches(dataset, views, batch_size=3, seed=5, epochs=2, workers=workers, clock_start=divmod(start, 2))
        )
        for step, other in zip(steps, expected[start:], strict=True):
            assert step[:2] == other[:2]
            for tensor, other_tensor in zip(step.batch.views, other.batch.views, strict=True):
                assert torch.equal(tensor, other_tensor)


def test_an_image_that_fails_to_decode_is_treated_as_in_the_folder(photos: Path, tmp_path: Path) -> None:
    """Its header is correct and its content is not; with `side` too."""
    flip_byte(photos / "dög/large.png", (photos / "dög/large.png").stat().st_size // 2)
    datasets = [
        Folder(path=str(photos)).open(),
        pack(photos, tmp_path / "a"),
        pack(photos, tmp_path / "b", PackSettings(side=40)),
    ]
    for dataset in datasets:
        assert len(dataset) == 8
        with pytest.raises(BadImage, match="checksum"):
            dataset.read(list(dataset.names).index("dög/large.png"))


def test_the_index_is_arrow_and_mapped(album: Path, tmp_path: Path) -> None:
    dataset, allocated = pack(album, tmp_path / "out", SMALL), pa.total_allocated_bytes()
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "out" / "index.arrow"))).read_all()
    assert set(table.column_names) == {"shard", "offset", "length", "size", "label", "crc32", "path"}
    assert table["path"].to_pylist() == list(dataset.names)
    assert pa.total_allocated_bytes() == allocated  # mapped, not read
    assert table.schema.metadata == {b"format_version": b"2"}
    torch.from_numpy(dataset.labels).add_(1)  # writable, as torch requires


def test_files_are_closed_and_few_are_open(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    dataset = pack(album, tmp_path / "out", SMALL)
    for index in range(len(dataset)):
        dataset.read(index)
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # a shard, and the mapped index
    del dataset
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_prefetch_advises_in_the_order_of_the_disk(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pack(album, tmp_path / "out")
    advised: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advised.append(args[1:]))
    dataset.prefetch(np.array([5, 0, 3]))
    assert advised == [(*dataset._location(i)[1:], os.POSIX_FADV_WILLNEED) for i in (0, 3, 5)]


def test_threads_may_read_while_shards_leave_the_cache(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 1)
    dataset = pack(album, tmp_path / "out", SMALL)
    with ThreadPoolExecutor(8) as pool:
        for index, data in enumerate(pool.map(dataset.encoded, 200 * list(range(8)))):
            assert data == (album / dataset.names[index % 8]).read_bytes()


# -- smaller images ------------------------------------------------------------------------------------------


def test_side_downscales_large_images_only(album: Path, tmp_path: Path) -> None:
    folder, dataset = Folder(path=str(album)).open(), pack(album, tmp_path / "out", PackSettings(side=36, quality=90))
    assert dataset.names == folder.names
    for index, name in enumerate(folder.names):
        before, after = folder.sizes[index], dataset.sizes[index]
        assert dataset.read(index).shape[1::-1] == tuple(after)
        if min(before) <= 36:
            assert dataset.encoded(index) == (album / name).read_bytes()
        else:
            assert min(after) == 36
            assert after[0] / after[1] == pytest.approx(before[0] / before[1], rel=0.03)
            assert Image.open(io.BytesIO(dataset.encoded(index))).format == "JPEG"
            difference = dataset.read(index).astype(float).mean((0, 1)) - folder.read(index).mean((0, 1))
            assert abs(difference).max() < 3  # the order of the colours is kept


def test_downscaling_averages_areas() -> None:
    stripes = np.where((np.arange(64) + 1) // 2 % 2, 254, 0).astype(np.uint8)
    data, size = downscale(np.broadcast_to(stripes[:, None], (64, 64, 3)).copy(), PackSettings(side=16, quality=100))
    assert size == (16, 16)
    assert np.abs(decode("stripes", data).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("wrong", [dict(side=0), dict(quality=0), dict(quality=101), dict(shard_size=0.0)])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="must be"):
        PackSettings(**wrong)


# -- stopped and resumed -------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Raised in place of SIGKILL."""


class Killer:
    """Stops in call number `calls` that changes the disk; no later call reaches the disk."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: int) -> None:
        self.left, self.stopped = calls, False
        for module, name in (
            (os, "replace"),
            (os, "rename"),
            (os, "fsync"),
            (os, "unlink"),
            (tarfile.TarFile, "addfile"),
        ):
            patch.setattr(module, name, self.around(getattr(module, name)))

    def around(self, call):
        def wrapped(*args, **kwargs):
            self.left -= 1
            self.stopped = self.stopped or self.left < 0
            if self.stopped:
                raise Stopped
            return call(*args, **kwargs)

        return wrapped


def test_packing_that_is_killed_anywhere_resumes_with_the_same_result(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(pack(album, tmp_path / "complete", SMALL).path)
    calls, stopped = 0, True
    while stopped:
        out = tmp_path / f"{calls}"
        with monkeypatch.context() as patch:
            killer = Killer(patch, calls)
            try:
                pack(album, out, SMALL)
            except Stopped:
                assert not out.exists()
                with pytest.raises(UserError, match="incomplete"):
                    Folder(path=str(out)).open()
        stopped = killer.stopped
        assert contents(pack(album, out, SMALL).path) == expected, f"after {calls} calls"
        calls += 3
    assert calls > 30
    assert not list(tmp_path.glob("*.part"))


def test_resuming_keeps_complete_shards_and_replaces_damaged_ones(album: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    def stop(done: int, total: int) -> None:
        if (done, total) == (6, 8):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(album, out, SMALL, stop)
    complete = sorted(Path(f"{out}.part").glob("*.tar"))
    assert len(complete) > 1
    complete[1].write_bytes(complete[1].read_bytes()[:1500])
    first = complete[0].stat().st_mtime_ns
    pack(album, out, SMALL, lambda *args: seen.append(args))
    assert (out / complete[0].name).stat().st_mtime_ns == first
    assert contents(out) == contents(pack(album, tmp_path / "again", SMALL).path)


def test_a_full_disk_is_reported_and_complete_shards_are_kept(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addfile, added = tarfile.TarFile.addfile, []

    def nearly_full(self, member, file) -> None:
        added.append(member)
        if len(added) > 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        addfile(self, member, file)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", nearly_full)
        with pytest.raises(UserError, match="disk is full: free some space and run the same command again"):
            pack(album, tmp_path / "out", SMALL)
    assert (tmp_path / "out.part" / "shard-000000.tar").exists()
    assert not list((tmp_path / "out.part").glob(".*"))
    pack(album, tmp_path / "out", SMALL)


@pytest.mark.parametrize("complete", [False, True])
def test_a_changed_folder_or_other_settings_are_refused(photos: Path, tmp_path: Path, complete: bool) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if total == 8 and done == 7 and not complete:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        pack(photos, out, SMALL, stop)
    before = contents(out if complete else Path(f"{out}.part"))
    with pytest.raises(UserError, match="`side` was None and is 20"):
        pack(photos, out, PackSettings(shard_size=0.006, side=20))
    os.utime(photos / "cat" / "b.png", ns=(0, 0))
    with pytest.raises(UserError, match="have changed since"):
        pack(photos, out, SMALL)
    assert contents(out if complete else Path(f"{out}.part")) == before


def test_a_file_that_is_removed_before_it_is_packed_stops_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(done: int, total: int) -> None:
        if total == 8:  # after the folder was listed
            (photos / "dög" / "c.gif").unlink(missing_ok=True)

    monkeypatch.setattr(shard_writer, "THREADS", 1)  # four images ahead
    with pytest.raises(UserError, match=r"changed while they were packed"):
        pack(photos, tmp_path / "out", SMALL, change)
    assert not (tmp_path / "out").exists()


# -- damage --------------------------------------------------------------------------------------------------


def test_damage_of_every_image_and_of_the_index_is_found(photos: Path, tmp_path: Path) -> None:
    dataset = pack(photos, tmp_path / "out", SMALL)
    assert list(dataset.damaged()) == [None] * 9
    for index in range(len(dataset)):
        shard, offset, length = dataset._location(index)
        file = dataset.path / dataset.shards[shard]
        for position in (offset, offset + length - 1):
            flip_byte(file, position)
            assert list(filter(None, dataset.damaged())) == [f"{dataset.names[index]}: wrong checksum in {file.name}"]
            with pytest.raises(BadImage, match="wrong checksum"):
                dataset.read(index)
            flip_byte(file, position)
    flip_byte(dataset.path / "index.arrow", (dataset.path / "index.arrow").stat().st_size // 2)
    assert "index.arrow: wrong checksum" in list(dataset.damaged())


def test_training_skips_a_damaged_image_and_lists_it(photos: Path, tmp_path: Path) -> None:
    dataset = pack(photos, tmp_path / "out")
    flip_byte(dataset.path / dataset.shards[0], 600)
    offsets = dataset.index["offset"].to_pylist()
    offsets[3] = 2**60
    dataset.index = dataset.index.set_column(1, "offset", pa.array(offsets))
    (step,) = train_batches(dataset, MultiCrop(global_size=16, local=0), batch_size=8, seed=0, epochs=1)
    assert sorted((item.name, item.reason) for item in step.skipped) == [
        (dataset.names[0], "wrong checksum in shard-000000.tar"),
        (dataset.names[3], "index.arrow is damaged"),
    ]
    assert step.batch.views[0].shape[1] == 6


def test_incomplete_directories_are_refused(photos: Path, tmp_path: Path) -> None:
    out = pack(photos, tmp_path / "out").path
    originals, info = contents(out), json.loads((out / "info.json").read_text())
    index = originals["index.arrow"]
    offsets = pa.ipc.open_file(index).read_all()["path"].chunk(0).buffers()[1].to_pybytes()
    wrong_offset = index.replace(offsets, offsets[:8] + (2**50).to_bytes(8, "little") + offsets[16:])
    for name, data, message in (
        ("shard-000000.tar", originals["shard-000000.tar"][:-7], "shard-000000.tar: expected .* bytes, got"),
        ("info.json", json.dumps(info | {"format": 1}).encode(), "format version 1, expected 2. Remove it"),
        ("info.json", b"{", "info.json is damaged"),
        ("index.arrow", index[:200], "index.arrow is damaged"),
        ("index.arrow", index.replace(b"crc32", b"crc33"), "index.arrow is damaged"),
        ("index.arrow", wrong_offset, "index.arrow is damaged"),
    ):
        (out / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            Folder(path=str(out)).open()
        (out / name).write_bytes(originals[name])
    for path, message in ((photos, "has no tar shards"), (tmp_path / "nowhere", "has no tar shards")):
        with pytest.raises(UserError, match=message):
            open_shards(path)
    with pytest.raises(UserError, match="not written by"):
        pack(photos, photos)


# -- other programs ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset closes its files when they are collected
def test_tar_and_webdataset_read_our_shards(album: Path, tmp_path: Path) -> None:
    dataset = pack(album, tmp_path / "out", SMALL)
    urls = [str(dataset.path / name) for name in dataset.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()
    assert len({sample["__key__"] for sample in samples}) == len(dataset)
    for index, sample in enumerate(samples):
        description = json.loads(sample["json"])
        assert description["path"] == dataset.names[index]
        assert description["class"] == dataset.classes[int(sample["cls"])] == dataset.names[index].split("/")[0]
        (extension,) = (key for key in sample if not key.startswith("__") and key not in ("cls", "json"))
        assert sample[extension] == (album / dataset.names[index]).read_bytes()
    assert "jpg" in samples[1]  # the file is .jpeg
    listing = subprocess.run(["tar", "tf", urls[0]], capture_output=True, text=True, check=True).stdout.split()
    assert listing[:3] == ["000000000.jpg", "000000000.cls", "000000000.json"]


def write_webdataset(directory: Path, count: int = 10) -> list[dict]:
    directory.mkdir()
    samples = [{"__key__": f"a/{n:03}", "jpg": jpeg(20 + n, 30, 3), "cls": 3 * (n % 4)} for n in range(count)]
    samples[2] |= {"jpg": b"not an image", "seg.png": b"ignored"}
    samples[3].pop("cls")
    with webdataset.ShardWriter(f"{directory}/train-%03d.tar", maxcount=4, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return samples


def test_shards_written_by_webdataset_are_a_dataset(tmp_path: Path) -> None:
    samples = write_webdataset(tmp_path / "wds")
    dataset = Folder(path=str(tmp_path / "wds")).open()
    assert isinstance(dataset, ShardDataset)
    kept = [sample for n, sample in enumerate(samples) if n != 2]
    assert dataset.classes == ["0", "3", "6", "9"]
    assert np.asarray(dataset.labels).tolist() == [sample.get("cls", -3) // 3 for sample in kept]
    assert dataset.names[0] == "train-000.tar/a/000.jpg"
    assert [item.name for item in dataset.skipped] == ["train-000.tar/a/002.jpg"]
    for index, sample in enumerate(kept):
        np.testing.assert_array_equal(dataset.read(index), decode("", sample["jpg"]))
    (step,) = train_batches(dataset, MultiCrop(global_size=16, local=0), batch_size=9, seed=0, epochs=1)
    assert not step.skipped
    assert pack(dataset.path, tmp_path / "packed").fingerprint == dataset.fingerprint


def test_the_index_of_other_shards_is_kept_and_follows_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_webdataset(tmp_path / "wds")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(Folder(path=str(tmp_path / "wds")).open()) == 9
    assert not (tmp_path / "wds" / "index.arrow").exists()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "scan_shard", None)
        dataset = Folder(path=str(tmp_path / "wds")).open()
    assert len(pickle.loads(pickle.dumps(dataset))) == 9
    (info,) = (tmp_path / "cache").rglob("info.json")
    info.write_text(json.dumps(json.loads(info.read_text()) | {"format": 1}))  # by an older version of the package
    assert len(Folder(path=str(tmp_path / "wds")).open()) == 9
    shutil.rmtree(tmp_path / "wds")
    write_webdataset(tmp_path / "wds", 12)
    assert len(Folder(path=str(tmp_path / "wds")).open()) == 11


def test_names_that_lead_out_of_a_folder_are_ignored(tmp_path: Path) -> None:
    data = jpeg(20, 30, 3)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../x.jpg", "a/../../x.jpg", "a..b/x.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert Folder(path=str(tmp_path)).open().names == ["a.tar/a..b/x.jpg"]


def test_a_truncated_tar_file_is_used_as_far_as_it_reaches(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "wds", 4)
    tar = tmp_path / "wds" / "train-000.tar"
    tar.write_bytes(tar.read_bytes()[:8000])
    dataset = Folder(path=str(tmp_path / "wds")).open()
    assert 1 <= len(dataset) < 3
    assert "incomplete tar file" in dataset.skipped[-1].reason


def test_a_folder_of_images_with_a_tar_file_stays_a_folder(photos: Path) -> None:
    (photos / "backup.tar").touch()
    assert len(Folder(path=str(photos)).open()) == 8


def test_shards_without_images_are_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("key.txt"))
    with pytest.raises(UserError, match="No usable images"):
        Folder(path=str(tmp_path)).open()
