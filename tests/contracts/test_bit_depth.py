"""One bit depth for a dataset with 16 bits per value: estimated, stored with the run, and used wherever it is read."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

import dino_ssl
from dino_ssl.data.bit_depth import estimate_bit_depth
from dino_ssl.data.decode import decode
from dino_ssl.data.folder import Folder
from dino_ssl.data.shard_writer import pack
from dino_ssl.data.shards import PackSettings
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.features import extract
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.run import read_run
from dino_ssl.training_evals import split_dataset

RNG = np.random.default_rng(0)
SETTINGS = dict(
    out_dim=8, head_hidden=8, head_bottleneck=4, warmup_teacher_temp_epochs=0, momentum=0.9, teacher_temp=0.04
)


def write(path: Path, values: np.ndarray) -> Path:
    """Write uint16 values [H, W] or [H, W, 3 or 4] (RGB)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values if values.ndim == 2 else values[:, :, [2, 1, 0, 3][: values.shape[2]]])
    return path


def scans(folder: Path, bits: int = 12, count: int = 12) -> Path:
    """Write gray images of which the last is the brightest, and return their folder."""
    for index in range(count):
        values = RNG.integers(0, 2**bits * (index + 1) // count, (40, 50), dtype=np.uint16)
        write(folder / f"{'ab'[index % 2]}/{index:02d}.{'png' if index % 3 else 'tif'}", values)
    return folder


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3), (40, 60, 4)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_values_are_scaled_by_the_depth_in_gray_and_in_color(tmp_path, shape, suffix):
    values = RNG.integers(0, 4096, shape, dtype=np.uint16)
    if len(shape) == 3:
        values[..., 3:] = 65535  # opaque
    pixels = decode(write(tmp_path / f"a.{suffix}", values), bit_depth=12)
    expected = np.rint(values * (255 / 4095))
    assert np.array_equal(pixels, np.dstack([expected] * 3) if values.ndim == 2 else expected[:, :, :3])


def test_values_above_the_depth_are_white_and_transparent_pixels_too(tmp_path):
    values = np.zeros((4, 4, 4), np.uint16)
    values[0, :, 3], values[1] = 65535, (60000, 60000, 60000, 65535)
    pixels = decode(write(tmp_path / "a.png", values), bit_depth=12)
    assert pixels[:, 0, 0].tolist() == [0, 255, 255, 255]


def test_the_depth_is_that_of_the_dataset_without_hot_pixels(tmp_path):
    bright, dark = np.full((200, 200), 3000, np.uint16), np.full((200, 200), 40, np.uint16)
    bright[0, 0] = 65535
    paths = [write(tmp_path / "a.png", bright), write(tmp_path / "b.png", dark)]
    assert estimate_bit_depth((path, None) for path in paths) == 12
    dataset = Folder(path=str(tmp_path)).open()
    assert dataset.bit_depth == 12
    assert [dataset.read(i)[9, 9, 0] for i in range(2)] == [187, 2]  # 3000 and 40 of 4095
    assert dataset.subset([1]).read(0)[9, 9, 0] == 2
    assert Folder(path=str(tmp_path), bit_depth=14).open().read(0)[9, 9, 0] == 47


def test_the_largest_value_that_a_tiff_states_counts(tmp_path):
    tags = ImageFileDirectory_v2()
    tags[281] = 4095
    Image.fromarray(np.full((9, 9), 100, np.uint16)).save(tmp_path / "a.tif", tiffinfo=tags)
    assert estimate_bit_depth([(tmp_path / "a.tif", None)]) == 12


def test_other_images_have_no_depth(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "b.tif")
    (tmp_path / "c.png").write_bytes(b"no image")
    assert Folder(path=str(tmp_path)).open().bit_depth is None
    with pytest.raises(UserError, match=r"`data.bit_depth` must be at least 8 and at most 16; got 17"):
        Folder(path=str(tmp_path), bit_depth=17)


@pytest.mark.parametrize("settings", [None, PackSettings(side=20, quality=100)])
def test_shards_are_read_as_their_folder(tmp_path, settings):
    folder = Folder(path=str(scans(tmp_path / "scans"))).open()
    shards = pack(tmp_path / "scans", tmp_path / "out", settings)
    assert (folder.bit_depth, shards.bit_depth) == (12, None if settings else 12)
    for index in range(len(folder)):
        if settings is None:
            assert np.array_equal(shards.read(index), folder.read(index))
        assert abs(shards.read(index).mean() - folder.read(index).mean()) < 2


def test_a_run_stores_its_depth_and_reads_other_images_with_it(tmp_path):
    photos, other = scans(tmp_path / "scans"), scans(tmp_path / "other", bits=16)
    network = dino_ssl.ViT(width=8, depth=1, heads=1, patch=16, image_size=32)
    views, optim = dict(global_size=32, local_size=16, local=1), dict(epochs=1, batch_size=4, warmup_epochs=0)
    options = dict(backbone=network, method=dict(SETTINGS), views=views, optim=optim, workers=0, thumbnails=False)
    outcome = dino_ssl.train(photos, preset=dino_ssl.Run(), out=tmp_path / "run", quiet=True, val=other, **options)
    rows = (tmp_path / "run/plan.json").read_text()
    assert "bit depth" in rows
    assert "4,095 is white" in rows
    run = read_run(outcome.folder)
    assert run.data == Folder(path=str(photos), bit_depth=12)
    assert split_dataset(run, run.data.open())[1].bit_depth == 12  # pyright: ignore[reportOptionalMemberAccess]
    for source in (outcome.folder, outcome.folder / "checkpoints/last.pt"):
        backbone = dino_ssl.load(source)
        assert backbone.transform.bit_depth == 12
    features = extract(backbone, Folder(path=str(other)).open(), EvalContext(size=32))
    same = extract(backbone, Folder(path=str(other), bit_depth=12).open(), EvalContext(size=32))
    assert np.array_equal(features.features, same.features)


def test_an_index_keeps_the_depth_of_its_first_build(tmp_path):
    """An update with brighter images, or a query, would be read differently otherwise."""
    photos, other = scans(tmp_path / "scans"), scans(tmp_path / "other", bits=16)
    network = dino_ssl.ViT(width=8, depth=1, heads=1, patch=16, image_size=32).build()
    index = dino_ssl.Index.build(network, photos, path=tmp_path / "index")
    assert index.store.info.preprocessing.bit_depth == 12
    other.rename(photos / "c")
    index = dino_ssl.Index.build(network, photos, path=tmp_path / "index")
    assert index.changes.added == 12
    assert index.store.info.preprocessing.bit_depth == 12
    row = index.items.row_of("c/b/11.png")
    pixels = decode(photos / "c/b/11.png", bit_depth=12)
    assert np.array_equal(index.read(row), pixels)
    assert index.search(pixels, k=1)[0].similarity == pytest.approx(1, abs=1e-3)
    assert index.search(photos / "c/b/11.png", k=1)[0].similarity == pytest.approx(1, abs=1e-3)


def test_pil_images_of_16_bits_are_refused():
    image = Image.fromarray(np.full((9, 9), 3000, np.uint16))
    with pytest.raises(UserError, match=r"got Image of mode I;16, which has no fixed range"):
        Preprocessing()(image)
