"""Features that are kept on disk while they are computed: interrupted and resumed, they equal those of one go."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

import dino_ssl
from dino_ssl.cli import main
from dino_ssl.data.folder import FolderDataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals import resumable
from dino_ssl.models import ViT
from dino_ssl.models.vit import VisionTransformer
from dino_ssl.models.weights import save_backbone

VIT = ViT(width=48, depth=1, heads=2, patch=8, image_size=32, drop_path=0.0)
DAMAGED = 5
"""Index of an image that cannot be read."""


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four images."""
    monkeypatch.setattr(resumable, "FIRST_CHUNK", 4)
    monkeypatch.setattr(resumable, "LAST_CHUNK", 4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 14 images in two classes; one cannot be read, which is seen only when it is decoded."""
    folder = tmp_path / "photos"
    Scenes(count=14, size=40, classes=2).write(folder)
    damaged = dino_ssl.Folder(path=str(folder)).open().names[DAMAGED]
    data = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(data[:200] + bytes(len(data) - 300) + data[-100:])  # size and end are intact
    return folder


def network(seed: int, path: Path) -> Path:
    torch.manual_seed(seed)
    return save_backbone(VIT, VIT.build().state_dict(), path)


def stop_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the forward pass of this batch."""
    forward, count = VisionTransformer.forward, 0

    def interrupted(self: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == batch:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(VisionTransformer, "forward", interrupted)


def content(path: Path) -> tuple[list[str], list[str], np.ndarray, dict]:
    """Return names, labels, features and metadata of a file of features."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            metadata = json.loads(str(file["metadata"]))
            return file["name"].tolist(), file["label"].tolist(), file["feature"], metadata
    if path.suffix == ".csv":
        rows = list(csv.reader(path.read_text().splitlines()))[1:]
        return [row[0] for row in rows], [row[1] for row in rows], np.array([row[2:] for row in rows], np.float32), {}
    table = pyarrow.parquet.read_table(path)
    columns = table.to_pydict()
    metadata = json.loads(table.schema.metadata[b"dino"])
    return columns["name"], columns["label"], np.array(columns["feature"], np.float32), metadata


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("suffix", ["parquet", "npz", "csv"])
def test_an_interrupted_command_resumes(suffix: str, photos: Path, tmp_path: Path, monkeypatch, capsys):
    weights, out = network(0, tmp_path / "net.safetensors"), tmp_path / f"features.{suffix}"
    line = ["embed", str(weights), str(photos), "-o", str(out), "--batch-size", "2"]
    with monkeypatch.context() as patch:
        stop_at(6, patch)  # the second batch of the third chunk
        assert main(line) == 130
    assert "resumes from" in capsys.readouterr().out
    assert not out.exists()
    partial = tmp_path / f"{out.name}.partial"
    with (partial / "features.f32").open("ab") as file:
        file.write(b"left by a killed process")
    decoded, read = [], FolderDataset.read_downscaled
    monkeypatch.setattr(
        FolderDataset, "read_downscaled", lambda self, index, times: decoded.append(index) or read(self, index, times)
    )
    assert main([*line, "--json"]) == 0
    output = capsys.readouterr()
    assert "Resuming after 8 of 14 images" in output.err
    assert decoded == [*range(8, 14), 5]  # the broken one again, for its reason
    assert not partial.exists()

    expected = dino_ssl.embed(weights, photos, batch_size=2)
    names, labels, features, metadata = content(out)
    assert (names, labels) == (expected.names, expected.labels)
    assert len(names) == 13
    np.testing.assert_array_equal(features, expected.features)
    result = json.loads(output.out)
    assert [item["name"] for item in result["skipped"]] == [item.name for item in expected.skipped]
    assert result["precision"] == expected.precision
    assert result == {**result, **metadata}


@pytest.mark.usefixtures("chunks")
def test_other_weights_images_or_settings_are_refused(photos: Path, tmp_path: Path, monkeypatch):
    weights, partial = network(0, tmp_path / "a.safetensors"), tmp_path / "partial"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            dino_ssl.embed(weights, photos, partial=partial, precision="float32")
    other = network(1, tmp_path / "b.safetensors")
    for arguments, options, field in (
        ((other, photos), {}, "weights"),
        ((weights, [Scenes(size=32).read(0)]), {}, "dataset"),
        ((weights, photos), {"size": 24}, "preprocessing"),
        ((weights, photos), {"precision": "bfloat16"}, "precision"),
    ):
        with pytest.raises(UserError, match=rf"holds the features of another job:\n  {field}: .* now") as raised:
            dino_ssl.embed(*arguments, partial=partial, **{"precision": "float32", **options})
        assert len(str(raised.value).splitlines()) == 3
    resumed = dino_ssl.embed(weights, photos, partial=partial, precision="float32")
    complete = dino_ssl.embed(weights, photos, batch_size=4, precision="float32")
    np.testing.assert_array_equal(resumed.features, complete.features)


def test_chunks_grow_while_they_are_quick(photos: Path, tmp_path: Path, monkeypatch):
    lengths, extract = [], resumable.extract
    monkeypatch.setattr(resumable, "FIRST_CHUNK", 2)
    monkeypatch.setattr(resumable, "LAST_CHUNK", 8)
    monkeypatch.setattr(
        resumable, "extract", lambda net, data, context: lengths.append(len(data)) or extract(net, data, context)
    )
    dino_ssl.embed(VIT.build(), photos, partial=tmp_path / "a")
    assert lengths == [2, 4, 8]
    monkeypatch.setattr(resumable, "CHUNK_SECONDS", 0)
    dino_ssl.embed(VIT.build(), photos, partial=tmp_path / "b")
    assert lengths[3:] == [2] * 7


def test_no_readable_image_is_an_error(photos: Path, tmp_path: Path):
    dataset = dino_ssl.Folder(path=str(photos)).open().subset([DAMAGED])
    with pytest.raises(UserError, match="None of the 1 images can be read"):
        dino_ssl.embed(VIT.build(), dataset, partial=tmp_path / "partial")


def test_bfloat16_features_are_close_to_those_of_float32(tmp_path: Path, monkeypatch):
    weights, images = network(0, tmp_path / "net.safetensors"), [Scenes(size=40).read(index) for index in range(4)]
    exact, close = (dino_ssl.embed(weights, images, precision=name) for name in ("float32", "bfloat16"))
    assert (exact.precision, close.precision) == ("float32", "bfloat16")
    assert close.features.dtype == np.float32
    assert (exact.features != close.features).any()
    cosine = (exact.features * close.features).sum(1)
    cosine /= np.linalg.norm(exact.features, axis=1) * np.linalg.norm(close.features, axis=1)
    assert (cosine > 0.999).all()
    for supported, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("dino_ssl.runtime._cpu_info", lambda supported=supported: ("CPU", supported))
        assert dino_ssl.embed(weights, images[:1], device="cpu").precision == expected


def test_cached_features_have_the_precision_of_the_evaluation(tmp_path: Path):
    """The features of one precision are not read as those of the other."""
    weights = network(0, tmp_path / "net.safetensors")
    results = []
    for precision in ("float32", "bfloat16"):
        result = dino_ssl.evaluate(weights, "knn", Scenes(count=20, size=32, classes=2), precision=precision)
        results.append(result["precision"])
    assert results == ["float32", "bfloat16"]
    assert len(list((tmp_path / "evals/features").glob("*"))) == 2 * 2  # of the training and validation images
