"""Views made on the device are the plain ones to a few grey levels, operation by operation and as a whole; a run that
holds its pictures there sees the same pictures in the same order, and learns the same."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from dino.config import edit, from_dict, to_dict
from dino.data import pixels
from dino.data.augment import Augment
from dino.data.loader import sample_rng, train_batches
from dino.data.pictures import BadImage, Pictures
from dino.data.views import Draw, MultiCrop, crop_box
from dino.errors import UserError
from dino.fast import held, views
from dino.run import Run
from dino.runtime import Machine, where_pictures_stay

CPU = torch.device("cpu")
VIEWS = MultiCrop(global_size=24, local_size=12, local=2, blur=(1.0, 0.5, 0.5), solarize=(0.0, 0.5, 0.3), gray=0.3)


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth coloured noise with a hard-edged rectangle."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 120.0)
    for cells, strength in ((3, 60), (9, 35), (40, 20)):
        noise = rng.normal(size=(cells, cells, 3)) * strength
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    image[height // 5 : height // 2, width // 4 : width // 2] = (230, 40, 20)
    return image.clip(0, 255).astype(np.uint8)


class Photos(Pictures):
    """Photos of several sizes, some of which cannot be read."""

    SIDES = ((40, 33), (26, 52), (40, 40))

    def __init__(self, count: int = 10, bad: tuple[int, ...] = ()) -> None:
        sizes = [self.SIDES[n % 3] for n in range(count)]
        super().__init__(names=[f"{n}.png" for n in range(count)], sizes=sizes, labels=np.arange(count) % 4)
        self.bad = bad

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise BadImage(f"{index}.png", "cut short")
        width, height = self.SIDES[index % 3]  # whatever was said of it
        return photo(height, width, index)


SQUARES = [photo(32, 32, seed) for seed in range(6)]


def planes(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def gap(ours: Tensor, plain: Sequence[np.ndarray]) -> np.ndarray:
    """Differences in grey levels; ours [..., 3, S, S] or of one plane that stands for three."""
    assert torch.equal(ours, ours.round())
    return ours.movedim(-3, -1).numpy().astype(float) - np.stack(plain)


def assert_near(difference: np.ndarray, most: float, mean: float) -> None:
    assert np.abs(difference).max() <= most
    assert np.abs(difference).mean() <= mean
    assert abs(difference.mean()) <= mean / 3


# -- one operation at a time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 32, 50])
def test_crop_and_flip(size: int) -> None:
    """Boxes at the corners, thin ones, one pixel, and as drawn; enlarged and reduced; in a frame that is larger."""
    images = [photo(40, 52, seed) for seed in range(10)]
    rng = np.random.default_rng(0)
    boxes = [(0, 0, 40, 52), (20, 30, 20, 22), (3, 4, 1, 1), (0, 0, 40, 3), (5, 6, 2, 40)]
    boxes += [crop_box(40, 52, (0.05, 1.0), (3 / 4, 4 / 3), rng) for _ in range(5)]
    flips = [n % 2 == 0 for n in range(10)]
    plain = [pixels.resize(i[y : y + h, x : x + w], size, size) for i, (y, x, h, w) in zip(images, boxes, strict=True)]
    plain = [view[:, ::-1] if flip else view for view, flip in zip(plain, flips, strict=True)]
    framed = torch.nn.functional.pad(planes(images), (0, 9, 0, 5), value=255.0)
    ours = views.crop(framed, torch.tensor(boxes).float()[None], torch.tensor(flips), size)
    assert_near(gap(ours, plain), 2, 0.01)


def test_a_crop_of_the_views_size_is_the_picture() -> None:
    box = torch.tensor([[[0.0, 0, 32, 32]] * 6])
    assert not gap(views.crop(planes(SQUARES), box, torch.zeros(6) > 0, 32), SQUARES).any()


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.04, 0.3])
def test_hue_is_the_same_to_the_bit(turn: float) -> None:
    every = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(every, every, every), -1).reshape(18, 324, 3)
    draw = Draw(0, 0, 1, 1, False, (1.0, 1.0, 1.0, turn), (3,), False, 0.0, False)
    steps = torch.full((1, 1, 1, 1), float(views.to_row(draw)[views.TURN]))
    assert_near(gap(views.hue(planes([colours]), steps), [pixels.adjust_hue(colours, turn)]), 1, 1e-3)


def test_gray_is_the_same_to_the_bit() -> None:
    assert not gap(views.gray(planes(SQUARES)).expand(-1, 3, -1, -1), [pixels.gray(view) for view in SQUARES]).any()


@pytest.mark.parametrize("threshold", [0, 100, 256])
def test_solarisation_is_the_same_to_the_bit(threshold: int) -> None:
    """On every grey level: the threshold itself is inverted."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.stack([levels, levels.T, levels[::-1]], -1)
    draw = Draw(0, 0, 16, 16, False, (1.0, 1.0, 1.0, 0.0), (), False, 0.0, True)
    ours = views.multi_crop(planes([image]).byte(), torch.tensor([[views.to_row(draw)]]), 16, threshold)[0]
    assert not gap(ours, [pixels.solarize(image, threshold)]).any()


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 2.0, 6.0])
def test_blur(sigma: float) -> None:
    """OpenCV's weights have 8 bits. Those of others in the batch may reach farther."""
    reach = int(views.radius(torch.tensor(sigma)))
    for widest in (reach, reach + 3):
        ours = views.blur(planes(SQUARES), torch.full((6,), sigma), widest)
        assert_near(gap(ours, [pixels.blur(view, sigma) for view in SQUARES]), 1, 0.15)


@pytest.mark.parametrize("which", range(4))
def test_each_colour_change_alone_and_each_view_its_own(which: int) -> None:
    """Every view has another factor, and one of them another change."""
    jitter = MultiCrop(global_size=32, local=0, flip=0, jitter=1, gray=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    drawn = [jitter.draw(32, 32, np.random.default_rng(seed))[0] for seed in range(6)]
    drawn = [draw._replace(top=0, left=0, height=32, width=32, order=(which,)) for draw in drawn]
    drawn[2] = drawn[2]._replace(order=((which + 1) % 4,))
    drawn[3] = drawn[3]._replace(order=())
    plain = [jitter._view(image, draw, 32) for image, draw in zip(SQUARES, drawn, strict=True)]
    rows = torch.tensor([[views.to_row(draw) for draw in drawn]])
    ours = views.multi_crop(planes(SQUARES).byte(), rows, 32, 128)[0]
    assert_near(gap(ours, plain), 1, 0.06)  # OpenCV rounds in other places: one value in fifty by one level
    assert np.abs(np.stack(plain) - np.stack(SQUARES).astype(float)).mean() > 1


# -- the whole view -------------------------------------------------------------------------------------------------


def batches(pictures: Pictures, recipe: MultiCrop = VIEWS, **changes: Any) -> list:
    course: dict[str, Any] = dict(batch_size=4, seed=3, epochs=2) | changes
    return list(held.train_batches(held.hold(pictures, CPU, 10**9), recipe, **course))


def plain(pictures: Pictures, recipe: MultiCrop = VIEWS) -> list:
    return list(train_batches(pictures, recipe, batch_size=4, seed=3, epochs=2))


def assert_same_steps(ours: list, others: list, near: bool = False) -> None:
    assert len(ours) == len(others) > 0
    for a, b in zip(ours, others, strict=True):
        assert (a.epoch, a.step, a.skipped) == (b.epoch, b.step, b.skipped)
        assert torch.equal(a.batch.labels, b.batch.labels)
        for x, y in zip(a.batch.views, b.batch.views, strict=True):
            assert x.dtype == torch.uint8
            difference = (x.int() - y.int()).abs().float()
            assert (difference.mean() < 0.12 and difference.quantile(0.99) <= 1) if near else not difference.any()


def test_every_batch_is_the_plain_one_with_pictures_of_several_sizes_and_some_unreadable() -> None:
    for bad in ((), (2, 5)):
        assert_same_steps(batches(Photos(bad=bad)), plain(Photos(bad=bad)), near=True)


def test_the_whole_is_not_darker_nor_paler_over_many_draws() -> None:
    """Means of the differences over 600 views each; a step that is left out or misplaced moves them."""
    image = photo(32, 32, 1)
    recipe = MultiCrop(global_size=32, local_size=16, local=2)
    drawn = [recipe.draw(32, 32, sample_rng(0, 0, n)) for n in range(150)]
    for kind, (first, last, size) in enumerate(((0, 2, 32), (2, 4, 16))):
        rows = torch.tensor([[views.to_row(draw) for draw in draws[first:last]] for draws in drawn]).transpose(0, 1)
        ours = views.multi_crop(planes([image] * 150).byte(), rows, size, 128)
        one = np.stack([recipe(image, sample_rng(0, 0, n))[first:last] for n in range(150)]).swapaxes(0, 1)
        difference = gap(ours, list(one))
        assert abs(difference.mean()) < 0.03, kind
        assert np.abs(difference).mean() < 0.15, kind
        assert (np.abs(difference) > 2).mean() < 0.003, kind
        spread = [np.std(x.reshape(300, -1), axis=1) for x in (ours.movedim(-3, -1).numpy().astype(float), one)]
        np.testing.assert_allclose(*spread, atol=1.5)


def test_views_need_no_chance_of_anything() -> None:
    """None jittered, grey, blurred or inverted; no local ones; and a batch in parts is the same as at once."""
    off = MultiCrop(global_size=16, local=0, jitter=0, gray=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    assert_same_steps(batches(Photos(), off), plain(Photos(), off), near=True)


def test_the_threshold_of_solarisation_is_the_recipes() -> None:
    off = MultiCrop(
        global_size=16, local=0, jitter=0, gray=0, blur=(0, 0, 0), solarize=(1, 1, 1), solarize_threshold=60
    )
    assert_same_steps(batches(Photos(), off), plain(Photos(), off), near=True)


def test_reading_some_pictures_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = held.hold(Photos(bad=(2, 7)), CPU, 10**9)
    monkeypatch.setattr(held, "FILL", 4)
    parts = held.hold(Photos(bad=(2, 7)), CPU, 10**9)
    assert torch.equal(parts.pixels, whole.pixels)
    assert parts.bad == whole.bad == {2: "cut short", 7: "cut short"}
    for index in (0, 9):
        width, height = Photos.SIDES[index % 3]
        there = parts.pixels[index, :, :height, :width].permute(1, 2, 0)
        assert np.array_equal(there.numpy(), photo(height, width, index))


def test_some_pictures_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(Photos())
    monkeypatch.setattr(held, "AT_ONCE", 1)
    assert_same_steps(batches(Photos()), whole)


# -- order, ranks, resume ---------------------------------------------------------------------------------------------


def test_workers_ranks_and_resuming_change_nothing() -> None:
    whole = batches(Photos(bad=(2,)))
    assert_same_steps(batches(Photos(bad=(2,)), workers=1), whole)
    assert_same_steps(batches(Photos(bad=(2,)), clock_start=(1, 1)), whole[3:])
    both = [batches(Photos(), rank=rank, world=2) for rank in (0, 1)]
    for step, *parts in zip(batches(Photos()), *both, strict=True):
        for v, stack in enumerate(step.batch.views):
            assert torch.equal(torch.stack([p.batch.views[v] for p in parts], 2).flatten(1, 2), stack)


def test_a_batch_of_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="can be read any more"):
        batches(Photos(bad=tuple(range(10))))


def test_what_does_not_fit_is_refused_with_figures() -> None:
    with pytest.raises(UserError, match=r"10 pictures in frames of 40 x 52.*expected at most.*--cache memory"):
        held.hold(Photos(), CPU, held.held_bytes(Photos()) - 1)
    assert held.hold(Photos(), CPU, held.held_bytes(Photos())).pixels.nbytes == held.held_bytes(Photos())


def test_a_picture_that_changed_its_size_is_left_out() -> None:
    pictures = Photos()
    pictures.sizes = pictures.sizes.copy()
    pictures.sizes[4] = 20, 20
    assert list(held.hold(pictures, CPU, 10**9).bad) == [4]


# -- the field of a run -----------------------------------------------------------------------------------------------


def test_the_field_reads_older_runs_and_refuses_what_cannot_be() -> None:
    for older, now in ((True, "memory"), (False, "no"), ("device", "device")):
        assert from_dict(Run, to_dict(Run()) | {"cache": older}).cache == now
    with pytest.raises(UserError, match="cache: expected one of no, memory, device"):
        edit(Run(), cache=True)
    with pytest.raises(UserError, match=r"MultiCrop alone.*Augment"):
        edit(Run(), cache="device", views=Augment())


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "invariances"))
    import tiny  # pyright: ignore[reportMissingImports]

    return tiny, lambda name, **changes: tiny.tiny(tmp_path / name, **changes)


def test_the_plan_keeps_small_pictures_on_a_card_alone() -> None:
    card = Machine(torch.device("cuda"), "a card", 8, 16 * 2**30, "bfloat16", "")
    cpu = replace(card, device=CPU)
    small, large = Photos(), Photos()
    large.sizes = large.sizes * 20
    assert where_pictures_stay(small, MultiCrop(), card)[0] == "device"
    assert where_pictures_stay(small, MultiCrop(), replace(card, ranks=8))[0] == "device"
    assert where_pictures_stay(small, MultiCrop(), cpu)[0] == "memory"
    assert where_pictures_stay(small, MultiCrop(), replace(cpu, ranks=2))[0] == "no"
    assert where_pictures_stay(small, Augment(), card)[0] == "memory"
    assert where_pictures_stay(large, MultiCrop(), card)[0] == "device"  # 17 MiB: a small set
    assert where_pictures_stay(large, MultiCrop(), replace(card, memory=16 * held.held_bytes(large)))[0] == "device"
    assert where_pictures_stay(large, MultiCrop(), replace(card, memory=15 * held.held_bytes(large)))[0] == "memory"
    assert where_pictures_stay(small, MultiCrop(), replace(card, memory=8 * held.held_bytes(small)))[0] == "device"
    assert where_pictures_stay(small, MultiCrop(), replace(card, memory=7 * held.held_bytes(small)))[0] == "memory"


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import held as benchmark  # pyright: ignore[reportMissingImports]

    found = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["held.py"])
    benchmark.main(["--sides", "16", "--batch", "2", "--turns", "1", "--json", str(found)])
    rows = json.loads(found.read_text())["rows"]
    assert [row["version"] for row in rows] == ["plain", "device", "draws"]
    assert all(row["images_per_s"] > 0 and row["side"] == 16 for row in rows)
    assert rows[0]["ratio"] == 1


def losses(out: str) -> list[float]:
    from dino.logs import read_metrics

    return [line["loss"] for line in read_metrics(Path(out))]


def test_a_run_learns_the_same_and_resumes_to_the_bit(tiny_run) -> None:
    tiny, make = tiny_run
    apart, whole = make("memory", cache="memory"), make("device", cache="device")
    for run in (apart, whole):
        tiny.fit(run)
    np.testing.assert_allclose(losses(whole.out), losses(apart.out), atol=1e-2)  # a grey level here and there
    assert len(set(losses(whole.out))) == 15
    cut = make("cut", cache="device")
    tiny.fit(cut, until=7)
    tiny.fit(cut, resume=True)
    assert not tiny.same_training(cut, whole)


def test_two_ranks_are_one(tiny_run) -> None:
    tiny, make = tiny_run
    plainly = dict(backbone=dict(drop_path=0.0), optim=dict(algorithm="sgd", lr=1.0, epochs=1), cache="device")
    one, two = make("one", **plainly), make("two", **plainly)
    tiny.fit(one)
    tiny.spawn_ranks(two, 2)
    np.testing.assert_allclose(losses(two.out), losses(one.out), atol=1e-3)  # sums of other lengths round elsewhere
