"""An index on disk: updates read only what has changed, and any interruption leaves the last complete state."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino_ssl
from dino_ssl.data.dataset import BadImage
from dino_ssl.data.decode import decode
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.models import ViT
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.weights import save_backbone
from dino_ssl.search import build, reading, store
from dino_ssl.search.listing import list_images

FORK = multiprocessing.get_context("fork")
VIT = ViT(width=48, depth=1, heads=2, patch=8, image_size=32, drop_path=0.0)


@pytest.fixture(scope="module")
def net() -> Backbone:
    torch.manual_seed(0)
    return VIT.build()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images in three class folders, one that cannot be read, and a name that is not UTF-8."""
    folder = tmp_path / "photos"
    Scenes(count=12, size=40, classes=3).write(folder)
    (folder / "broken.jpg").write_text("no image")
    os.rename(next(iter(sorted((folder / "gear").iterdir()))), os.fsencode(folder / "gear") + b"/caf\xe9.png")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is read."""
    names: list[str] = []
    read = dino_ssl.data.folder.read_bytes
    monkeypatch.setattr(dino_ssl.data.folder, "read_bytes", lambda path: names.append(Path(path).name) or read(path))
    return names


def state(index: dino_ssl.Index) -> dict[str, np.ndarray]:
    return dict(zip(index.items.names, np.asarray(index.features), strict=True))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_the_rows_are_the_unit_features_of_embed(net, photos, tmp_path):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx", batch_size=5)
    expected = dino_ssl.embed(net, photos, batch_size=5)
    assert list(index.items.names) == expected.names
    unit = expected.features / np.linalg.norm(expected.features, axis=1, keepdims=True)
    np.testing.assert_allclose(index.features, unit, atol=5e-4)
    assert index.items.labels.tolist() == [name.split("/")[0] for name in expected.names]
    assert [item.name for item in index.skipped] == ["broken.jpg"]
    assert set(index.items.widths) == set(index.items.heights) == {40}
    assert r"gear/caf\xe9.png" in list(index.items.names)
    row = index.items.row_of(r"gear/caf\xe9.png")
    assert row is not None
    np.testing.assert_array_equal(index.read(row), decode(index.path_of(row)))
    assert index.items.perceptual_hashes is not None
    assert len(set(index.items.content_hashes)) == 12


def test_an_unchanged_folder_is_not_opened(net, photos, tmp_path, opened):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    assert len(opened) == 13
    opened.clear()
    files = sorted(os.listdir(index.folder))
    assert index.update().changes == build.Changes(kept=12)
    assert (opened, index.generation, sorted(os.listdir(index.folder))) == ([], 1, files)


def test_an_update_equals_a_new_index_and_reads_only_what_has_changed(net, photos, tmp_path, opened):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    names = [index.path_of(row) for row in range(12)]
    changed = index.items.names[4]
    os.rename(names[0], photos / "renamed.png")
    os.utime(names[1])
    os.remove(names[2])
    shutil.copy(names[3], photos / "copy.png")
    Image.fromarray(Scenes(count=20, size=40).open().read(19)).save(names[4])
    Image.fromarray(Scenes(count=20, size=40).open().read(18)).save(photos / "new.png")
    opened.clear()
    decoded: list[str] = []
    original = reading.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reading, "decode", lambda name, *args, **options: decoded.append(name) or original(name, *args, **options)
        )
        index.update()
    assert index.changes == build.Changes(added=5, reused=3, removed=4, kept=8)
    assert sorted(opened) == sorted(["renamed.png", names[1].name, "copy.png", names[4].name, "new.png"])
    assert sorted(decoded) == sorted([changed, "new.png"])
    assert same(state(index), state(dino_ssl.Index.build(net, photos, path=tmp_path / "new")))
    assert set(index.items.labels) == {None}  # images outside of the class folders
    assert len(list(index.folder.glob("features-*"))) == len(list(index.folder.glob("items-*"))) == 1
    (photos / "broken.jpg").write_text("still no image")
    opened.clear()
    index.update()
    assert (opened, len(index)) == (["broken.jpg"], 13)


def test_complete_shards_stay_as_they_are(net, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BUFFER_ROWS", 2)
    monkeypatch.setattr(store, "SHARD_BYTES", 5 * 2 * 48)
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx", batch_size=3)
    assert [*index.store.info.shards.values()] == [5, 5, 2]
    first, *others = index.store.info.shards
    inode = (index.folder / first).stat().st_ino
    os.remove(index.path_of(7))
    index.update()
    assert [*index.store.info.shards.values()] == [5, 5, 1]
    assert next(iter(index.store.info.shards)) == first
    assert (index.folder / first).stat().st_ino == inode
    assert not set(others) & set(index.store.info.shards)
    assert same(state(index), state(dino_ssl.Index.build(net, photos, path=tmp_path / "new")))


@pytest.mark.parametrize("step", ["append_rows", "atomic_write", "write_json", "remove_unused"])
def test_a_killed_update_leaves_the_last_complete_state(net, photos, tmp_path, step):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    before = state(index)
    os.remove(index.path_of(3))

    def update() -> None:
        calls = [0, 0] if step == "remove_unused" else [0]  # it is called before the update as well

        original = getattr(store, step)

        def killed(*args, **options):
            calls.pop()
            return original(*args, **options) if calls else os.kill(os.getpid(), signal.SIGKILL)

        setattr(store, step, killed)
        index.update()

    process = FORK.Process(target=update)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    after = dino_ssl.Index(index.folder, checkpoint=net)
    complete = step == "remove_unused"  # after index.json was replaced
    assert len(after) == (11 if complete else 12)
    if not complete:
        assert same(state(after), before)
    assert len(after.update()) == 11
    assert len(os.listdir(index.folder)) == 5


def test_a_build_that_is_interrupted_resumes_where_it_was(net, photos, tmp_path, monkeypatch, opened):
    add, batches = store.Writer.add, []

    def interrupted(*args):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dino_ssl.Index.build(net, photos, path=tmp_path / "idx", batch_size=4)
    index = dino_ssl.Index(tmp_path / "idx", checkpoint=net)
    assert (len(index), index.store.info.pending) == (7, 5)  # of the first batch, one cannot be read
    opened.clear()
    index.update()
    assert len(opened) == 5
    assert (len(index), index.store.info.pending, index.changes.added) == (12, 0, 5)
    assert same(state(index), state(dino_ssl.Index.build(net, photos, path=tmp_path / "new", batch_size=4)))


def test_long_builds_are_saved(net, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SAVE_SECONDS", -1)
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx", batch_size=4)
    assert index.generation == 4  # of four batches
    assert same(state(index), state(dino_ssl.Index.build(net, photos, path=tmp_path / "new", batch_size=4)))


def test_a_full_disk_is_one_message_and_the_old_state_stays(net, photos, tmp_path, monkeypatch):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    before = state(index)
    os.remove(index.path_of(3))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"Cannot write .*features-2-0\.f16.*The disk is full: free some space"):
            index.update()
    assert same(state(dino_ssl.Index(index.folder)), before)
    assert len(os.listdir(index.folder)) == 5


def test_features_of_other_weights_sizes_and_folders_do_not_mix(net, photos, tmp_path):
    path = tmp_path / "idx"
    dino_ssl.Index.build(net, photos, path=path)
    torch.manual_seed(1)
    other = VIT.build()
    with pytest.raises(UserError, match="features of other weights"):
        dino_ssl.Index.build(other, photos, path=path)
    with pytest.raises(UserError, match="features of other weights"):
        dino_ssl.Index(path, checkpoint=other).search(decode(photos / "gear" / os.fsdecode(b"caf\xe9.png")))
    with pytest.raises(UserError, match="was a Python object: pass it as `checkpoint`"):
        dino_ssl.Index(path).search(Scenes(count=1, size=40).open().read(0))
    with pytest.raises(UserError, match="Set `size` to 32, or set another `out`"):
        dino_ssl.Index.build(net, photos, path=path, size=24)
    with pytest.raises(UserError, match=f"is the index of {photos}; got {photos}/gear"):
        dino_ssl.Index.build(net, photos / "gear", path=path)
    with pytest.raises(UserError, match=r"is no index: it has .* Expected a new folder"):
        dino_ssl.Index.build(net, photos, path=photos / "gear")


def test_a_folder_that_was_moved(net, photos, tmp_path, opened):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    moved, query = photos.with_name("moved"), index.read(4)
    photos.rename(moved)
    index = dino_ssl.Index(index.folder, checkpoint=net)
    assert index.search(query, k=1)[0].row == 4
    with pytest.raises(BadImage, match=rf"there is no folder {photos}; if it was moved, pass it as `images`"):
        index.read(4)
    with pytest.raises(UserError, match="There is no folder"):
        index.update()
    assert (dino_ssl.Index(index.folder, images=moved).read(4) == query).all()
    opened.clear()
    index = dino_ssl.Index.build(net, moved, path=index.folder)
    assert (opened, index.changes.kept, index.path_of(4).parents[1]) == ([], 12, moved)


def test_a_checkpoint_that_was_moved_is_found_at_its_new_path(net, photos, tmp_path, opened):
    save_backbone(VIT, net.state_dict(), tmp_path / "one.safetensors")
    index = dino_ssl.Index.build(tmp_path / "one.safetensors", photos, path=tmp_path / "idx")
    (tmp_path / "one.safetensors").rename(tmp_path / "two.safetensors")
    opened.clear()
    again = dino_ssl.Index.build(tmp_path / "two.safetensors", photos, path=tmp_path / "idx")
    assert (again.generation, opened) == (index.generation, [])
    assert dino_ssl.Index(tmp_path / "idx").checkpoint.source == str(tmp_path / "two.safetensors")


def test_what_was_wrong_with_a_file_and_may_be_solved_is_tried_again(net, photos, tmp_path):
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))  # its package may be installed later
    (photos / "link.jpg").symlink_to("missing")
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    assert {item.name for item in index.skipped} == {"broken.jpg", "phone.heic", "link.jpg"}
    listing = list_images(str(photos))
    plan = build.compare(listing, store.open_store(tmp_path / "idx"))
    assert listing.paths.take(plan.to_read).to_pylist() == [b"phone.heic"]
    assert len(dino_ssl.Index.build(net, photos, path=tmp_path / "idx").skipped) == 3


def test_a_thumbnail_of_a_file_that_has_changed_is_not_kept(net, photos, tmp_path):
    first, second = sorted((photos / "gear").glob("*.png"))[:2]
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    row = index.items.row_of(str(first.relative_to(photos)))
    first.rename(tmp_path / "a.png")
    second.rename(first)
    (tmp_path / "a.png").rename(second)  # they have each other's names
    of_other = index.thumbnail(row)
    assert index.change_of(row) == "has changed since it was indexed"
    index.update()
    row = index.items.row_of(str(second.relative_to(photos)))  # with the content of the first
    assert index.thumbnail(row) != of_other


def test_the_path_of_an_index_need_not_be_utf_8(net, photos, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.idx"))
    index = dino_ssl.Index.build(net, photos, path=path)
    assert same(state(dino_ssl.Index(path)), state(index))
    with pytest.raises(UserError, match="expected a path in UTF-8"):
        dino_ssl.Index.build(net, photos, path=path, approximate=True)


def test_a_second_writer_is_refused(net, photos, tmp_path):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    ready, end = FORK.Event(), FORK.Event()

    def hold() -> None:
        with store.writing(index.folder):
            ready.set()
            end.wait(60)

    process = FORK.Process(target=hold)
    process.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"is being written by process {process.pid}"):
        index.update()
    end.set()
    process.join(60)
    index.update()


@pytest.mark.parametrize("count", [1, 3])
def test_few_images(net, tmp_path, count):
    Scenes(count=count, size=40).write(tmp_path / "few")
    index = dino_ssl.Index.build(net, tmp_path / "few", path=tmp_path / "idx")
    assert index.search(0)[0].row == 0
    assert len(index.search(0, k=20)) == count
    index = dino_ssl.Index.build(net, tmp_path / "few", path=tmp_path / "idx", approximate=True)
    assert (index.approximate.info.recall, len(index.search(0, k=20))) == (1.0, count)


def test_no_images(net, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="There are no images"):
        dino_ssl.Index.build(net, tmp_path / "none", path=tmp_path / "idx")
    (tmp_path / "none/a.png").write_text("x")
    with pytest.raises(UserError, match=r"None of the 1 images can be read. a.png: "):
        dino_ssl.Index.build(net, tmp_path / "none", path=tmp_path / "idx")
    with pytest.raises(UserError, match="There is no index"):
        dino_ssl.Index(tmp_path / "idx")


class Pairs(torch.utils.data.Dataset):
    """A torch dataset of arrays."""

    def __init__(self, numbers: list[int]) -> None:
        self.images, self.numbers = Scenes(count=30, size=40).open(), numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images.read(self.numbers[index]), index % 2


def sources(photos: Path, tmp_path: Path) -> Iterator[tuple[str, object, object]]:
    """Yield a source and a changed one."""
    from dino_ssl.data.shard_writer import pack

    changed = tmp_path / "changed"
    shutil.copytree(photos, changed)
    pack(photos, tmp_path / "shards")
    paths = sorted(map(str, (photos / "star").iterdir()))
    yield "shards", tmp_path / "shards", tmp_path / "shards"
    yield "list", paths, paths[1:]
    yield "torch", Pairs([1, 2, 3]), Pairs([1, 4, 3, 2])
    yield "scenes", Scenes(count=5, size=40), Scenes(count=6, size=40)


def test_any_dataset_is_indexed_and_updated(net, photos, tmp_path):
    for name, source, changed in sources(photos, tmp_path):
        path = tmp_path / f"{name}.idx"
        index = dino_ssl.Index.build(net, source, path=path)
        expected = dino_ssl.embed(net, source)
        assert list(index.items.names) == expected.names, name
        assert index.items.labels.tolist() == expected.labels, name
        np.testing.assert_array_equal(index.read(1), dino_ssl.data.sources.open_dataset(source).read(1))
        assert dino_ssl.Index.build(net, source, path=path).changes == build.Changes(kept=len(index)), name
        if changed is not source:
            index = dino_ssl.Index.build(net, changed, path=path)
            assert index.changes.reused == index.changes.added - (name in ("torch", "scenes")), name
            assert same(state(index), state(dino_ssl.Index.build(net, changed, path=tmp_path / f"{name}-new.idx")))


def test_a_damaged_index_is_reported(net, photos, tmp_path):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    info = json.loads((index.folder / "index.json").read_text())
    (index.folder / info["items"]).unlink()
    with pytest.raises(UserError, match=r"is incomplete .* Remove it and build it again"):
        dino_ssl.Index(index.folder)
    (index.folder / "index.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(UserError, match="has format 99; this version of dino reads format 1"):
        dino_ssl.Index(index.folder)
    (index.folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        dino_ssl.Index(index.folder)


def test_approximate_search_is_rebuilt_if_rows_change_and_not_used_if_it_is_out_of_date(net, photos, tmp_path):
    pytest.importorskip("faiss")
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx", approximate=True)
    assert index.approximate is not None
    assert index.approximate.info.recall >= 0.99
    assert [hit.row for hit in index.search(2, k=5)] == [hit.row for hit in index.search(2, k=5, exact=True)]
    os.remove(index.path_of(3))
    old = json.loads((index.folder / "approximate.json").read_text())
    assert index.update().approximate.info.generation == 2
    assert len(list(index.folder.glob("approximate-*.faiss"))) == 1
    (index.folder / "approximate.json").write_text(json.dumps(old))
    assert dino_ssl.Index(index.folder).approximate is None


def test_a_query_is_an_image_a_row_a_name_a_vector_a_region_or_several(net, photos, tmp_path):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx", precision="float32")
    image, name = index.read(4), index.items.names[4]
    vector = np.asarray(index.features[4], np.float32)
    for query in (4, name, index.path_of(4), image, Image.fromarray(image), 7 * vector, torch.from_numpy(vector), -8):
        hits = index.search(query, k=12)
        assert (hits[0].row, hits[0].name, len(hits)) == (4, name, 12)
        assert hits[0].similarity == pytest.approx(1, abs=1e-3)
        assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    mean = vector + np.asarray(index.features[7], np.float32)
    assert [hit.row for hit in index.search([4, 7], k=12)] == [hit.row for hit in index.search(mean, k=12)]
    assert {hit.row for hit in index.search([4, 7], k=2)} == {4, 7}
    whole, part = index.search(4, region=(0, 0, 40, 40)), index.search(image, region=(-5, 8, 25, 20))
    assert [hit.row for hit in whole] == [hit.row for hit in index.search(image)]
    assert part == index.search(image[8:28, :20])
    assert {hit.name.split("/")[0] for hit in index.search(4, label="gear", k=12)} == {"gear"}
    assert index.search(4, folder="./gear/", k=12) == index.search(4, label="gear", k=12)


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (12, {}, "There is no row 12: the index has 12 images"),
        ([], {}, "The query is empty"),
        (np.zeros(3, np.float32), {}, "Expected a vector of 48 dimensions, got 3"),
        ("nothing.jpg", {}, r"There is no file nothing\.jpg, and no image of this name in the index"),
        (0, {"k": 0}, "`k` must be at least 1"),
        (0, {"label": "geer"}, "No image of the index is of the class geer; did you mean 'gear'"),
        (0, {"folder": "gea"}, r"No image of the index is in the folder gea\."),
        (0, {"region": (40, 0, 5, 5)}, "`region` 40 0 5 5 is outside of the image of 40 x 40"),
        (0, {"region": (1, 2, 3)}, "`region` expects x, y, width and height in pixels; got 3 numbers"),
    ],
)
def test_wrong_queries_are_refused(net, photos, tmp_path, query, options, message):
    index = dino_ssl.Index.build(net, photos, path=tmp_path / "idx")
    with pytest.raises(UserError, match=message):
        index.search(query, **options)
