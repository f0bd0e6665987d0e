"""Folders of images: which files are used, which are skipped and why, and error messages."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dino_ssl.data.folder import Folder, class_folders
from dino_ssl.data.sources import labeled_pair
from dino_ssl.errors import UserError
from dino_ssl.files import mark_output


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "my photos"
    root.mkdir()
    return root


def put(root, *names, value=100):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 10), (value, i, 0)).save(path)


def test_nested_images_are_sorted_by_name(photos):
    put(photos, "b.png", "ü/日本 語/ж.jpg", "ü/a.PNG", "a/z.bmp")
    calls = []
    dataset = Folder(path=str(photos)).open(progress=lambda done, total: calls.append((done, total)))
    assert dataset.names == ["a/z.bmp", "b.png", "ü/a.PNG", "ü/日本 語/ж.jpg"]
    assert dataset.sizes.tolist() == [[23, 10], [20, 10], [22, 10], [21, 10]]
    assert [int(dataset.read(i)[0, 0, 1]) for i in (0, 1, 2)] == [3, 0, 2]
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert dataset.labels is None
    assert dataset.short_side == 10
    image, label = dataset[1]
    assert (image.shape, label) == ((10, 20, 3), -1)
    assert len(list(dataset)) == 4  # map-style torch dataset
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.read(3), dataset.read(3))


def test_bad_files_are_listed_and_other_files_ignored(photos):
    put(photos, "good.png", "cut.png", ".hidden.png", ".thumbs/x.png", "__MACOSX/y.png")
    data = (photos / "cut.png").read_bytes()
    (photos / "cut.png").write_bytes(data[:-5])
    (photos / "empty.jpg").touch()
    (photos / "page.jpg").write_text("<html>")
    (photos / "notes.txt").write_text("not an image")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    os.mkfifo(photos / "pipe.jpg")
    dataset = Folder(path=str(photos)).open()
    assert dataset.names == ["good.png"]
    assert [s.name for s in dataset.skipped] == ["cut.png", "empty.jpg", "gone.png", "page.jpg", "pipe.jpg"]
    assert [s.reason.split(" ")[0] for s in dataset.skipped] == ["truncated", "empty", "No", "not", "not"]


def test_what_dino_wrote_into_the_folder_is_not_data(photos, caplog):
    put(photos, "cat/1.png", "dog/2.png", "checkpoints/3.png")
    (photos / "cat/run.json").touch()  # without checkpoints, it is any file
    before = Folder(path=str(photos)).open()
    assert before.classes == ["cat", "checkpoints", "dog"]
    put(photos, "runs/demo/snapshots/images/0.png", "runs/demo/figure.png")
    (photos / "runs/demo/run.json").touch()
    mark_output(photos / "dog/maps")
    put(photos, "dog/maps/all.png")
    mark_output(photos / "dog")  # has images, so it stays a class
    with caplog.at_level("INFO", "dino_ssl"):
        after = Folder(path=str(photos)).open()
    assert (after.names, after.classes, after.fingerprint) == (before.names, before.classes, before.fingerprint)
    assert caplog.messages[-1] == f"Skipped folders in {photos} that dino wrote: dog/maps, runs/demo"
    for output in ("runs/demo", "dog/maps"):
        with pytest.raises(UserError, match=r"was written by dino: .* Expected the folder of the original images"):
            Folder(path=str(photos / output)).open()


def test_links_are_followed_and_loops_are_not(photos, tmp_path):
    put(photos, "real/a.png")
    put(tmp_path / "elsewhere", "b.png")
    for name in ("A link", "z link"):  # sort before and after the real folder, which still gives the name
        (photos / name).symlink_to(photos / "real")
    (photos / "real" / "loop").symlink_to(photos)
    (photos / "real" / "to itself").symlink_to("to itself")
    (photos / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (photos / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    dataset = Folder(path=str(photos)).open()
    assert dataset.names == ["c.png", "elsewhere/b.png", "real/a.png"]
    assert dataset.read(0).shape == (10, 20, 3)


def test_names_that_are_not_utf8(photos):
    put(photos, "a.png")
    try:
        os.rename(os.fsencode(photos / "a.png"), os.fsencode(photos) + b"/\xff\xfe.png")
    except OSError:
        pytest.skip("this file system accepts only UTF-8 names")
    dataset = Folder(path=str(photos)).open()
    assert dataset.names == ["\\xff\\xfe.png"]
    assert dataset.names[0].encode()  # can be printed, and written to a report
    assert dataset.read(0).shape == (10, 20, 3)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_folders_without_write_or_list_permission(photos, mode):
    put(photos, "a.png", "locked/b.png")
    (photos / "locked").chmod(mode)
    try:
        readable = os.access(photos / "locked", os.R_OK)
        dataset = Folder(path=str(photos)).open()
    finally:
        (photos / "locked").chmod(0o755)
    assert dataset.names == (["a.png", "locked/b.png"] if readable else ["a.png"])
    if not readable:
        assert dataset.skipped[0].name == "locked"
        assert "cannot be listed" in dataset.skipped[0].reason


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["cat/1.jpg", "dog/x/2.jpg", "cat/3.jpg"], ["cat", "dog"], [0, 1, 0]),
        (["cat/1.jpg", "cat/2.jpg"], [], None),
        (["cat/1.jpg", "dog/2.jpg", "3.jpg"], [], None),
        (["train/1.jpg", "val/2.jpg"], [], None),
        (["train/cat/1.jpg", "Val/cat/2.jpg", "train/dog/3.jpg"], ["cat", "dog"], [0, 0, 1]),
        (["train/cat/1.jpg", "val/2.jpg"], [], None),
    ],
)
def test_class_folders(names, classes, labels):
    found_labels, found_classes = class_folders(names)
    assert found_classes == classes
    assert labels == (None if found_labels is None else found_labels.tolist())


def test_split_is_stratified_and_disjoint(photos):
    put(photos, *(f"{kind}/{i}.png" for kind, n in (("a", 20), ("b", 10), ("c", 1)) for i in range(n)))
    dataset = Folder(path=str(photos)).open()
    train, val = dataset.split(0.2, seed=1)
    assert train.labels is not None
    assert val.labels is not None
    assert np.bincount(val.labels, minlength=3).tolist() == [4, 2, 0]
    assert sorted(train.names + val.names) == dataset.names
    assert val.names == dataset.split(0.2, seed=1)[1].names != dataset.split(0.2, seed=2)[1].names
    np.testing.assert_array_equal(val.read(3), dataset.read(dataset.names.index(val.names[3])))


def test_fingerprint_changes_with_the_images(photos):
    put(photos, "a.png", "b.png")
    before = Folder(path=str(photos)).open().fingerprint
    assert Folder(path=str(photos)).open().fingerprint == before
    put(photos, "c.png")
    assert Folder(path=str(photos)).open().fingerprint != before


def test_in_memory_returns_the_same_images_without_reading_files_again(photos):
    put(photos, "a.png", "b.png", "c.png")
    dataset = Folder(path=str(photos)).open()
    expected = [dataset.read(i) for i in (0, 2)]
    (photos / "b.png").write_bytes(b"")
    cached = dataset.in_memory()
    assert cached.nbytes == 3 * 10 * (20 + 21 + 22)
    for name in ("a.png", "b.png", "c.png"):
        (photos / name).unlink()
    for index, image in zip((0, 2), expected, strict=True):
        np.testing.assert_array_equal(cached.read(index), image)
    with pytest.raises(Exception, match="empty"):
        cached.read(1)


def test_error_messages(photos):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        Folder(path=str(photos / "nowhere")).open()
    with pytest.raises(UserError, match="no images in"):
        Folder(path=str(photos)).open()
    (photos / "notes.txt").touch()
    with pytest.raises(UserError, match="1 other or hidden"):
        Folder(path=str(photos)).open()
    put(photos, "a.png")
    with pytest.raises(UserError, match=r"got the file .*Did you mean"):
        Folder(path=str(photos / "a.png")).open()
    (photos / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"None of the 1 files(.|\n)*a.png: empty file"):
        Folder(path=str(photos)).open()


def test_a_validation_folder_of_one_class_has_its_label(tmp_path):
    """`val/c` next to `train/a`, `train/b` and `train/c`: a single folder is a class if the training set has it."""
    put(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/2.png")
    train, val = labeled_pair(tmp_path / "train", tmp_path / "val", val_fraction=0.1)
    assert val.classes == train.classes == ["a", "b", "c"]
    assert val.labels is not None
    assert val.labels.tolist() == [2]
    (tmp_path / "val/c").rename(tmp_path / "val/d")
    with pytest.raises(UserError, match="classes that the training set lacks: d"):
        labeled_pair(tmp_path / "train", tmp_path / "val", val_fraction=0.1)
    (tmp_path / "val/d/2.png").rename(tmp_path / "val/2.png")
    with pytest.raises(UserError, match=r"validation set .*/val has none"):
        labeled_pair(tmp_path / "train", tmp_path / "val", val_fraction=0.1)


def test_classes_of_a_single_image_cannot_be_held_out(tmp_path):
    put(tmp_path, "photos/a/1.png", "photos/b/1.png")
    with pytest.raises(UserError, match=r"No image of .*photos can be held out, because each class has a single one"):
        labeled_pair(tmp_path / "photos", val_fraction=0.1)
    put(tmp_path, "photos/b/2.png")
    assert [len(part) for part in labeled_pair(tmp_path / "photos", val_fraction=0.1)] == [2, 1]


def test_control_characters_in_names_are_escaped(photos):
    r"""A name must not forge lines of the output or change the terminal; it becomes \x1b... everywhere."""
    put(photos, "a\033]0;PWN\007\nb.png", "c\u202egnp.png")
    dataset = Folder(path=str(photos)).open()
    assert dataset.names == [r"a\x1b]0;PWN\x07\nb.png", r"c\u202egnp.png"]
    assert [dataset.read(i).shape for i in (0, 1)] == [(10, 20, 3), (10, 21, 3)]


def test_files_that_are_no_images_by_their_names_are_counted(photos, caplog):
    put(photos, "a.png", "b/c.png")
    for name in ("a.txt", "b/b.txt", "b/raw", "b/clip.mp4"):
        (photos / name).touch()
    with caplog.at_level("INFO", "dino_ssl"):
        Folder(path=str(photos)).open()
    assert "no images by their names: 2 .txt, 1 .mp4, 1 without suffix." in caplog.text
