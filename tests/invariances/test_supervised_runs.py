"""Supervised runs are equal after a resume; they learn, and start from pretrained weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, RUN, differences, edit, fit, same_training
from torch import nn

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.online import classifier_accuracy, majority_class_accuracy
from dino_ssl.events import Evaluated, Started
from dino_ssl.methods.supervised import SupervisedConfig
from dino_ssl.metrics import read_metrics
from dino_ssl.models.backbone import Backbone, Features
from dino_ssl.models.heads import Network
from dino_ssl.models.pretrained import load
from dino_ssl.training import train

LABELS = edit(
    RUN,
    backbone=dict(depth=1),
    method=SupervisedConfig(),
    views=Augment(size=32, repeats=2),
    optim=dict(epochs=2, layer_decay=0.5, warmup_lr=1e-4),
)
"""5 steps per epoch, 10 in total; mixing, repeats, erasing, drop-path and layer-wise learning rates are active."""


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    whole = edit(LABELS, out=str(tmp_path / "whole"), online_eval=dict(every_epochs=1))
    evaluated = [event for event in fit(whole) if isinstance(event, Evaluated)]
    assert [event.name for event in evaluated] == ["accuracy"] * 2
    part = edit(whole, out=str(tmp_path / "part"))
    fit(part, until=8)
    fit(part, resume=True)
    assert not same_training(part, whole)
    ends = [[line for line in read_metrics(Path(run.out)) if "eval" in line] for run in (part, whole)]
    assert ends[0] == ends[1]
    assert {"top-1", "top-5"} <= ends[0][0].keys()


class Colors(ImageDataset):
    """Images of two colors at random brightness."""

    def __init__(self, count: int) -> None:
        super().__init__(
            names=[str(i) for i in range(count)],
            sizes=np.full((count, 2), 32),
            labels=np.arange(count) % 2,
            classes=["red", "blue"],
        )

    def read(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        image = np.full((32, 32, 3), 90.0)
        image[..., 2 * (index % 2)] += 60
        return (image * rng.uniform(0.5, 1.5) + rng.normal(0, 10, image.shape)).clip(0, 255).astype(np.uint8)


def test_classifier_learns_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scenes, "open", lambda self, progress=None: Colors(self.count))
    run = edit(
        LABELS,
        out=str(tmp_path / "run"),
        data=Scenes(count=32),
        val=Scenes(count=20),
        views=dict(operations=0, repeats=1),
        optim=dict(epochs=6, layer_decay=1.0, lr=0.03),
        online_eval=dict(every_epochs=6),
        save_minutes=60,
    )
    events = list(train(run, CPU, run.data.open()))
    started = next(event for event in events if isinstance(event, Started))
    assert started.val_set is not None
    assert (len(started.train_set), len(started.val_set)) == (32, 20)  # none is held out if there is a validation set
    assert started.reference_scores == {"majority_class": {"top-1": 50.0, "top-5": 100.0}}
    (evaluated,) = [event for event in events if isinstance(event, Evaluated)]
    assert evaluated.values["top-1"] >= 95
    assert json.loads((tmp_path / "run/run.json").read_text())["run"]["val"]["count"] == 20


def test_fine_tuning_starts_from_a_run_and_exports_a_backbone(tmp_path: Path) -> None:
    """The initial weights are bit-identical to the teacher's of another run, which a resume does not need."""
    first = edit(LABELS, out=str(tmp_path / "first"), optim=dict(epochs=1), method=RUN.method, views=RUN.views)
    fit(first)
    run = edit(LABELS, out=str(tmp_path / "second"), init=first.out, optim=dict(epochs=1))
    started = fit(edit(run, optim=dict(lr=0.0, warmup_lr=0.0, min_lr=0.0)))[0]
    assert isinstance(started, Started)
    teacher = load(first.out).state_dict()
    assert not differences(dict(started.method.backbone.state_dict()), dict(teacher))
    for file in ("backbone.safetensors", "checkpoints/last.pt"):  # with a learning rate of 0
        assert not differences(dict(load(Path(run.out) / file).state_dict()), dict(teacher))
    again = edit(run, out=str(tmp_path / "third"))
    fit(again, until=3)
    (tmp_path / "first/backbone.safetensors").unlink()
    (tmp_path / "first/checkpoints/last.pt").unlink()
    fit(again, resume=True)
    with pytest.raises(UserError, match="do not fit"):
        fit(edit(run, out=str(tmp_path / "fourth"), init=run.out, backbone=dict(depth=2)))


def test_dino_needs_two_views_of_an_image() -> None:
    with pytest.raises(UserError, match="2 views"):
        edit(RUN, views=Augment())
    assert edit(LABELS, views=MultiCrop()).views == MultiCrop()  # a classifier accepts any number


class Dial(Backbone):
    """Returns the gray level of an image."""

    embed_dim, patch = 1, 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3))[:, None]

    def features(self, images: torch.Tensor, layers: int = 1) -> list[Features]:
        raise NotImplementedError


class Numbers(ImageDataset):
    def __init__(self, labels: list[int], classes: int) -> None:
        super().__init__(
            names=[str(i) for i in range(len(labels))],
            sizes=[(8, 8)] * len(labels),
            labels=labels,
            classes=[str(c) for c in range(classes)],
        )

    def read(self, index: int) -> np.ndarray:
        return np.full((8, 8, 3), 255 * (index % 2), np.uint8)


def test_accuracy_counts_top1_and_top5() -> None:
    """Black images rank classes 0 1 2 ... 6, white ones 6 5 4 ... 0."""
    head = nn.Linear(1, 7)
    head.weight.data = torch.arange(7.0)[:, None]
    head.bias.data.zero_()
    # images 0 2 4 6 are black, 1 3 5 white; one has no label
    asked = Numbers([0, 6, 4, 0, 5, 5, -1], 7)
    network = Network(Dial(), head).train()
    accuracy = classifier_accuracy(network, asked, 8, EvalContext(batch_size=2))
    assert accuracy == pytest.approx({"top-1": 100 * 2 / 6, "top-5": 100 * 4 / 6})
    assert network.training
    # 5 is the most frequent; 5, 0, 4 and, of the rest without any, 1 and 2 are the first five
    assert majority_class_accuracy(Numbers([5, 5, 4, 0], 7), asked) == pytest.approx(
        {"top-1": 100 * 2 / 6, "top-5": 100 * 5 / 6}
    )
