"""DINO's switches give equal results on two ranks with half the batch each and on one rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d  # pyright: ignore[reportPrivateImportUsage]
from tiny import RUN, Run, differences, edit, fit, last, run_on_ranks
from torch import nn

from dino_ssl.config import to_dict
from dino_ssl.metrics import read_metrics
from dino_ssl.models.sync_bn import convert_sync_batchnorm
from dino_ssl.models.timm import Timm

CONVNET = Timm(name="resnet18", args=(("channels", "(8, 8, 8, 16)"), ("layers", "(1, 1, 1, 1)")))
PLAIN = edit(RUN, backbone=dict(drop_path=0.0), optim=dict(algorithm="sgd", lr=0.3, epochs=2), save_minutes=60)
"""Without drop-path, which is random per rank; SGD, because AdamW turns rounding errors into full steps."""

SWITCHES: dict[str, dict[str, Any]] = {
    "sinkhorn": dict(method=dict(targets="sinkhorn", teacher="previous-epoch")),
    "batch softmax": dict(method=dict(targets="batch-softmax", teacher="student")),
    "batch norm in the head": dict(method=dict(head_norm="batch")),
    "batch norm everywhere, mse, predictor": dict(
        method=dict(loss="mse", predictor=True, head_norm="batch", teacher="previous-step"),
        backbone=CONVNET,
        optim=dict(lr=0.1),  # at 0.3 a ConvNet's rounding grows faster
    ),
}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_two_ranks_with_half_the_batch_equal_one(tmp_path: Path) -> None:
    """Weights, teacher, center, the statistics of batch norm, and the loss of every step."""
    alone = {name: edit(PLAIN, out=str(tmp_path / name / "one"), **change) for name, change in SWITCHES.items()}
    shared = {name: edit(run, out=str(tmp_path / name / "two")) for name, run in alone.items()}
    files = []
    for name, run in shared.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(to_dict(run)))
    run_on_ranks([str(Path(__file__).with_name("train_runs.py")), *map(str, files)], 2)
    for name, run in alone.items():
        fit(run)
        assert not differences(last(shared[name])["method"], last(run)["method"], same=close), name
        mine, expected = losses(shared[name]), losses(run)
        assert mine == pytest.approx(expected, abs=1e-4), name
        assert len(expected) == 10
        assert max(expected) - min(expected) > 0.01  # training changed the weights


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(run.out))]


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
