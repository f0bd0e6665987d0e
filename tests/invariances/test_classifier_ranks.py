"""Ranks share the pictures of the linear and the low-shot evaluation, and find what one alone finds."""

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

from test_linear import QUICK, SITE, Conv, Tinted, bound, fitted

from dino_ssl import distributed
from dino_ssl.evals.low_shot import LowShot


class Ranks:
    """`world` threads that talk as ranks do: everyone waits for everyone at each call."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.own, self.box = world, threading.local(), [torch.empty(0)] * world
        self.meeting = threading.Barrier(world, timeout=60)
        monkeypatch.setattr(distributed, "world_size", lambda: self.size)
        monkeypatch.setattr(distributed, "rank", lambda: self.own.rank)
        monkeypatch.setattr(distributed, "gather", lambda rows: torch.cat(self.exchange(rows)))
        monkeypatch.setattr(distributed, "total", lambda value: torch.stack(self.exchange(value)).sum(0))

    def exchange(self, mine: Tensor) -> list[Tensor]:
        self.box[self.own.rank] = mine
        self.meeting.wait()
        all_of_them = list(self.box)
        self.meeting.wait()
        return all_of_them

    def run(self, work: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = work()
            except BaseException as error:
                results[rank] = error
                self.meeting.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("crops", [0, 2])
def test_ranks_train_the_classifiers_that_one_trains(crops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, crops=crops, epochs=3, lr=(0.01, 0.3))
    evaluator = bound(settings, train=Tinted(50, bad=(5, 6)), val=Tinted(31, bad=(0,), seed=1))
    alone, weights = evaluator(Conv()), fitted(evaluator, Conv())
    networks, ranks = iter([Conv() for _ in range(6)]), Ranks(3, monkeypatch)
    for found in ranks.run(lambda: fitted(evaluator, next(networks))):
        torch.testing.assert_close(found, weights, atol=1e-5, rtol=1e-5)
    for scores in ranks.run(lambda: evaluator(next(networks))):
        assert dict(scores) == pytest.approx(dict(alone))
        assert scores.details["chosen"] == alone.details["chosen"]
        for mine, theirs in zip(scores.details["sweep"], alone.details["sweep"], strict=True):
            assert mine == pytest.approx(theirs)
    assert 30 < alone["top-1"] < 100  # a figure that could differ


def test_ranks_solve_the_regression_that_one_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Tinted(60, labels=[(i * i // 3) % 4 for i in range(60)], bad=(5, 6))
    evaluator = LowShot(share=(0.5,), subsets=2, k=3).bind((train, Tinted(31, bad=(0,), seed=1)), SITE)
    alone = evaluator(Conv())
    networks = iter([Conv(), Conv()])
    for scores in Ranks(2, monkeypatch).run(lambda: evaluator(next(networks))):
        assert dict(scores) == pytest.approx(dict(alone))
        losses = [[run["loss"] for run in each.details["subsets"]["50 %"]] for each in (scores, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert alone["50 %"] < 100
