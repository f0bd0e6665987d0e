"""Presets have the settings of the paper and the authors, and the plan fits dataset and machine."""

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
from dino_ssl.presets import plan as planning
from dino_ssl.presets.benchmark_step import Speed, time_loading
from dino_ssl.presets.plan import FULL_SCHEDULE_STEPS, Plan, fit_to_size, plan, short_schedule, with_workers
from dino_ssl.run import Run
from dino_ssl.runtime import Machine

CPU = Machine(torch.device("cpu"), "a CPU", 2, 8 * 2**30, "float32", "no bfloat16")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed, so that a plan measures nothing."""
    monkeypatch.setattr(planning, "measure", lambda *_: Speed(0.01, 0.01))


class Gray(ImageDataset):
    """Gray images of one size."""

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
def test_every_preset_is_a_complete_run_with_a_docstring(name: str) -> None:
    run = presets.resolve(name)
    assert isinstance(run, Run)
    assert (presets.PRESETS[name].__doc__ or "").strip()
    assert run.out == f"runs/{name}"


def test_presets_have_the_papers_settings() -> None:
    """Learning rates, lengths, temperatures, clipping and crops."""

    def settings(name: str):
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
            o.clip_grad,
            m.norm_last,
            m.freeze_last_layer,
            v.local,
            v.global_scale[0],
            m.out_dim,
        )

    assert settings("vits16")[:9] == (512, 100, 5e-4, 1e-6, 0.04, 0.04, 0, 3.0, True)
    assert settings("vits16-300")[:9] == (1024, 300, 5e-4, 1e-6, 0.04, 0.07, 30, 3.0, False)
    assert settings("vits16-800") == (1024, 800, 5e-4, 1e-5, 0.04, 0.07, 30, 0.0, False, 1, 10, 0.25, 65536)
    assert settings("vitb16") == (1024, 400, 7.5e-4, 2e-6, 0.04, 0.07, 50, 0.3, True, 3, 10, 0.25, 65536)
    assert settings("vitb8") == (1056, 300, 5e-4, 2e-6, 0.03, 0.07, 50, 3.0, True, 3, 10, 0.25, 65536)
    assert settings("resnet50-800")[0:4] == (4080, 800, 0.3, 0.0048)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="vits16"):
        presets.resolve("vit16")


def test_an_importable_function_is_a_preset(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_presets.py").write_text(
        "from dino_ssl.presets import small\n"
        "from dino_ssl.config import edit\n"
        "def my_run(): return edit(small(), seed=7)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert presets.resolve("my_presets:my_run").seed == 7
    with pytest.raises(UserError, match="my_presets:other"):
        presets.resolve("my_presets:other")


@pytest.mark.parametrize(("count", "side"), [(20, 9), (36, 1), (60, 32), (285, 50), (3000, 500)])
def test_the_plan_of_any_dataset_can_be_trained(count: int, side: int) -> None:
    chosen = plan(Gray(count, side, classes=2), CPU, minutes=1)
    views, backbone = chosen.run.views, chosen.run.backbone
    assert chosen.run.optim.batch_size <= 0.9 * count
    assert views.global_size % 8 == views.local_size % 8 == 0
    assert views.global_size >= views.local_size
    assert backbone.build().embed_dim == 256
    assert not any("K too large" in finding.name for finding in check_config(chosen.run, 10, int(0.9 * count)))
    assert {"K", "crops", "batch", "precision", "workers", "epochs", "expected time"} <= _names(chosen)
    assert all(reason.reason for reason in chosen.reasons)


@pytest.mark.usefixtures("quick")
def test_more_time_gives_more_epochs_and_the_warm_up_is_at_most_a_tenth() -> None:
    short, long = (plan(Gray(200, 48), CPU, minutes=minutes).run.optim for minutes in (0.5, 10))
    assert long.epochs > short.epochs
    assert short.warmup_epochs <= 0.1 * short.epochs


@pytest.mark.usefixtures("quick")
def test_a_short_run_has_other_final_values_than_a_long_one() -> None:
    def planned(minutes: float):
        chosen = plan(Gray(200, 48), CPU, minutes=minutes)
        return chosen.run, {reason.name: reason.value for reason in chosen.reasons}

    short, values = planned(0.5)
    assert short.method.momentum_end == 0.98
    assert short.optim.min_lr == pytest.approx(short.optim.lr * short.optim.batch_size / 256 / 2)
    assert values["teacher"] == "momentum 0.97 to 0.98, temperature 0.04"
    assert values["learning rate"].endswith("decays to one half")
    small = presets.resolve("small")
    assert short_schedule(small, FULL_SCHEDULE_STEPS) == small != short_schedule(small, FULL_SCHEDULE_STEPS - 1)


def test_the_plan_changes_only_machine_settings_of_a_preset() -> None:
    preset = edit(presets.resolve("vits16"), optim=dict(batch_size=2), views=dict(local=0, global_size=32))
    chosen = plan(Gray(20, 64), CPU, preset=preset).run
    assert chosen.precision == "float32"
    kept = dataclasses.replace(chosen, precision=preset.precision, workers=preset.workers, cache=preset.cache)
    assert kept == preset


def test_the_size_of_evaluations_follows_the_views() -> None:
    run = presets.resolve("small")
    assert (run.views.size, run.eval_size, fit_to_size(run, 32).online_eval.size) == (64, 88, 44)
    assert fit_to_size(edit(run, online_eval=dict(size=None)), 32).online_eval.size is None


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "step", "data", "workers"),
    [
        ("cpu", 2, 1, 12e-3, 2e-3, 1),  # a sixth of a worker is enough
        ("cpu", 8, 1, 2e-3, 4e-3, 3),
        ("cpu", 2, 1, 1e-3, 9e-3, 2),  # all cores
        ("cpu", 8, 4, 1e-3, 9e-3, 2),  # the cores of a rank
        ("cuda", 16, 1, 1e-3, 6e-3, 8),
        ("cuda", 16, 1, 1e-4, 6e-3, 15),  # the training process needs one core
        ("cuda", 16, 4, 1e-3, 6e-3, 3),  # four cores per rank
        ("cuda", 2, 4, 1e-3, 6e-3, 1),
    ],
)
def test_workers_keep_up_with_the_step(device: str, cores: int, ranks: int, step: float, data: float, workers: int):
    machine = dataclasses.replace(CPU, device=torch.device(device), cores=cores, ranks=ranks)
    rows = {}
    run = with_workers(presets.resolve("small"), machine, Speed(step, data), rows)
    value, reason = rows["workers"]
    assert run.workers == workers == int(value)
    assert ("too few cores" in reason) == (workers * step < data)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("world", range(1, 9))
def test_the_batch_is_divisible_by_any_number_of_ranks(world: int) -> None:
    for count in (12, 100, 2000):
        chosen = plan(Gray(count, 32), CPU, world=world, minutes=0.1).run
        assert steps_per_epoch(round(0.9 * count), chosen.optim.batch_size, world) >= 1


def test_loading_is_timed_as_the_loader_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large JPEGs are decoded at reduced size; cached images are decoded once, and that is not timed."""
    now, scales = [0.0], set()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(Gray):
        def read_downscaled(self, index: int, times: int) -> np.ndarray:
            scales.add(times)
            now[0] += 1
            return np.zeros((480, 480, 3), np.uint8)

    run = edit(presets.resolve("small"), views=dict(global_size=16, local_size=8), cache=False)
    dataset = Slow(4, 4000)
    assert time_loading(run, dataset) == 1
    assert scales == {8}
    scales.clear()
    assert time_loading(edit(run, cache=True), dataset) == 0
    assert scales == {1}


@pytest.mark.usefixtures("quick")
def test_k_grows_with_the_dataset() -> None:
    gpu = dataclasses.replace(CPU, memory=2**40)
    few, many = (plan(Gray(count, 32), gpu, minutes=1).run.method.out_dim for count in (1000, 90_000))
    assert (few, many) == (1024, 4096)


def _names(chosen: Plan) -> set[str]:
    return {reason.name for reason in chosen.reasons}
