"""Two ranks with half the batch each give the result of one rank with the whole batch."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import Run, differences, edit, fit, last, spawn_ranks, tiny

from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.scheduled import ScheduledEval
from dino_ssl.metrics import read_metrics

RANK_INVARIANT = {"loss", "teacher_entropy", "kl", "lr", "weight_decay", "momentum", "teacher_temp"}
"""Means over images, which do not depend on the number of ranks; the marginal entropy is computed per rank."""


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=2e-6)


def assert_close(run: Run, whole: Run) -> None:
    assert last(run)["step"] == last(whole)["step"] > 0
    assert not differences(last(run)["method"], last(whole)["method"], same=close)
    for line, expected in zip(read_metrics(Path(run.out)), read_metrics(Path(whole.out)), strict=True):
        assert line["step"] == expected["step"]
        for name in RANK_INVARIANT & expected.keys():
            assert line[name] == pytest.approx(expected[name], abs=1e-5), (line["step"], name)
        assert {k: v for k, v in line.items() if "NN" in k} == {k: v for k, v in expected.items() if "NN" in k}


def test_two_ranks_with_half_the_batch_equal_one(tmp_path: Path) -> None:
    """Compare weights, teacher, center, metrics and k-NN; then resume the checkpoint of two ranks on one.

    Without drop-path, which is random per rank. SGD instead of AdamW, which turns rounding errors of gradients that
    are zero into steps of full size.
    """
    one = tiny(
        tmp_path / "one",
        backbone=dict(drop_path=0.0),
        optim=dict(algorithm="sgd", lr=1.0, epochs=2),
        online_eval=dict(every_epochs=1),
        evals=(
            ScheduledEval(
                evaluation=KNN(k=(3,)), sources=(Scenes(count=30, size=32, classes=4, seed=1),), every_epochs=1
            ),
        ),
        keep_every=1,
    )
    fit(one)
    two = edit(one, out=str(tmp_path / "two"))
    spawn_ranks(two, 2)
    assert_close(two, one)

    alone = edit(one, out=str(tmp_path / "alone"))
    shutil.copytree(two.out, alone.out)
    os.replace(Path(alone.out) / "checkpoints" / "epoch_0001.pt", Path(alone.out) / "checkpoints" / "last.pt")
    assert last(alone)["step"] == 5
    fit(alone, resume=True)
    assert_close(alone, one)

    still = edit(one, out=str(tmp_path / "still"), optim=dict(lr=0.0, min_lr=0.0))
    fit(still)
    assert differences(last(still)["method"], last(one)["method"], same=close)  # training changed the weights
