"""Search over two ranks gives what one gives: the ranks are threads that meet where processes would."""

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
    """What `work` gives on each rank."""
    here, meet = threading.local(), threading.Barrier(world, timeout=60)
    box: list[Any] = [None] * world
    results: list[Any] = [None] * world

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        box[here.rank] = tensor
        meet.wait()
        whole = torch.cat(box)
        meet.wait()
        return whole

    def run(rank: int) -> None:
        here.rank = rank
        try:
            results[rank] = work()
        except BaseException as error:
            results[rank] = error
            meet.abort()

    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(distributed, "rank", lambda: here.rank)
    monkeypatch.setattr(distributed, "gather", gather)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("settings", [Retrieval(multiscale=True), CopyDetection(dimensions=8)])
def test_two_ranks_give_what_one_gives(settings: Retrieval | CopyDetection, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = ViT(width=48, depth=1, heads=3, patch=8, image_size=32).build().eval()

    def work() -> Any:
        return settings.bind([SCENES.open()], EvalContext(size=32, batch_size=3))(copy.deepcopy(network))

    alone = work()
    for scores in on_ranks(2, work, monkeypatch):
        assert not isinstance(scores, BaseException), scores
        assert scores == pytest.approx(alone)
        assert list(scores.details) == list(alone.details)
