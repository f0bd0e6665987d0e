"""Batches do not depend on workers, ranks or where a run was resumed; what cannot be read is left out."""

import os
import signal

import numpy as np
import pytest
import torch

from dino_ssl.data import loader
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.loader import epoch_order, eval_batches, mix_rng, sample_rng, train_batches
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError

VIEWS = MultiCrop(global_size=16, local_size=8, local=3)


class Drawn(ImageDataset):
    """n small pictures of noise, of different sizes; those in `bad` cannot be read."""

    def __init__(self, n: int, bad: tuple[int, ...] = (), kill: int = -1) -> None:
        sizes = [(12 + i % 5, 20 - i % 7) for i in range(n)]
        super().__init__(names=[f"{i}.png" for i in range(n)], sizes=sizes, labels=np.arange(n) % 3)
        self.bad, self.kill = bad, kill

    def read(self, index: int) -> np.ndarray:
        if index == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.bad:
            raise BadImage(self.names[index], "cut short")
        width, height = self.sizes[index]
        return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def steps(dataset=None, **changes):
    settings = {"batch_size": 4, "seed": 3, "epochs": 2} | changes
    return list(train_batches(Drawn(10) if dataset is None else dataset, VIEWS, **settings))


def assert_same(left, right):
    assert [step[:2] for step in left] == [step[:2] for step in right]
    for a, b in zip(left, right, strict=True):
        assert a.skipped == b.skipped
        assert torch.equal(a.batch.labels, b.batch.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.batch.views, b.batch.views, strict=True))


def test_a_step_holds_the_views_of_its_pictures():
    dataset = Drawn(10)
    step = steps()[3]
    assert step[:2] == (1, 1)
    order = epoch_order(3, 1, 10)[4:8]
    assert step.batch.labels.tolist() == (order % 3).tolist()
    for at, index in enumerate(order.tolist()):
        crops = VIEWS(dataset.read(index), sample_rng(3, 1, index))
        for v, crop in enumerate(crops):
            stack, place = (step.batch.views[0], v) if v < 2 else (step.batch.views[1], v - 2)
            assert stack.movedim(-3, -1).is_contiguous()  # the order of bytes that networks and `normalize` take
            np.testing.assert_array_equal(stack[place, at].permute(1, 2, 0).numpy(), crop)


def test_a_picture_may_come_several_times_in_a_row():
    """10 pictures, 3 times each, in batches of 4: the order's first, cut at the length of an epoch."""
    recipe, dataset = Augment(size=16, repeats=3), Drawn(10)
    made = list(train_batches(dataset, recipe, batch_size=4, seed=3, epochs=1))
    seen = np.repeat(epoch_order(3, 0, 10), 3)[:8].tolist()
    assert [step.batch.views[0].shape for step in made] == [(1, 4, 3, 16, 16)] * 2
    assert torch.cat([step.batch.labels for step in made]).tolist() == [index % 3 for index in seen]
    views = torch.cat([step.batch.views[0][0] for step in made]).permute(0, 2, 3, 1).numpy()
    for at, index in enumerate(seen):
        np.testing.assert_array_equal(views[at], recipe(dataset.read(index), sample_rng(3, 0, index, at % 3))[0])
    assert len({view.tobytes() for view in views}) == 8  # each copy is augmented anew
    ranks = [train_batches(dataset, recipe, batch_size=4, seed=3, epochs=1, rank=r, world=2) for r in (0, 1)]
    for step, *parts in zip(made, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.batch.views[0], step.batch.views[0][:, rank::2])


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers(workers):
    assert_same(steps(workers=workers), steps())


def test_resuming_in_the_middle_of_an_epoch():
    whole = steps(Drawn(13), epochs=3)
    for at in range(1, 9):
        assert_same(steps(Drawn(13), epochs=3, clock_start=(at // 3, at % 3)), whole[at:])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_batch(world):
    whole = steps()
    ranks = [steps(rank=rank, world=world) for rank in range(world)]
    for number, step in enumerate(whole):
        for v, stack in enumerate(step.batch.views):
            dealt = torch.stack([r[number].batch.views[v] for r in ranks], 2).flatten(1, 2)
            assert torch.equal(dealt, stack)


def test_epochs_and_seeds_differ_and_each_picture_comes_at_most_once():
    seen = [tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(seen)) == 4
    assert all(sorted(order) == list(range(50)) for order in seen)
    draws = {sample_rng(s, e, i).random() for s in (0, 1) for e in (0, 1) for i in (0, 1)}
    assert len(draws) == 8


def test_in_memory_changes_nothing():
    assert_same(steps(Drawn(10).in_memory(), workers=2), steps())


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_left_out_and_reported(workers):
    clean, got = steps(epochs=1), steps(Drawn(10, bad=(2, 5)), epochs=1, workers=workers)
    order = epoch_order(3, 0, 10)
    reported = []
    for number, (a, b) in enumerate(zip(clean, got, strict=True)):
        keep = [at for at, i in enumerate(order[number * 4 : number * 4 + 4]) if i not in (2, 5)]
        assert torch.equal(a.batch.labels[keep], b.batch.labels)
        for x, y in zip(a.batch.views, b.batch.views, strict=True):
            assert torch.equal(x[:, keep], y)
        reported += b.skipped
    assert {tuple(s) for s in reported} == {(f"{i}.png", "cut short") for i in (2, 5) if i in order[:8]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_nothing_is_an_error(workers):
    with pytest.raises(UserError, match="can be read any more"):
        steps(Drawn(10, bad=tuple(range(10))), workers=workers)


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match=r"batch size 11 with 10 pictures.*10 or less"):
        steps(batch_size=11)
    with pytest.raises(UserError, match="multiple of 3"):
        steps(batch_size=4, world=3)


def test_a_killed_worker_is_a_clear_error():
    with pytest.raises(UserError, match="data worker process died"):
        steps(Drawn(10, kill=int(epoch_order(3, 0, 10)[5])), workers=1)


def test_workers_outlive_ctrl_c_and_sigterm():
    batches = train_batches(Drawn(10), VIEWS, batch_size=2, seed=3, epochs=4, workers=1)
    got = [next(batches)]
    import multiprocessing

    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    got += list(batches)
    assert_same(got, steps(batch_size=2, epochs=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_cover_all_in_order_without_the_bad(workers):
    dataset = Drawn(9, bad=(4,))
    got = list(eval_batches(dataset, 14, 4, workers))
    assert torch.cat([i for i, _ in got]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [len(i) for i, _ in got] == [4, 3, 1]
    assert all(images.shape[1:] == (3, 14, 14) for _, images in got)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for _, images in got)
    some = list(eval_batches(dataset, 14, 4, workers, indices=[7, 2]))
    assert some[0][0].tolist() == [7, 2]
    assert torch.equal(some[0][1], torch.stack([got[1][1][2], got[0][1][2]]))


def test_streams_of_order_and_samples_never_meet():
    assert loader.ORDER != loader.SAMPLE
    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(loader.ORDER, 1)))
    assert order.random() != sample_rng(0, 1, 0).random()
    streams = [sample_rng(0, 1, 1), sample_rng(0, 1, 1, 1), sample_rng(0, 1, 1, 2), mix_rng(0, 1), mix_rng(0, 2)]
    assert len({stream.random() for stream in streams}) == len(streams)
