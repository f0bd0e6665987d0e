"""Linear and low-shot evaluation on several ranks equal one rank; the ranks are threads."""

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "equations"))

from test_linear import CONTEXT, QUICK, Conv, Tinted, fit, prepare

from dino_ssl import distributed
from dino_ssl.evals.low_shot import LowShot


class Ranks:
    """`world` threads with the collectives of ranks."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.local, self.box = world, threading.local(), [torch.empty(0)] * world
        self.barrier = threading.Barrier(world, timeout=60)
        monkeypatch.setattr(distributed, "world_size", lambda: self.size)
        monkeypatch.setattr(distributed, "rank", lambda: self.local.rank)
        monkeypatch.setattr(distributed, "all_gather", lambda rows: torch.cat(self.exchange(rows)))
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda value: torch.stack(self.exchange(value)).sum(0))

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        self.box[self.local.rank] = tensor
        self.barrier.wait()
        tensors = list(self.box)
        self.barrier.wait()
        return tensors

    def run(self, work: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def target(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work()
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("crops", [0, 2])
def test_ranks_train_the_classifiers_of_one_rank(crops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, train = replace(QUICK, crops=crops, epochs=3, lr=(0.01, 0.3)), Tinted(50, bad=(5, 6))
    prepared = prepare(settings, train=train, val=Tinted(31, bad=(0,), seed=1))
    expected, expected_weights = prepared(Conv()), fit(settings, Conv(), train)
    networks, ranks = iter([Conv() for _ in range(6)]), Ranks(3, monkeypatch)
    for weights in ranks.run(lambda: fit(settings, next(networks), train)):
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)
    for scores in ranks.run(lambda: prepared(next(networks))):
        assert dict(scores) == pytest.approx(dict(expected))
        assert scores.details["selected"] == expected.details["selected"]
        for row, expected_row in zip(scores.details["sweep"], expected.details["sweep"], strict=True):
            assert row == pytest.approx(expected_row)
    assert 30 < expected["top-1"] < 100  # sensitive to differences


def test_ranks_solve_the_regression_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Tinted(60, labels=[(i * i // 3) % 4 for i in range(60)], bad=(5, 6))
    val = Tinted(31, bad=(0,), seed=1)
    prepared = LowShot(share=(0.5,), subsets=2, k=3).prepare((train, val), CONTEXT)
    expected = prepared(Conv())
    networks = iter([Conv(), Conv()])
    for scores in Ranks(2, monkeypatch).run(lambda: prepared(next(networks))):
        assert dict(scores) == pytest.approx(dict(expected))
        losses = [[run["loss"] for run in each.details["subsets"]["50 %"]] for each in (scores, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert expected["50 %"] < 100
