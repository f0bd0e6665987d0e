"""A pack gives what its folder gives, wherever it was stopped; and what is wrong with one is said by name."""

import errno
import gc
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_ssl.data import folder, listing, pack_writer, packing
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode
from dino_ssl.data.folder import Folder, FolderDataset
from dino_ssl.data.listing import Listed
from dino_ssl.data.loader import train_batches
from dino_ssl.data.pack import ARRAYS, Form, PackedDataset, digest_of, open_pack
from dino_ssl.data.packing import Packing
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many kinds in two class folders, and files that are none."""
    root = tmp_path_factory.mktemp("data") / "my photos"
    for kind in ("cat", "dög"):
        (root / kind).mkdir(parents=True)
    Image.fromarray(noise(40, 50, 3)).save(root / "cat" / "a.jpg")
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    Image.fromarray(noise(30, 60, 3)).save(root / "cat" / "b turned.jpg", exif=exif)
    Image.fromarray(noise(30, 30, 4)).save(root / "cat" / "b.png")
    Image.fromarray(noise(20, 30, 2).view(np.uint16)[..., 0]).save(root / "cat" / "deep.png")
    Image.fromarray(noise(40, 40)).convert("P").save(root / "dög" / "c.gif")
    Image.fromarray(noise(40, 40, 3)).convert("CMYK").save(root / "dög" / "ink.tiff")
    Image.fromarray(noise(36, 44, 3)).save(root / "dög" / "Z.webp", lossless=True)
    Image.fromarray(noise(90, 120, 3) // np.array([1, 2, 4], np.uint8)).save(root / "dög" / "large.png")  # reddish
    (root / "dög" / "empty.jpg").touch()
    (root / "cat" / "page.jpg").write_text("<html>")
    (root / "cat" / ".hidden.jpg").touch()
    (root / "notes.txt").touch()
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "dög" / "pipe.png")
    return root


@pytest.fixture
def photos(album: Path, tmp_path: Path) -> Path:
    """The same pictures, free to be changed, and next to nothing beside them."""
    folder = tmp_path / "photos"
    shutil.copytree(album, folder, symlinks=True, ignore=shutil.ignore_patterns("pipe.png"))
    return folder


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data files, settled parts, sorted runs and labels of a few pictures each."""
    monkeypatch.setattr(pack_writer, "FILE_BYTES", 9000)
    monkeypatch.setattr(pack_writer, "SETTLE_RECORDS", 3)
    monkeypatch.setattr(pack_writer, "BLOCK", 3)
    monkeypatch.setattr(listing, "RUN", 4)
    monkeypatch.setattr(listing, "CHUNK", 3)


def made(source: Path, out: Path, form: Form | None = None) -> PackedDataset:
    with Packing(str(source), str(out), form) as job:
        job.look()
        job.write()
    return open_pack(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(one: ImageDataset, other: ImageDataset) -> None:
    for name in ("names", "classes", "skipped", "fingerprint", "short_side"):
        assert getattr(one, name) == getattr(other, name), name
    np.testing.assert_array_equal(one.sizes, other.sizes)
    assert one.labels is not None
    assert other.labels is not None
    np.testing.assert_array_equal(one.labels, other.labels)
    for index in range(len(other)):
        np.testing.assert_array_equal(one.read(index), other.read(index), err_msg=other.names[index])
        np.testing.assert_array_equal(
            one.read_downscaled(index, 2), other.read_downscaled(index, 2), err_msg=other.names[index]
        )


# -- the pictures of the folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["one", "many"])
def test_it_gives_what_the_folder_gives(album: Path, tmp_path: Path, parts: str, request) -> None:
    if parts == "many":
        request.getfixturevalue("in_small_parts")
    source, pack = Folder(path=str(album)).open(), made(album, tmp_path / "photos.ds")
    assert isinstance(source, FolderDataset)
    assert len(source) == 8
    assert len(source.skipped) == 4
    assert_same(pack, source)
    assert pack.ignored == source.ignored == {"hidden": 1, "other": 1}
    assert (len(pack.files) > 2) == (parts == "many")
    assert {path.name for path in pack.path.iterdir()} == {"pack.json", *pack.about.files}
    assert_same(pickle.loads(pickle.dumps(pack)), source)
    assert len(pickle.dumps(pack)) < 500  # its path: a worker or a rank opens it
    assert np.isin(pack.names, source.names[2:4]).tolist() == [False] * 2 + [True] * 2 + [False] * 4
    assert_same(Folder(path=str(tmp_path / "photos.ds")).open(), source)
    for mine, theirs in zip(pack.split(0.3, 1), source.split(0.3, 1), strict=True):
        assert_same(mine, theirs)
        assert len(mine) in (2, 6)
        assert mine.subset([1]).names == theirs.subset([1]).names
    assert pack.names[-1] == source.names[-1]
    assert pack.names[1:3] == source.names[1:3]
    assert pack.names != source.names[::-1]


def test_the_views_are_the_same_bit_for_bit(album: Path, tmp_path: Path) -> None:
    """In worker processes too."""
    views = MultiCrop(global_size=24, local_size=16, local=2)
    sources = {0: Folder(path=str(album)).open(), 2: made(album, tmp_path / "photos.ds")}
    steps = [list(train_batches(one, views, batch_size=3, seed=5, epochs=2, workers=n)) for n, one in sources.items()]
    assert len(steps[0]) == 4
    for mine, theirs in zip(*steps, strict=True):
        assert mine[:2] == theirs[:2]
        for a, b in zip(
            (*mine.batch.views, mine.batch.labels), (*theirs.batch.views, theirs.batch.labels), strict=True
        ):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_a_picture_that_breaks_while_it_is_decoded_is_treated_alike(photos: Path, tmp_path: Path) -> None:
    """Its structure is whole, its content is not: both leave it out of its batch, and count it before that."""
    png = bytearray((photos / "dög/large.png").read_bytes())
    png[len(png) // 2] ^= 1
    (photos / "dög/large.png").write_bytes(png)
    reasons = []
    for source in (Folder(path=str(photos)).open(), made(photos, tmp_path / "photos.ds")):
        with pytest.raises(BadImage) as bad:
            source.read(list(source.names).index("dög/large.png"))
        reasons.append(bad.value.reason)
    assert reasons[0] == reasons[1]
    assert "check sum" in reasons[0]


def test_a_name_that_is_no_text(photos: Path, tmp_path: Path) -> None:
    try:
        os.rename(os.fsencode(photos / "cat/a.jpg"), os.fsencode(photos) + b"/cat/\xff\xfe.jpg")
    except OSError:
        pytest.skip("this file system takes only names that are text")
    assert_same(made(photos, tmp_path / "photos.ds"), Folder(path=str(photos)).open())


def test_without_class_folders_there_are_no_labels(photos: Path, tmp_path: Path) -> None:
    pack = made(photos / "cat", tmp_path / "cats.ds")
    assert pack.labels is None
    assert pack.classes == []
    assert pack.fingerprint == Folder(path=str(photos / "cat")).open().fingerprint


def test_a_folder_that_cannot_be_listed_is_left_out_alike(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "dög" / "locked").mkdir()
    entries = folder._entries

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return entries(path)

    monkeypatch.setattr(folder, "_entries", refuse)
    pack = made(photos, tmp_path / "photos.ds")
    assert_same(pack, Folder(path=str(photos)).open())
    assert pack.skipped[-1].name == "dög/locked"


def test_content_tells_pictures_apart_that_have_one_size(photos: Path, tmp_path: Path) -> None:
    before = made(photos, tmp_path / "one.ds")
    again = made(photos, tmp_path / "two.ds")
    png = bytearray((photos / "dög/large.png").read_bytes())
    png[len(png) // 2] ^= 1  # of the same length
    (photos / "dög/large.png").write_bytes(png)
    other = made(photos, tmp_path / "three.ds")
    assert before.fingerprint == again.fingerprint == other.fingerprint
    assert before.content_key == again.content_key != other.content_key


def test_the_next_batch_is_fetched_in_the_order_of_its_places(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None
) -> None:
    pack, asked, read = made(album, tmp_path / "photos.ds"), [], []
    advice: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *place: asked.append(place[:3]) or advice.append(place[3]))
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda file, length, at: read.append((file, at, length)) or pread(file, length, at)
    )
    views = MultiCrop(global_size=16, local=0)
    next(iter(train_batches(pack.subset(np.arange(8)[::-1]), views, batch_size=6, seed=0, epochs=1)))
    assert len(asked) == 6
    assert asked == sorted(read)
    assert asked != read
    assert set(advice) == {os.POSIX_FADV_WILLNEED}


def test_what_is_written_to_its_arrays_stays_in_the_process(album: Path, tmp_path: Path) -> None:
    """Torch takes only arrays that may be written."""
    pack = made(album, tmp_path / "photos.ds")
    before = files(pack.path)
    for array in (pack.labels, pack.sizes):
        assert array is not None
        torch.from_numpy(array).add_(1)
    assert files(pack.path) == before


def test_a_pack_that_is_let_go_of_keeps_no_file_open(album: Path, tmp_path: Path, in_small_parts: None) -> None:
    pack = made(album, tmp_path / "photos.ds")
    opened = pack.files
    assert [os.fstat(file).st_size for file in opened] == [pack.about.files[name] for name in pack.about.data]
    del pack
    gc.collect()
    for file in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


# -- smaller pictures -------------------------------------------------------------------------------------------


def test_large_pictures_are_made_smaller_and_the_others_kept(album: Path, tmp_path: Path) -> None:
    source, pack = Folder(path=str(album)).open(), made(album, tmp_path / "small.ds", Form(side=36, quality=90))
    assert pack.names == source.names
    assert not np.array_equal(pack.sizes, source.sizes)
    for index, name in enumerate(source.names):
        before, after = source.sizes[index], pack.sizes[index]
        assert pack.read(index).shape[1::-1] == tuple(after)
        if min(before) <= 36:
            assert pack.encoded(index) == (album / name).read_bytes()
        else:
            assert min(after) == 36
            assert after[0] / after[1] == pytest.approx(before[0] / before[1], rel=0.03)
            with Image.open(__import__("io").BytesIO(pack.encoded(index))) as image:
                assert image.format == "JPEG"
            difference = pack.read(index).astype(float).mean((0, 1)) - source.read(index).mean((0, 1))
            assert abs(difference).max() < 3  # the colours are not exchanged
    fine = made(album, tmp_path / "fine.ds", Form(side=36, quality=100))
    assert fine.about.nbytes > pack.about.nbytes


def test_a_smaller_picture_is_the_mean_of_what_it_covers() -> None:
    """Fine stripes become grey: not a pixel is passed over."""
    stripes = np.where((np.arange(64) + 1) // 2 % 2, 254, 0).astype(np.uint8)
    data, size = packing.smaller(np.broadcast_to(stripes[:, None], (64, 64, 3)).copy(), Form(side=16, quality=100))
    assert size == (16, 16)
    assert np.abs(decode("stripes", data).astype(int) - 127).max() <= 1


def test_a_form_that_cannot_be_is_said() -> None:
    for wrong in (dict(side=0), dict(side=36, quality=0), dict(side=36, quality=101)):
        with pytest.raises(UserError, match="must be"):
            Form(**wrong)


# -- stopped, and gone on with ----------------------------------------------------------------------------------


class Stopped(BaseException):
    """As Ctrl-C."""


class Breaker:
    """Lets `calls` calls that change the disk pass, and stops in the next one: a write is cut in half.

    for_good: nothing reaches the disk afterwards, as after kill -9.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int, for_good: bool) -> None:
        self.left, self.for_good, self.stopped = calls, for_good, False
        for name in ("pwrite", "fsync", "ftruncate", "replace", "rename", "truncate"):
            monkeypatch.setattr(os, name, self.around(getattr(os, name), name))

    def around(self, call, name: str):
        def broken(*args):
            if self.stopped and self.for_good:
                raise Stopped
            self.left -= 1
            if self.left == -1:
                self.stopped = True
                if name == "pwrite":
                    file, data, at = args
                    call(file, data[: len(data) // 2], at)
                raise Stopped
            return call(*args)

        return broken


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None, how: str
) -> None:
    expected = files(made(album, tmp_path / "whole.ds").path)
    calls, stopped = 0, True
    while stopped:
        out = tmp_path / f"{calls}.ds"
        with monkeypatch.context() as patch:
            breaker = Breaker(patch, calls, for_good=how == "killed")
            try:
                made(album, out)
            except Stopped:
                assert not out.exists() or files(out) == expected  # whole or absent
        stopped = breaker.stopped
        assert files(made(album, out).path) == expected, f"after {calls} calls"
        assert not [*tmp_path.glob("*.part"), *tmp_path.glob(".*.part")]
        shutil.rmtree(out)
        calls += 17 if how == "interrupted" else 13  # each of them was tried once, by hand
    assert calls > 80


def test_what_is_said_to_be_done_outlasts_a_power_cut(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None
) -> None:
    """No file gets its name before everything that was written is flushed to the disk, nor the pack before its folder
    is, whose own name is flushed last."""
    written: set[int] = set()
    flushed: set[int] = set()
    pwrite, replace, rename = os.pwrite, os.replace, os.rename

    def node(file: Any) -> int:
        return os.stat(file).st_ino

    def wrote(file: int, data: bytes, at: int) -> int:
        written.add(node(file))
        flushed.discard(node(file))
        return pwrite(file, data, at)

    def replaced(old: Path, new: Path) -> None:
        assert {node(old), *written} <= flushed, new
        if new.exists():
            flushed.discard(node(new))  # its number may be given to another file
        flushed.discard(node(new.parent))
        replace(old, new)

    def renamed(old: Path, new: Path) -> None:
        assert {node(path) for path in (old, *old.iterdir())} <= flushed
        flushed.discard(node(new.parent))
        rename(old, new)

    for name, own in (("pwrite", wrote), ("replace", replaced), ("rename", renamed)):
        monkeypatch.setattr(os, name, own)
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(node(file)))
    pack = made(album, tmp_path / "photos.ds")
    assert len(written) == len(pack.files) + 6  # ends, sizes, sums, names, their ends, what was left out
    assert node(tmp_path) in flushed


def test_what_a_kill_left_beyond_is_no_part_of_the_pack(album: Path, tmp_path: Path, in_small_parts: None) -> None:
    """Not even where less comes after it: a picture may be gone by then, or its JPEG of another length."""
    expected = files(made(album, tmp_path / "whole.ds").path)

    def stop(done: int, _: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with Packing(str(album), str(tmp_path / "photos.ds")) as job:
        job.look()
        with pytest.raises(KeyboardInterrupt):
            job.write(stop)
    last = max(job.part.glob("data-*"))
    following = last.with_name(f"data-{int(last.name[5:]) + 1:05}")
    for file in (last, following, *(job.part / name for name in (*ARRAYS, "names", "skipped"))):
        with file.open("ab") as more:
            more.write(bytes(50_000))
    assert files(made(album, tmp_path / "photos.ds").path) == expected


def test_a_system_that_takes_a_part_at_a_time_gets_everything(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, pwrite = files(made(album, tmp_path / "whole.ds").path), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:1000], at))
    assert files(made(album, tmp_path / "photos.ds").path) == expected


def test_a_kill_costs_the_last_seconds(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: a picture takes two seconds, and what is older than five is on the disk."""
    now, reached = [0.0], []
    monkeypatch.setattr(pack_writer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Packing(str(album), str(tmp_path / "photos.ds")) as job:
        job.look()

        def pass_on(*_: int) -> None:
            reached.append(job.begun)
            now[0] += 2

        job.write(pass_on)
    assert reached == [0, 0, 0, 4, 4, 4, 7, 7, 7, 10, 10, 10]


def test_what_is_done_is_not_read_again(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None
) -> None:
    read = []
    take = Packing._take
    monkeypatch.setattr(Packing, "_take", lambda self, item: read.append(item.name) or take(self, item))
    out = tmp_path / "photos.ds"

    def stop(done: int, _: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with Packing(str(album), str(out)) as job:
        job.look()
        with pytest.raises(KeyboardInterrupt):
            job.write(stop)
        assert job.begun == 7
    read.clear()
    told = []
    with Packing(str(album), str(out)) as job:
        job.look()
        job.write(lambda *both: told.append(both))
    assert len(read) == 12 - 7
    assert told == [(done, 12) for done in range(8, 13)]


def test_a_kill_costs_the_last_few_and_leaves_nothing_behind(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """progress.json is written on the way; what a write of it that was cut off leaves behind is no part of the pack."""
    monkeypatch.setattr(pack_writer, "SETTLE_RECORDS", 3)
    expected, reached = files(made(album, tmp_path / "whole.ds").path), []
    with Packing(str(album), str(tmp_path / "photos.ds")) as job:
        job.look()
        (job.part / ".progress.json.x.part").touch()
        job.write(lambda done, _: reached.append((done, job.begun)))
    assert reached == [(done, done - done % 3) for done in range(1, 13)]
    assert files(tmp_path / "photos.ds") == expected


def test_it_reads_no_further_ahead_than_it_may(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None
) -> None:
    """Memory is bounded by the bytes of the files that wait to be written, one file at least."""
    monkeypatch.setattr(packing, "AHEAD_BYTES", 1)
    read, ahead = [], []
    take = Packing._take
    monkeypatch.setattr(Packing, "_take", lambda self, item: read.append(item.name) or take(self, item))
    with Packing(str(album), str(tmp_path / "photos.ds")) as job:
        job.look()
        job.write(lambda done, _: ahead.append(len(read) - done))
    assert max(ahead) <= 3  # links that lead nowhere and empty files weigh nothing


class Pool:
    """Takes `done` items at once, and the others never."""

    def __init__(self, done: int) -> None:
        self.begun, self.done = [], done

    def submit(self, take, item: Listed) -> Future:
        self.begun.append(Future())
        if len(self.begun) <= self.done:
            self.begun[-1].set_result(take(item))
        return self.begun[-1]


@pytest.mark.parametrize(("each", "ahead"), [(10, 10), (0, 1000)])
def test_it_reads_ahead_to_the_end_by_bytes_and_by_number(
    each: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "AHEAD_BYTES", 100)
    items = [Listed(b"%d" % n, (each, 0)) for n in range(3 * ahead)]
    pool: Any = Pool(len(items))
    taken = packing._ahead(pool, lambda item: item, iter(items))
    found = [(item, len(pool.begun) - done) for done, item in enumerate(taken, 1)]
    assert found == [(item, min(ahead, len(items) - done)) for done, item in enumerate(items, 1)]


def test_what_was_to_be_read_ahead_is_left_once_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "AHEAD_BYTES", 100)
    pool: Any = Pool(1)
    taken = packing._ahead(pool, lambda item: item, (Listed(b"%d" % n, (10, 0)) for n in range(30)))
    next(taken)
    taken.close()
    assert [future.cancelled() for future in pool.begun] == [False] + 10 * [True]


@pytest.mark.parametrize("room", [0, 5000, 12000, 30000])
def test_a_full_disk_keeps_what_was_done(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None, room: int
) -> None:
    expected, out, pwrite = files(made(album, tmp_path / "whole.ds").path), tmp_path / "photos.ds", os.pwrite

    def nearly_full(file: int, data: bytes, at: int) -> int:
        used = sum(path.stat().st_size for path in Path(f"{out}.part").iterdir())
        if (fits := room - used) <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[:fits], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", nearly_full)
        with pytest.raises(UserError, match=r"No space left.* Free some space, and give the same command again"):
            made(album, out)
    assert not out.exists()
    with Packing(str(album), str(out)) as job:
        assert (job.begun > 0) == (room > 0)
    assert files(made(album, out).path) == expected


def test_two_at_a_time_are_refused(album: Path, tmp_path: Path) -> None:
    with Packing(str(album), str(tmp_path / "photos.ds")) as first:
        with pytest.raises(UserError, match="Another process packs"), Packing(str(album), str(tmp_path / "photos.ds")):
            pass
        first.look()
        first.write()


# -- a folder that changes --------------------------------------------------------------------------------------


def change(photos: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(photos / "cat" / "new.png")
    (photos / "dög" / "c.gif").unlink()
    with (photos / "dög" / "large.png").open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_folder_is_noticed_and_said(
    photos: Path, tmp_path: Path, finished: bool, in_small_parts: None
) -> None:
    out = tmp_path / "photos.ds"
    with Packing(str(photos), str(out)) as job:
        job.look()
        if finished:
            job.write()
    kept = files(job._there)
    with Packing(str(photos), str(out)) as job:
        job.look()  # nothing changed so far
    change(photos)
    with pytest.raises(UserError) as said, Packing(str(photos), str(out)) as job:
        job.look()
    for part in (
        "has changed",
        "cat/new.png: added",
        "dög/c.gif: gone",
        "dög/large.png: changed",
        "rm -r",
        "11 files then",
    ):
        assert part in str(said.value)
    assert files(job._there) == kept


@pytest.mark.parametrize("what", ["changed while", "cannot be read any more"])
def test_a_file_that_changes_under_way_stops_the_pack(photos: Path, tmp_path: Path, what: str) -> None:
    out, file = tmp_path / "photos.ds", photos / "dög" / "c.gif"
    with Packing(str(photos), str(out)) as job:
        job.look()
        os.utime(file, ns=(0, 0)) if what == "changed while" else file.unlink()
        with pytest.raises(UserError, match=f"c.gif {what}"):
            job.write()
        assert job.begun == 7  # all before it
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "left_out"), [("EACCES", True), ("EPERM", True), ("EIO", True), ("ESTALE", False), ("ENOENT", False)]
)
def test_a_picture_is_left_out_only_where_it_will_not_be_read_another_time(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left_out: bool
) -> None:
    """A disk that went away stops the pack, rather than to leave it without half of the pictures."""
    number = getattr(errno, name)

    def refuse(path: str, mode: str) -> Any:
        if path.endswith("c.gif"):
            raise OSError(number, os.strerror(number))
        return open(path, mode)

    monkeypatch.setattr(packing, "open", refuse, raising=False)
    if left_out:
        pack = made(album, tmp_path / "photos.ds")
        assert ("dög/c.gif", os.strerror(number)) in pack.skipped
        assert len(pack) == 7
    else:
        with pytest.raises(UserError, match=r"c\.gif cannot be read any more"):
            made(album, tmp_path / "photos.ds")


def test_another_form_is_refused(photos: Path, tmp_path: Path) -> None:
    for out, finish in ((tmp_path / "begun.ds", False), (tmp_path / "whole.ds", True)):
        with Packing(str(photos), str(out), Form(side=20)) as job:
            job.look()
            if finish:
                job.write()
        for form in (Form(), Form(side=21), Form(side=20, quality=80)):
            with (
                pytest.raises(UserError, match="was made with --side 20 --quality 95"),
                Packing(str(photos), str(out), form) as job,
            ):
                job.look()


# -- damage -----------------------------------------------------------------------------------------------------


def test_every_damaged_byte_is_found_and_named(photos: Path, tmp_path: Path, in_small_parts: None) -> None:
    pack = made(photos, tmp_path / "photos.ds")
    assert not any(pack.damaged())
    assert len(list(pack.damaged())) == len(pack) + len(pack.about.digests)
    for index in range(len(pack)):
        number, start, length = pack._place(index)
        file = pack.path / pack.about.data[number]
        whole = file.read_bytes()
        for at in (start, start + length - 1):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            found = [damage for damage in pack.damaged() if damage]
            assert len(found) == 1
            assert pack.names[index] in found[0]
            assert file.name in found[0]
            with pytest.raises(BadImage, match="damaged in the pack"):
                pack.read(index)
        file.write_bytes(whole)
    for name in pack.about.digests:
        whole = (pack.path / name).read_bytes()
        (pack.path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert any(damage and damage.startswith(f"{name}: the index is damaged") for damage in pack.damaged()), name
        (pack.path / name).write_bytes(whole)
    assert not any(pack.damaged())


def test_a_damaged_index_is_never_a_crash(photos: Path, tmp_path: Path) -> None:
    pack = made(photos, tmp_path / "photos.ds")
    ends = np.fromfile(pack.path / "ends", "<i8")
    for wrong in (-5, 0, 2**60):
        np.where(np.arange(len(ends)) == 3, wrong, ends).astype("<i8").tofile(pack.path / "ends")
        for index in (2, 3):
            with pytest.raises(BadImage, match="damaged in the pack"):
                open_pack(pack.path).read(index)
        (step,) = train_batches(
            open_pack(pack.path), MultiCrop(global_size=16, local=0), batch_size=8, seed=0, epochs=1
        )
        assert sorted(item.name for item in step.skipped) == list(pack.names[2:4])


def test_a_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    """The index of a hundred million pictures is gigabytes."""
    data = noise(2**20 + 7).tobytes()
    (tmp_path / "ends").write_bytes(data)
    assert digest_of(tmp_path / "ends") == sha256(data).hexdigest()


def test_training_leaves_a_damaged_picture_out(photos: Path, tmp_path: Path) -> None:
    pack = made(photos, tmp_path / "photos.ds")
    data = bytearray((pack.path / "data-00000").read_bytes())
    data[10] ^= 1
    (pack.path / "data-00000").write_bytes(data)
    views = MultiCrop(global_size=16, local=0)
    (step,) = train_batches(pack, views, batch_size=8, seed=0, epochs=1)
    assert [(item.name, item.reason[:18]) for item in step.skipped] == [(pack.names[0], "damaged in the pac")]
    assert step.batch.views[0].shape[1] == 7


# -- what cannot work -------------------------------------------------------------------------------------------


def test_a_pack_that_is_not_whole_is_refused(photos: Path, tmp_path: Path) -> None:
    pack = made(photos, tmp_path / "photos.ds")
    data, about = pack.path / "data-00000", pack.path / "pack.json"
    whole, said = data.read_bytes(), json.loads(about.read_text())
    for change_it, match in (
        (lambda: data.write_bytes(whole[:-7]), rf"data-00000 has {len(whole) - 7} bytes, expected {len(whole)}"),
        (data.unlink, "data-00000 is missing"),
        (lambda: about.write_text(json.dumps({**said, "version": 2})), "version 2, and this dino reads version 1"),
        (lambda: about.write_text("{"), "pack.json is damaged"),
        (lambda: about.write_text(json.dumps({**said, "files": {"../x": 1}})), "file elsewhere"),
    ):
        change_it()
        with pytest.raises(UserError, match=match):
            Folder(path=str(pack.path)).open()
        data.write_bytes(whole)
        about.write_text(json.dumps(said))


def test_wrong_places_are_said(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.ds"
    with Packing(str(photos), str(out)) as job:
        job.look()
    for path in (out, Path(f"{out}.part")):
        with pytest.raises(UserError, match="the command that began it"):
            Folder(path=str(path)).open()
    with pytest.raises(UserError, match="is not there"):
        Packing(str(tmp_path / "nowhere"), str(out))
    with pytest.raises(UserError, match="is a file"):
        Packing(str(photos / "notes.txt"), str(out))
    with pytest.raises(UserError, match="exists and is no pack"):
        Packing(str(photos), str(photos))
    with pytest.raises(UserError, match="is no pack: expected"):
        open_pack(photos)
    with pytest.raises(UserError, match=r"no pack .*nowhere"):
        open_pack(tmp_path / "nowhere")
    made(photos, out)
    with pytest.raises(UserError, match="is a pack already"):
        Packing(str(out), str(tmp_path / "again.ds"))


def test_a_folder_without_a_picture(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "page.jpg").write_text("<html>")
    with pytest.raises(UserError, match=r"no picture that can be used(.|\n)*page.jpg: not an image"):
        made(tmp_path / "photos", tmp_path / "photos.ds")
    assert not (tmp_path / "photos.ds").exists()
