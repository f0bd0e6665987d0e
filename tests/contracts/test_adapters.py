"""Torch datasets and lists in place of a folder: items, labels, fingerprint, resume record, training batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import dino_ssl
from dino_ssl.data.adapters import ExternalDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import train_batches
from dino_ssl.data.sources import config_of, open_dataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError

IMAGES = [Scenes(size=24).read(i)[: 20 + i] for i in range(4)]


class Labeled(Dataset):
    """Dataset of (PIL image, label) with class names, as of torchvision."""

    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(IMAGES[index]), index % 2


def test_every_kind_of_item_gives_the_same_images(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    sources = [
        sorted(tmp_path.iterdir()),
        [str(path) for path in sorted(tmp_path.iterdir())],
        [Image.fromarray(image) for image in IMAGES],
        IMAGES,
        [torch.from_numpy(image).movedim(-1, 0) for image in IMAGES],
        [(image, 1) for image in IMAGES],
        Labeled(),
    ]
    for source in sources:
        dataset = open_dataset(source)
        assert dataset.sizes.tolist() == [[24, 20], [24, 21], [24, 22], [24, 23]]
        assert all(np.array_equal(dataset.read(i), image) for i, image in enumerate(IMAGES))
    assert open_dataset(sources[0]).names == [str(path) for path in sources[0]]


def test_labels_and_classes() -> None:
    dataset = open_dataset(Labeled())
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.classes) == ([0, 1, 0, 1], ["cat", "dog"])
    assert [label for _, label in dataset] == [0, 1, 0, 1]
    tensors = open_dataset(TensorDataset(torch.zeros(3, 1, 8, 9, dtype=torch.uint8), torch.tensor([2, 0, 1])))
    assert (tensors.classes, tensors.read(0).shape) == (["0", "1", "2"], (8, 9, 3))
    assert open_dataset(IMAGES).labels is None
    assert open_dataset([(image, {"boxes": []}) for image in IMAGES]).labels is None


def test_fingerprint_covers_type_order_labels_and_pixels() -> None:
    changed = [image.copy() for image in IMAGES]
    changed[3][0, 0, 0] ^= 1
    sources = [IMAGES, changed, IMAGES[::-1], IMAGES[:3], tuple(IMAGES), [(image, 0) for image in IMAGES], Labeled()]
    keys = [open_dataset(source).fingerprint for source in sources]
    assert len(set(keys)) == len(sources)
    assert keys == [open_dataset(source).fingerprint for source in sources]
    assert open_dataset(IMAGES).content_key == keys[0]


def test_run_json_records_the_dataset_and_asks_for_it_on_resume(tmp_path: Path) -> None:
    dataset = open_dataset(IMAGES)
    config = config_of(IMAGES, dataset)
    assert config == config_of(IMAGES) == ExternalDataset(kind="list", length=4, fingerprint=dataset.fingerprint)
    with pytest.raises(UserError, match="Pass the same dataset again to resume"):
        config.open()
    assert config_of(tmp_path) == Folder(path=str(tmp_path))
    assert config_of("scenes") == Scenes()
    assert config_of(Scenes(count=3)) == Scenes(count=3)


def test_training_batches_are_those_of_the_same_files(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES):
        (tmp_path / "cd"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "cd"[i % 2] / f"{i}.png")
    order = [0, 2, 1, 3]
    items = [(IMAGES[i], i % 2) for i in order]
    views = MultiCrop(global_size=16, local_size=8, local=1)
    runs = [
        list(train_batches(open_dataset(source), views, batch_size=2, seed=0, epochs=1, workers=workers))
        for source, workers in ((tmp_path, 0), (items, 2))
    ]
    for a, b in zip(*runs, strict=True):
        assert all(map(torch.equal, (*a.batch.views, a.batch.labels), (*b.batch.views, b.batch.labels)))


def test_attention_accepts_every_kind_of_image_and_dataset(tmp_path: Path) -> None:
    backbone = dino_ssl.ViT(width=24, depth=1, heads=2, patch=8, image_size=16).build()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    expected = [dino_ssl.attention(backbone, image, size=16).mean for image in IMAGES]
    for source in (tmp_path, sorted(tmp_path.iterdir()), IMAGES, Labeled()):
        found = dino_ssl.attention(backbone, source, size=16)
        assert all(np.array_equal(maps.mean, mean) for maps, mean in zip(found, expected, strict=True))
    for image in (tmp_path / "0.png", Image.fromarray(IMAGES[0])):
        assert np.array_equal(dino_ssl.attention(backbone, image, size=16).mean, expected[0])
    points = dino_ssl.attention(backbone, Labeled(), point=[(3, 4), (20, 10)], size=16)
    assert [len(maps) for maps in points] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        ([np.zeros((4, 4, 3))], r"expected .* got ndarray of float64 \(4, 4, 3\)"),
        ([torch.zeros(4, 4, 3, dtype=torch.uint8)], r"got Tensor of torch.uint8 \(4, 4, 3\)"),
        ([{"image": 1}], "got dict"),
        (3, "got int"),
        (["a.png", "a.png"], "more than once"),
        (["nowhere.png"], "No such file"),
        (["nowhere.png", "missing.png"], "None of the 2 paths.*No such file"),
        ([(IMAGES[0], 5), (IMAGES[1], 0)], None),
    ],
)
def test_unsupported_sources_are_rejected(source: object, message: str | None) -> None:
    if message is None:
        assert len(open_dataset(source).classes) == 6  # type: ignore[arg-type]
        return
    with pytest.raises(UserError, match=message):
        open_dataset(source)  # type: ignore[arg-type]
