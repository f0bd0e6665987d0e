"""Presets have the settings of the paper and the authors, and the plan fits dataset and machine."""

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch

from dino_ssl import presets
from dino_ssl.api.resolve import mark_changes
from dino_ssl.collapse.checks import check_config
from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import steps_per_epoch
from dino_ssl.errors import UserError
from dino_ssl.methods import DINOConfig
from dino_ssl.models import Timm
from dino_ssl.presets import plan as planning
from dino_ssl.presets.benchmark_step import BenchmarkStep, Speed, measure, time_loading
from dino_ssl.presets.plan import FULL_SCHEDULE_STEPS, Plan, plan, short_schedule, with_workers
from dino_ssl.presets.recipe import fit_to_size
from dino_ssl.presets.small import small
from dino_ssl.run import Run
from dino_ssl.runtime import Machine
from dino_ssl.schedules import Clock

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
    assert settings("xcits12-16") == settings("vits16-300")
    assert presets.resolve("xcits12-16").backbone == Timm(name="xcit_small_12_p16_224", drop_path=0.1)
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
    slow = edit(short, method=dict(momentum=0.999))
    assert slow.method.for_few_steps().momentum_end == 0.999, "the momentum does not fall"
    small = presets.resolve("small")
    assert short_schedule(small, FULL_SCHEDULE_STEPS) == small != short_schedule(small, FULL_SCHEDULE_STEPS - 1)


@pytest.mark.parametrize("settings", [{}, {"optim": {"epochs": 12}}, {"views": {"global_size": 32}, "seed": 3}])
def test_what_is_learned_does_not_depend_on_the_measured_speed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine, or one with slow disks, gets the same plan; only the workers differ. It is measured once."""
    runs, calls = [], []
    for speed in (Speed(0.001, 0.001), Speed(0.1, 0.001), Speed(0.01, 0.1)):
        monkeypatch.setattr(planning, "measure", lambda *_, speed=speed: calls.append(1) or speed)
        chosen = plan(Gray(400, 64), CPU, change=lambda run: edit(run, **settings))
        runs.append(edit(chosen.run, workers=0))
    assert runs[0] == runs[1] == runs[2]
    assert len(calls) == 3
    assert runs[0].backbone == small().backbone.with_image_size(runs[0].views.size)


@pytest.mark.usefixtures("quick")
def test_the_plan_states_what_is_measured_without_labels() -> None:
    """And counts the images that are held out."""

    def quality(count: int, **online_eval: float) -> tuple[str, str]:
        chosen = plan(Gray(count, 48), CPU, change=lambda run: edit(run, online_eval=online_eval))
        ((value, reason),) = [row[1:] for row in chosen.reasons if row.name == "quality"]
        return value, reason

    assert quality(200) == ("two-crop retrieval", "no labels; 20 images are held out")
    assert quality(40)[0] == quality(200, every_epochs=0)[0] == "loss and entropies"
    assert quality(40)[1] == "40 images without labels: too few to hold out some"
    assert quality(1)[1] == "1 image without labels: too few to hold out some"
    assert "`online_eval.every_epochs` is 0" in quality(200, every_epochs=0)[1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("epochs", "is_short"), [(20, True), (3000, False)])
def test_the_number_of_steps_decides_the_schedule(epochs: int, is_short: bool) -> None:
    def change(run: Run) -> Run:
        return edit(run, optim=dict(epochs=epochs, lr=1e-3))

    chosen = plan(Gray(200, 48), CPU, change=change)
    optim, method = chosen.run.optim, chosen.run.method
    assert (optim.epochs, optim.warmup_epochs) == (epochs, 2)
    assert isinstance(method, DINOConfig)
    assert (method.momentum_end == 0.98) == is_short
    assert (optim.min_lr == optim.lr * optim.batch_size / 512) == is_short
    reasons = {reason.name: reason.reason for reason in mark_changes(chosen, change)}
    assert ("only 440 steps" in reasons["teacher"]) == is_short
    assert reasons["epochs"] == "set by you; the plan had 600"
    assert chosen.fit(3000).method != chosen.fit(20).method


@pytest.mark.usefixtures("quick")
def test_a_named_network_of_the_planned_type_is_shown_as_set_by_you() -> None:
    def change(run: Run) -> Run:
        return edit(run, backbone=dict(args={}))  # the plan has a smaller resnet10t

    rows = {reason.name: reason for reason in mark_changes(plan(Gray(200, 48), CPU, change=change), change)}
    assert rows["network"][1:] == ("resnet10t", "set by you")
    assert "backbone.args" not in rows


@pytest.mark.usefixtures("quick")
def test_time_and_epochs_together_are_refused() -> None:
    for epochs in (600, 7):  # 600 would be chosen
        with pytest.raises(UserError, match=r"`minutes` and `optim\.epochs` both set the length"):
            plan(Gray(200, 48), CPU, minutes=3, change=lambda run, n=epochs: edit(run, optim=dict(epochs=n)))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("minutes", "warning"), [(1, "random weights and raw pixels"), (4, "")])
def test_the_plan_warns_if_too_few_images_are_seen(minutes: float, warning: str) -> None:
    def warning_of(preset: Run | None = None, **settings: Any) -> str:
        chosen = plan(Gray(5000, 48), CPU, preset=preset, minutes=minutes, change=lambda run: edit(run, **settings))
        return next((f"{row.value}: {row.reason}" for row in chosen.reasons if row.name == "warning"), "")

    text = warning_of()
    assert warning in text
    assert bool(warning) == bool(text)
    assert bool(warning) == ("which take 2 min 30 s here: train longer (`minutes`), add images, or start from" in text)
    assert not warning_of(init="dino_vits16")
    assert not warning_of(preset=presets.resolve("demo"))


@pytest.mark.usefixtures("quick")
def test_the_plan_warns_of_few_different_images() -> None:
    def warning(count: int) -> str:
        rows = plan(Gray(count, 48), CPU, minutes=60).reasons
        return next((f"{row.value}: {row.reason}" for row in rows if row.name == "warning"), "")

    assert "may end below raw pixels: 2,000 different images" in warning(2000)
    assert not warning(3000)


@pytest.mark.usefixtures("quick")
def test_fewer_images_are_trained_on_for_more_epochs() -> None:
    gpu = dataclasses.replace(CPU, device=torch.device("cuda"), memory=2**40)
    counts = (100, 500, 2000, 6500, 50_000, 150_000)
    epochs = {
        machine.device.type: [plan(Gray(count, 32), machine).run.optim.epochs for count in counts]
        for machine in (CPU, gpu)
    }
    assert epochs == {"cpu": [600, 600, 200, 62, 8, 3], "cuda": [400, 400, 400, 400, 400, 200]}


@pytest.mark.parametrize(("seconds", "num_images", "taken"), [(0.01, 32, 6), (0.5, 4, 6), (3.0, 2, 2)])
def test_the_measurement_is_bounded(
    seconds: float, num_images: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few images and steps of a slow network; the first step, which is slower, does not count."""
    times, shown = [], []

    def take(self: BenchmarkStep, clock: Clock, batch: Batch) -> float:
        times.append(seconds * batch.num_images * (1 if times else 5))
        return times[-1]

    monkeypatch.setattr(BenchmarkStep, "take", take)
    preset = edit(presets.resolve("vits16"), optim=dict(batch_size=64), views=dict(local=0, global_size=32))
    preset = edit(preset, backbone=dict(width=8, depth=1, heads=1), method=dict(out_dim=8))
    speed = measure(preset, CPU, Gray(20, 64), lambda done, total: shown.append((done, total)))
    assert (speed.step, speed.num_images) == (pytest.approx(seconds), num_images)
    assert len(times) == len(shown) == taken
    assert sum(times[1:]) <= 10
    monkeypatch.setattr(planning, "measure", measure)  # tests of the command line replace it for the session
    reasons = {row.name: row.reason for row in plan(Gray(90, 64), CPU, preset=preset).reasons}
    assert f"scaled from steps of {num_images} images" in reasons["expected time"]


def test_the_plan_changes_only_machine_settings_of_a_preset() -> None:
    preset = edit(presets.resolve("vits16"), optim=dict(batch_size=2), views=dict(local=0, global_size=32))
    chosen = plan(Gray(20, 64), CPU, preset=preset).run
    assert chosen.precision == "float32"
    kept = dataclasses.replace(chosen, precision=preset.precision, workers=preset.workers, cache=preset.cache)
    assert kept == preset


def test_the_size_of_evaluations_follows_the_views() -> None:
    run = presets.resolve("small")
    assert (run.views.size, run.eval_size, fit_to_size(run, 32).online_eval.size) == (48, 80, 53)
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
