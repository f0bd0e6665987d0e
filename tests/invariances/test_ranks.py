"""Two ranks with half the batch each give the result of one rank with the whole batch, for every method."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from timm.layers import BatchNormAct2d  # pyright: ignore[reportPrivateImportUsage]
from tiny import RUN, Run, differences, edit, fit, last, run_on_ranks
from torch import nn

from dino_ssl.config import to_dict
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.scheduled import ScheduledEval
from dino_ssl.methods import BYOLConfig, MoCoConfig, SupervisedConfig, SwAVConfig
from dino_ssl.metrics import read_metrics
from dino_ssl.models.sync_bn import convert_sync_batchnorm
from dino_ssl.models.timm import Timm
from dino_ssl.state import build_method

CONVNET = Timm(name="resnet18", args=(("channels", "(8, 8, 8, 16)"), ("layers", "(1, 1, 1, 1)")))
NARROW = dict(width=24, depth=1, heads=2, drop_path=0.0)
PLAIN = edit(RUN, backbone=NARROW, optim=dict(algorithm="sgd", lr=0.3, epochs=2), save_minutes=60)
"""10 steps without drop-path, which is random per rank. SGD, because AdamW turns rounding errors of gradients that are
zero into steps of full size."""
KNN_EVAL = ScheduledEval(
    evaluation=KNN(k=(3,)), sources=(Scenes(count=30, size=32, classes=4, seed=1),), every_epochs=1
)
SMALL = dict(head_dim=16, head_hidden=32)


class Case(NamedTuple):
    """Changes of the run, and of the run on two ranks only; the largest rounding error of a weight."""

    changes: dict[str, Any]
    on_two_ranks: dict[str, Any] | None = None
    rounding: float = 1e-5


CASES = {
    "dino": Case(dict(optim=dict(lr=1.0), online_eval=dict(every_epochs=1), evals=(KNN_EVAL,), keep_every=1)),
    "sinkhorn over micro-batches": Case(
        dict(method=dict(targets="sinkhorn", teacher="previous-epoch")), dict(optim=dict(micro_batch=3))
    ),
    "batch softmax": Case(dict(method=dict(targets="batch-softmax", teacher="student"))),
    "batch norm everywhere, mse, predictor": Case(
        dict(
            method=dict(loss="mse", predictor=True, head_norm="batch", teacher="previous-step"),
            backbone=CONVNET,
            optim=dict(lr=0.1),  # at 0.3 a ConvNet's rounding grows faster
        )
    ),
    "byol": Case(dict(method=BYOLConfig(**SMALL, momentum=0.9)), rounding=5e-4),  # pyright: ignore[reportArgumentType]
    "moco": Case(
        dict(method=MoCoConfig(**SMALL, queue=37, momentum=0.9)),  # pyright: ignore[reportArgumentType]
        rounding=5e-4,
    ),
    "swav": Case(
        dict(method=SwAVConfig(**SMALL, out_dim=20, queue=19, queue_from=1)),  # pyright: ignore[reportArgumentType]
        rounding=5e-4,
    ),
    "supervised": Case(
        dict(
            method=SupervisedConfig(),
            views=Augment(size=32, repeats=2),
            optim=dict(algorithm="adamw", lr=0.03, layer_decay=0.5, warmup_lr=1e-4),
            online_eval=dict(every_epochs=1),
        )
    ),
}
"""16 keys per step wrap around in MoCo's queue of 37; SwAV's is full, and used, from step 8 on."""
MEANS = {
    "loss",
    "teacher_entropy",
    "kl",
    "lr",
    "weight_decay",
    "momentum",
    "teacher_temp",
    "3-NN",
    "20-NN",
    "top-1",
    "top-5",
}
"""Metrics that are means over images and do not depend on the number of ranks."""


def test_two_ranks_with_half_the_batch_equal_one(tmp_path: Path) -> None:
    """Weights, teacher, center, queue, statistics of batch norm, metrics and evaluations; then resume on one rank."""
    ones = {name: edit(PLAIN, out=str(tmp_path / name / "one"), **case.changes) for name, case in CASES.items()}
    twos = {
        name: edit(one, out=f"{tmp_path / name}/two", **(CASES[name].on_two_ranks or {})) for name, one in ones.items()
    }
    files = [tmp_path / f"{name}.json" for name in twos]
    for file, run in zip(files, twos.values(), strict=True):
        file.write_text(json.dumps(to_dict(run)))
    run_on_ranks([str(Path(__file__).with_name("train_runs.py")), *map(str, files)], 2)
    for name, one in ones.items():
        fit(one)
        assert_close(twos[name], one, CASES[name].rounding)
        begun = build_method(one, classes=4).state_dict()
        assert len(differences(last(one)["method"], begun, same=torch.allclose)) > 10, f"{name}: nothing was trained"

    resumed = edit(ones["dino"], out=str(tmp_path / "resumed"))
    shutil.copytree(twos["dino"].out, resumed.out)
    os.replace(Path(resumed.out) / "checkpoints/epoch_0001.pt", Path(resumed.out) / "checkpoints/last.pt")
    assert last(resumed)["step"] == 5
    fit(resumed, resume=True)
    assert_close(resumed, ones["dino"], CASES["dino"].rounding)


def assert_close(run: Run, whole: Run, rounding: float) -> None:
    def close(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.allclose(one, other, rtol=1e-4, atol=rounding)

    assert last(run)["step"] == last(whole)["step"] == 10
    assert not differences(last(run)["method"], last(whole)["method"], whole.out, same=close)
    for line, expected in zip(read_metrics(Path(run.out)), read_metrics(Path(whole.out)), strict=True):
        assert line["step"] == expected["step"]
        for name in MEANS & expected.keys():
            assert line[name] == pytest.approx(expected[name], abs=1e-4), (whole.out, line["step"], name)


@pytest.mark.parametrize("fused", [False, True])
def test_converted_norms_keep_their_activation(fused: bool) -> None:
    """timm's norms with an activation, and torch's: equal values, names and parameters after conversion."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.BatchNorm2d(4))
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    network(x)  # statistics of its own
    names, parameters = list(network.state_dict()), list(network.parameters())
    expected = network.eval()(x)
    changed = convert_sync_batchnorm(network, fused=fused)
    torch.testing.assert_close(changed.eval()(x), expected)
    assert not isinstance(changed[1], BatchNormAct2d)  # pyright: ignore[reportIndexIssue]
    assert list(changed.state_dict()) == names
    assert all(a is b for a, b in zip(changed.parameters(), parameters, strict=True))
