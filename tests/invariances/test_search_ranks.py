"""Retrieval on two ranks equals one rank; the ranks are threads."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dino_ssl import distributed
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.copy_detection import CopyDetection
from dino_ssl.evals.retrieval import Retrieval
from dino_ssl.models.vit import ViT

SCENES = Scenes(count=5, size=32, part="test")


def on_ranks(world: int, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the result of `work` on each rank."""
    local, barrier = threading.local(), threading.Barrier(world, timeout=60)
    box: list[Any] = [None] * world
    results: list[Any] = [None] * world

    def all_gather(tensor: torch.Tensor) -> torch.Tensor:
        box[local.rank] = tensor
        barrier.wait()
        gathered = torch.cat(box)
        barrier.wait()
        return gathered

    def run(rank: int) -> None:
        local.rank = rank
        try:
            results[rank] = work()
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(distributed, "rank", lambda: local.rank)
    monkeypatch.setattr(distributed, "all_gather", all_gather)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("settings", [Retrieval(multiscale=True), CopyDetection(dimensions=8)])
def test_two_ranks_give_the_scores_of_one(settings: Retrieval | CopyDetection, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build().eval()

    def work() -> Any:
        return settings.prepare([SCENES.open()], EvalContext(size=32, batch_size=3))(copy.deepcopy(network))

    expected = work()
    for scores in on_ranks(2, work, monkeypatch):
        assert not isinstance(scores, BaseException), scores
        assert scores == pytest.approx(expected)
        assert list(scores.details) == list(expected.details)
