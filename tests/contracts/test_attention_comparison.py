"""benchmarks/attention_dino_supervised.py in miniature: two runs per seed with the same network and images."""

import sys
from pathlib import Path

import pytest

from dino_ssl.config import edit
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.models.vit import ViT
from dino_ssl.presets.small import demo

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import attention_dino_supervised as script


def test_the_same_network_is_trained_both_ways_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = edit(
        demo(),
        data=dict(count=24, size=32, classes=2),
        backbone=ViT(width=24, depth=1, heads=2, patch=8, image_size=32),
        method=dict(out_dim=16, head_hidden=16, head_bottleneck=8),
        optim=dict(epochs=1, batch_size=8, warmup_epochs=0),
        online_eval=dict(every_epochs=0),
    )
    runs = script.runs(base, 3, tmp_path)
    assert isinstance(runs["dino"].method, DINOConfig)
    assert isinstance(runs["supervised"].method, SupervisedConfig)
    for name in ("backbone", "data", "optim", "seed"):
        assert getattr(runs["dino"], name) == getattr(runs["supervised"], name)
    result = script.compare(base, [3], tmp_path, tmp_path / "figure.jpg", count=2)
    assert [row["network"] for row in result["rows"]] == list(script.KINDS)
    assert all(0 <= row["best head"] <= 100 for row in result["rows"])
    assert (tmp_path / "figure.jpg").stat().st_size > 5000
    monkeypatch.setattr(script, "train", None)  # complete runs are not trained again
    assert script.compare(base, [3], tmp_path, tmp_path / "figure.jpg", count=2) == result
