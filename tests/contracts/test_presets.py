"""Recipes say what the paper and the authors say, and the plan fits pictures and machine."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from dino_ssl import presets
from dino_ssl.collapse.checks import check_config
from dino_ssl.config import edit
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import steps_per_epoch
from dino_ssl.errors import UserError
from dino_ssl.presets.plan import Plan, Speed, plan, reading, with_workers
from dino_ssl.presets.small import FULL_SCHEDULE_STEPS, short_schedule
from dino_ssl.run import Run
from dino_ssl.runtime import Machine

CPU = Machine(torch.device("cpu"), "a processor", 2, 8 * 2**30, "float32", "no bfloat16 here")


class Flat(ImageDataset):
    """Grey pictures of one size, for a plan to look at."""

    def __init__(self, count: int, side: int, classes: int = 0) -> None:
        labels = np.arange(count) % classes if classes else None
        super().__init__(
            names=[str(i) for i in range(count)],
            sizes=[(side, side)] * count,
            labels=labels,
            classes=[str(c) for c in range(classes)],
        )

    def read(self, index: int) -> np.ndarray:
        return np.full((*self.sizes[index][::-1], 3), 128, np.uint8)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_a_complete_run_with_a_promise(name: str) -> None:
    run = presets.resolve(name)
    assert isinstance(run, Run)
    assert (presets.PRESETS[name].__doc__ or "").strip()
    assert run.out == f"runs/{name}"


def test_the_recipes_are_the_papers_rows() -> None:
    """Effective learning rates, lengths and crops, as section 2.3 of the facts lists them."""

    def facts(name: str):
        run = presets.resolve(name)
        o, m, v = run.optim, run.method, run.views
        return (
            o.batch_size,
            o.epochs,
            o.lr,
            o.min_lr,
            m.warmup_teacher_temp,
            m.teacher_temp,
            m.warmup_teacher_temp_epochs,
            o.clip,
            m.norm_last,
            m.freeze_last_layer,
            v.local,
            v.global_scale[0],
            m.out_dim,
        )

    assert facts("vits16")[:9] == (512, 100, 5e-4, 1e-6, 0.04, 0.04, 0, 3.0, True)
    assert facts("vits16-300")[:9] == (1024, 300, 5e-4, 1e-6, 0.04, 0.07, 30, 3.0, False)
    assert facts("vits16-800") == (1024, 800, 5e-4, 1e-5, 0.04, 0.07, 30, 0.0, False, 1, 10, 0.25, 65536)
    assert facts("vitb16") == (1024, 400, 7.5e-4, 2e-6, 0.04, 0.07, 50, 0.3, True, 3, 10, 0.25, 65536)
    assert facts("vitb8") == (1056, 300, 5e-4, 2e-6, 0.03, 0.07, 50, 3.0, True, 3, 10, 0.25, 65536)
    assert facts("resnet50-800")[0:4] == (4080, 800, 0.3, 0.0048)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="vits16"):
        presets.resolve("vit16")


def test_a_function_of_ones_own_is_a_preset(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "from dino_ssl.presets import small\nfrom dino_ssl.config import edit\ndef mine(): return edit(small(), seed=7)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert presets.resolve("mine_for_test:mine").seed == 7
    with pytest.raises(UserError, match="mine_for_test:yours"):
        presets.resolve("mine_for_test:yours")


@pytest.mark.parametrize(("count", "side"), [(20, 9), (36, 1), (60, 32), (285, 50), (3000, 500)])
def test_a_plan_can_be_trained_whatever_the_pictures(count: int, side: int) -> None:
    chosen = plan(Flat(count, side, classes=2), CPU, minutes=1)
    views, backbone = chosen.run.views, chosen.run.backbone
    assert chosen.run.optim.batch_size <= 0.9 * count
    assert views.global_size % 8 == views.local_size % 8 == 0
    assert views.global_size >= views.local_size
    assert backbone.build().embed_dim == 256
    assert not any("K too large" in found.name for found in check_config(chosen.run, 10, int(0.9 * count)))
    assert {"K", "crops", "batch", "precision", "workers", "epochs", "expected time"} <= _names(chosen)
    assert all(reason.why for reason in chosen.reasons)


def test_more_time_gives_more_epochs_and_warm_up_stays_a_tenth() -> None:
    short, long = (plan(Flat(200, 48), CPU, minutes=minutes).run.optim for minutes in (0.5, 10))
    assert long.epochs > short.epochs
    assert short.warmup_epochs <= 0.1 * short.epochs


def test_a_short_run_keeps_following_and_a_long_one_settles() -> None:
    def planned(minutes: float):
        found = plan(Flat(200, 48), CPU, minutes=minutes)
        return found.run, {reason.name: reason.value for reason in found.reasons}

    short, rows = planned(0.5)
    assert short.method.momentum_end == 0.98
    assert short.optim.min_lr == pytest.approx(short.optim.lr * short.optim.batch_size / 256 / 2)
    assert rows["teacher"] == "momentum 0.97 to 0.98, temperature 0.04"
    assert rows["learning rate"].endswith("sinking to a half")
    usual = presets.resolve("small")
    assert short_schedule(usual, FULL_SCHEDULE_STEPS) == usual != short_schedule(usual, FULL_SCHEDULE_STEPS - 1)


def test_a_preset_keeps_its_recipe_and_takes_the_machine() -> None:
    recipe = edit(presets.resolve("vits16"), optim=dict(batch_size=2), views=dict(local=0, global_size=32))
    chosen = plan(Flat(20, 64), CPU, preset=recipe).run
    assert chosen.precision == "float32"
    kept = dataclasses.replace(chosen, precision=recipe.precision, workers=recipe.workers, cache=recipe.cache)
    assert kept == recipe


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "step", "data", "workers"),
    [
        ("cpu", 2, 1, 12e-3, 2e-3, 1),  # a sixth of a worker would do
        ("cpu", 8, 1, 2e-3, 4e-3, 3),
        ("cpu", 2, 1, 1e-3, 9e-3, 2),  # all the cores there are
        ("cpu", 8, 4, 1e-3, 9e-3, 2),  # a rank's own
        ("cuda", 16, 1, 1e-3, 6e-3, 8),
        ("cuda", 16, 1, 1e-4, 6e-3, 15),  # one core is the rank's own
        ("cuda", 16, 4, 1e-3, 6e-3, 3),  # each of four ranks has four
        ("cuda", 2, 4, 1e-3, 6e-3, 1),
    ],
)
def test_workers_keep_up_with_the_step(device: str, cores: int, ranks: int, step: float, data: float, workers: int):
    here = dataclasses.replace(CPU, device=torch.device(device), cores=cores, ranks=ranks)
    run, reason = with_workers(presets.resolve("small"), here, Speed(step, data))
    assert run.workers == workers == int(reason.value)
    assert ("too few cores" in reason.why) == (workers * step < data)


@pytest.mark.parametrize("world", range(1, 9))
def test_any_number_of_ranks_can_share_the_batch(world: int) -> None:
    for count in (12, 100, 2000):
        chosen = plan(Flat(count, 32), CPU, world=world, minutes=0.1).run
        assert steps_per_epoch(round(0.9 * count), chosen.optim.batch_size, world) >= 1


def test_a_picture_is_timed_as_the_loader_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large JPEGs are decoded smaller; what stays in memory is read once, and not on the clock."""
    now, asked = [0.0], set()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(Flat):
        def read_downscaled(self, index: int, times: int) -> np.ndarray:
            asked.add(times)
            now[0] += 1
            return np.zeros((480, 480, 3), np.uint8)

    run = edit(presets.resolve("small"), views=dict(global_size=16, local_size=8), cache=False)
    dataset = Slow(4, 4000)
    assert reading(run, dataset) == 1
    assert asked == {8}
    asked.clear()
    assert reading(edit(run, cache=True), dataset) == 0
    assert asked == {1}


def test_prototypes_grow_with_the_pictures() -> None:
    gpu = dataclasses.replace(CPU, memory=2**40)
    few, many = (plan(_Huge(n), gpu, minutes=1).run.method.out_dim for n in (1000, 90_000))
    assert (few, many) == (1024, 4096)


class _Huge(Flat):
    def __init__(self, count: int) -> None:
        super().__init__(count, 32)


def _names(chosen: Plan) -> set[str]:
    return {reason.name for reason in chosen.reasons}
