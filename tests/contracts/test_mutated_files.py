"""Property-based: files of every format with changed content are read correctly or refused with a UserError."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import dino_ssl
from dino_ssl import checkpoint
from dino_ssl.api.resolve import find_run
from dino_ssl.config import to_dict
from dino_ssl.data.benchmarks.davis import open_davis
from dino_ssl.data.benchmarks.revisited import read_ground_truth
from dino_ssl.data.benchmarks.voc import open_voc
from dino_ssl.data.shard_writer import pack
from dino_ssl.data.shards import open_shards
from dino_ssl.errors import UserError
from dino_ssl.evals.resumable import find_state
from dino_ssl.metrics import read_metrics
from dino_ssl.models.weights import save_backbone
from dino_ssl.report.run_report import write_report
from dino_ssl.run import Run, read_description, read_run

FEW = settings(
    max_examples=40, deadline=10_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from(["../../etc/passwd", "/proc", "nan", "x:y", [], {}, [1], {"type": "ViT"}, 10**7, -1, 0]),
)  # fmt: skip
VIT = dino_ssl.ViT(width=8, depth=1, heads=1, patch=16, image_size=32)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """Return a copy of JSON data in which one value, at any depth, is another one or missing."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 5)):
        value = copy.copy(value)
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        if draw(st.integers(0, 5)):
            value[key] = draw(mutated(value[key]))
        else:
            del value[key]
        return value
    return copy.deepcopy(draw(SCALARS))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes of which some are changed, missing or repeated."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(1, 64))
        part = draw(
            st.sampled_from([b"", b"\0" * length, b"\xff" * length, bytes(content[start : start + length]) * 2])
        )
        content[start : start + length] = part
    return bytes(content)


def refused_or_read(read: Callable[[], Any]) -> Any:
    """Return what is read, or None for a UserError; every other exception fails the test."""
    try:
        return read()
    except UserError:
        return None


RUN = {
    "format": 1,
    "run": to_dict(Run()),
    "data": {"images": 24, "trained_on": 22, "validated_on": 2, "classes": ["a"], "skipped": 0, "fingerprint": "0"},
    "reference_scores": {"raw_pixels": {"20-NN": 33.0}},
    "versions": {"dino": "1"},
}


@FEW
@given(mutated(RUN))
def test_run_json(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(json.dumps(content))
    run = refused_or_read(lambda: read_run(folder))
    refused_or_read(lambda: read_description(folder))
    if run is not None:
        refused_or_read(lambda: write_report(folder, thumbnails=False))
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints/last.pt").touch()
        refused_or_read(lambda: find_run(folder))


@FEW
@given(mutated({"format": 1, "step": 3, "loss": 2.0, "epoch": 0.5, "eval": "knn", "20-NN": 40.0}))
def test_metrics_jsonl(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    refused_or_read(lambda: read_metrics(folder))
    refused_or_read(lambda: write_report(folder, thumbnails=False))


@FEW
@given(mutated(
    {"format": 1, "run": {"backbone": to_dict(VIT)}, "step": 3, "method": {"a": 1}, "backbone": "a.", "optimizer": {},
     "scaler": {}, "best": {}, "data": "x", "preprocessing": {"size": 32}}
))  # fmt: skip
def test_checkpoints(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.mktemp("run") / "last.pt"
    if isinstance(content, dict) and isinstance(content.get("method"), dict):
        content["method"]["a.weight"] = torch.ones(2)
    torch.save(content, path)
    refused_or_read(lambda: checkpoint.load(path))
    refused_or_read(lambda: dino_ssl.load(path))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of the same weights as .safetensors and as .bin."""
    folder, weights = tmp_path_factory.mktemp("exported"), VIT.build().state_dict()
    torch.save(weights, folder / "weights.bin")
    save_backbone(VIT, weights, folder / "backbone.safetensors")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@FEW
@given(st.data())
def test_weights(tmp_path_factory: pytest.TempPathFactory, exported: dict[str, bytes], suffix: str, data: Any) -> None:
    path = tmp_path_factory.mktemp("weights") / f"a{suffix}"
    original = exported[suffix]
    path.write_bytes(data.draw(damaged(original)))
    loaded = refused_or_read(lambda: dino_ssl.load(path))
    if loaded is not None and suffix == ".safetensors":  # the checksum finds every change of a weight
        path.write_bytes(original)
        expected = dino_ssl.load(path).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for index in range(4):
        (folder / f"photos/{'ab'[index % 2]}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (index, 0, 0)).save(folder / f"photos/{'ab'[index % 2]}/{index}.png")
    pack(folder / "photos", folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("name", ["index.arrow", "info.json"])
@FEW
@given(st.data())
def test_shards(shards: Path, name: str, data: Any) -> None:
    original = (shards / name).read_bytes()
    content = data.draw(damaged(original) if name != "info.json" else mutated(json.loads(original)))
    try:
        (shards / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        dataset = refused_or_read(lambda: open_shards(shards))
        for index in range(len(dataset)) if dataset is not None else []:
            if refused_or_read(lambda index=index: dataset[index]) is not None:
                label = dataset[index][1]
                assert -1 <= label < max(1, len(dataset.classes))
                assert ".." not in dataset.names[index]
    finally:
        (shards / name).write_bytes(original)


@FEW
@given(
    mutated({"format": 1, "weights": "w", "dataset": "d", "preprocessing": {}, "precision": "p", "done": 3, "rows": 2})
)
def test_state_of_resumable_features(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    folder = tmp_path_factory.mktemp("partial")
    (folder / "state.json").write_text(json.dumps(state))
    job = {"format": 1, "weights": "w", "dataset": "d", "preprocessing": {}, "precision": "p"}
    (folder / "features.f32").write_bytes(bytes(4 * 8 * 2))
    (folder / "indices.i64").write_bytes(np.arange(2).tobytes())
    found = refused_or_read(lambda: find_state(folder, job, 5, 8))
    assert found in (None, (0, 0), (3, 2)) or (0 <= found[1] <= 2 and found[1] <= found[0] <= 5)


GROUND_TRUTH = {
    "imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [{"bbx": [0, 0, 5, 5], "easy": [0], "hard": [1], "junk": []}]
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
@FEW
@given(content=mutated(GROUND_TRUTH))
def test_ground_truth_of_retrieval(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: Any) -> None:
    path = tmp_path_factory.mktemp("gnd") / f"gnd_a{suffix}"
    path.write_bytes(json.dumps(content).encode() if suffix == ".json" else pickle.dumps(content))
    refused_or_read(lambda: read_ground_truth(path))


@pytest.mark.parametrize("open_split", [open_voc, open_davis])
@FEW
@given(
    names=st.lists(
        st.one_of(st.text(max_size=8), st.sampled_from(["../../x", "/etc/passwd", "a", "a\0b", "*"])), max_size=4
    )
)
def test_lists_of_names(tmp_path_factory: pytest.TempPathFactory, open_split: Callable, names: list[str]) -> None:
    root = tmp_path_factory.mktemp("split")
    for folder in (
        "ImageSets/Segmentation",
        "ImageSets/2017",
        "JPEGImages/480p/a",
        "Annotations/480p",
        "SegmentationClass",
    ):
        (root / folder).mkdir(parents=True)
    for folder in ("Segmentation", "2017"):
        (root / f"ImageSets/{folder}/val.txt").write_text("\n".join(names), "utf-8", "replace")
    refused_or_read(lambda: open_split(root))
    shutil.rmtree(root)
