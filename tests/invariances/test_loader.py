"""Batches do not depend on workers, ranks or resuming; unreadable images are skipped."""

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
from dino_ssl.preprocessing import Preprocessing

VIEWS = MultiCrop(global_size=16, local_size=8, local=3)


class Noise(ImageDataset):
    """n small images of noise, of different sizes; those in `bad` cannot be read."""

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
    return list(train_batches(Noise(10) if dataset is None else dataset, VIEWS, **settings))


def assert_same(left, right):
    assert [step[:2] for step in left] == [step[:2] for step in right]
    for a, b in zip(left, right, strict=True):
        assert a.skipped == b.skipped
        assert torch.equal(a.batch.labels, b.batch.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.batch.views, b.batch.views, strict=True))


def test_a_step_holds_the_views_of_its_images():
    dataset = Noise(10)
    step = steps()[3]
    assert step[:2] == (1, 1)
    order = epoch_order(3, 1, 10)[4:8]
    assert step.batch.labels.tolist() == (order % 3).tolist()
    for at, index in enumerate(order.tolist()):
        crops = VIEWS(dataset.read(index), sample_rng(3, 1, index))
        for v, crop in enumerate(crops):
            stack, row = (step.batch.views[0], v) if v < 2 else (step.batch.views[1], v - 2)
            assert stack.movedim(-3, -1).is_contiguous()  # channels last
            np.testing.assert_array_equal(stack[row, at].permute(1, 2, 0).numpy(), crop)


def test_repeated_images_come_in_a_row_with_new_augmentations():
    """10 images, 3 times each, in batches of 4; the epoch has as many steps as without repeats."""
    transform, dataset = Augment(size=16, repeats=3), Noise(10)
    made = list(train_batches(dataset, transform, batch_size=4, seed=3, epochs=1))
    repeated = np.repeat(epoch_order(3, 0, 10), 3)[:8].tolist()
    assert [step.batch.views[0].shape for step in made] == [(1, 4, 3, 16, 16)] * 2
    assert torch.cat([step.batch.labels for step in made]).tolist() == [index % 3 for index in repeated]
    views = torch.cat([step.batch.views[0][0] for step in made]).permute(0, 2, 3, 1).numpy()
    for at, index in enumerate(repeated):
        np.testing.assert_array_equal(views[at], transform(dataset.read(index), sample_rng(3, 0, index, at % 3))[0])
    assert len({view.tobytes() for view in views}) == 8  # each copy is augmented anew
    ranks = [train_batches(dataset, transform, batch_size=4, seed=3, epochs=1, rank=r, world=2) for r in (0, 1)]
    for step, *parts in zip(made, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.batch.views[0], step.batch.views[0][:, rank::2])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_equal_for_any_number_of_workers(workers):
    assert_same(steps(workers=workers), steps())


def test_batches_are_equal_after_resuming_within_an_epoch():
    reference = steps(Noise(13), epochs=3)
    for at in range(1, 9):
        assert_same(steps(Noise(13), epochs=3, clock_start=(at // 3, at % 3)), reference[at:])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_each_batch(world):
    reference = steps()
    ranks = [steps(rank=rank, world=world) for rank in range(world)]
    for number, step in enumerate(reference):
        for v, stack in enumerate(step.batch.views):
            interleaved = torch.stack([r[number].batch.views[v] for r in ranks], 2).flatten(1, 2)
            assert torch.equal(interleaved, stack)


def test_epoch_orders_are_distinct_permutations():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    draws = {sample_rng(s, e, i).random() for s in (0, 1) for e in (0, 1) for i in (0, 1)}
    assert len(draws) == 8


def test_in_memory_gives_equal_batches():
    assert_same(steps(Noise(10).in_memory(), workers=2), steps())


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_reported(workers):
    clean, got = steps(epochs=1), steps(Noise(10, bad=(2, 5)), epochs=1, workers=workers)
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
def test_a_batch_without_readable_images_is_an_error(workers):
    with pytest.raises(UserError, match="None of the 4 images of epoch 0, step 0 can be read"):
        steps(Noise(10, bad=tuple(range(10))), workers=workers)


def test_invalid_batch_sizes():
    with pytest.raises(UserError, match=r"`optim.batch_size` 11 with 10 images.*10 or less"):
        steps(batch_size=11)
    with pytest.raises(UserError, match="multiple of 3"):
        steps(batch_size=4, world=3)


def test_a_killed_worker_is_a_clear_error():
    with pytest.raises(UserError, match="data worker process died"):
        steps(Noise(10, kill=int(epoch_order(3, 0, 10)[5])), workers=1)


def test_workers_survive_sigint_and_sigterm():
    batches = train_batches(Noise(10), VIEWS, batch_size=2, seed=3, epochs=4, workers=1)
    got = [next(batches)]
    import multiprocessing

    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    got += list(batches)
    assert_same(got, steps(batch_size=2, epochs=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_cover_all_readable_images_in_order(workers):
    dataset = Noise(9, bad=(4,))
    got = list(eval_batches(dataset, Preprocessing(size=14), 4, workers))
    assert torch.cat([i for i, _ in got]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [len(i) for i, _ in got] == [4, 3, 1]
    assert all(images.shape[1:] == (3, 14, 14) for _, images in got)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for _, images in got)
    some = list(eval_batches(dataset, Preprocessing(size=14), 4, workers, indices=[7, 2]))
    assert some[0][0].tolist() == [7, 2]
    assert torch.equal(some[0][1], torch.stack([got[1][1][2], got[0][1][2]]))


def test_random_streams_are_independent():
    assert loader.ORDER != loader.SAMPLE
    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(loader.ORDER, 1)))
    assert order.random() != sample_rng(0, 1, 0).random()
    streams = [sample_rng(0, 1, 1), sample_rng(0, 1, 1, 1), sample_rng(0, 1, 1, 2), mix_rng(0, 1), mix_rng(0, 2)]
    assert len({stream.random() for stream in streams}) == len(streams)
